"""`bench run`: rows of real processes, whatever backends do to them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bench_rows import row

from repurpose_opt.bench.contained import call
from repurpose_opt.bench.plan import tasks
from repurpose_opt.bench.results import RowFile, read_rows, read_run
from repurpose_opt.bench.row import Failure, Row, Task
from repurpose_opt.bench.statistics import judged
from repurpose_opt.bench.testsets import test_set
from repurpose_opt.cli import main
from repurpose_opt.exchange import Exchange
from repurpose_opt.metrics import priced_volume

INJECTED = Path(__file__).parent / "injected"
INSTANCE = "random-n64-P4-0"
PLAIN = ("bench", "run", "tiny", "--only", "[el]*-0", "--solvers", "random,munkres", "--seeds", "1")
BENCH = (sys.executable, "-m", "repurpose_opt.cli", "bench")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the injected backends are an installed distribution."""
    sys.path.insert(0, str(INJECTED))
    try:
        from bad_backends import BACKENDS
    finally:
        sys.path.remove(str(INJECTED))
    folder = tmp_path_factory.mktemp("plugin")
    metadata = folder / "bad_backends-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-backends\nVersion: 1.0\n")
    points = "\n".join(f"{backend.name} = bad_backends:{backend.__name__}" for backend in BACKENDS)
    (metadata / "entry_points.txt").write_text(f"[repurpose_opt.partitioners]\n{points}\n")
    paths = os.pathsep.join([str(folder), str(INJECTED), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "BAD_BACKENDS_PROCESS": str(folder / "process")}


@pytest.fixture(scope="module")
def bad_run(plugin: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Rows of all injected backends, and of one that finds a better placement, by solver."""
    folder = tmp_path_factory.mktemp("run")
    names = [
        line.split(" = ")[0]
        for line in (Path(plugin["PYTHONPATH"].split(os.pathsep)[0]) / "bad_backends-1.0.dist-info/entry_points.txt")
        .read_text()
        .splitlines()[1:]
    ]
    command = [
        *BENCH, "run", "lossless-random", "--only", INSTANCE, "--solvers", ",".join([*names, "munkres"]), "--seeds",
        "1", "--time-limit", "0.5", "--grace", "1", "--memory-limit", "0.25", "--jobs", "2", "--output", str(folder),
    ]  # fmt: skip
    subprocess.run(command, env=plugin, check=True, timeout=200, stdout=subprocess.DEVNULL)
    return {row.solver: row for row in judged(read_rows(folder))}


@pytest.mark.parametrize(
    ("solver", "failure", "termination", "message"),
    [
        ("crashes", Failure.CRASH, "error", "SIGSEGV"),
        ("exits", Failure.CRASH, "error", "exit code 0"),
        ("raises", Failure.EXCEPTION, "error", "KeyError: 'row 7'"),
        ("hangs", Failure.TIMEOUT, "time_limit", "ended after"),
        ("eats", Failure.MEMORY, "error", "allowed: 256 MiB"),
        ("eats-elsewhere", Failure.MEMORY, "error", "allowed: 256 MiB"),
        ("overfills", Failure.INVALID, "error", "worker 0"),
        ("mislabels", Failure.INVALID, "error", "outside 0 … 3"),
        ("too-short", Failure.INVALID, "error", "63"),
        ("tampers", Failure.INVALID, "error", "weights differ"),
    ],
)
def test_a_failure_is_a_row_without_figures_that_says_what_it_was(
    bad_run: dict[str, Row], solver: str, failure: Failure, termination: str, message: str
) -> None:
    row = bad_run[solver]
    assert (row.failure, row.termination) == (failure, termination)
    assert message in row.message
    assert row.objective is row.volume is row.bound is row.nmse is None
    assert row.fingerprint == bad_run["munkres"].fingerprint


@pytest.mark.parametrize(
    ("solver", "refused"),
    [
        ("claims-optimal", "optimal without a bound"),
        ("claims-bound", "bound"),
        ("claims-objective", "objective 1"),
    ],
)
def test_a_false_claim_is_refused_and_the_answer_stays(bad_run: dict[str, Row], solver: str, refused: str) -> None:
    row = bad_run[solver]
    assert (row.failure, row.termination) == (None, "heuristic")
    assert any(refused in claim for claim in row.refused), row.refused
    assert row.objective == bad_run["good"].objective
    assert row.bound is None
    assert not bad_run["good"].refused


def test_a_false_infeasible_is_refused(bad_run: dict[str, Row]) -> None:
    assert any("infeasible" in claim for claim in bad_run["claims-infeasible"].refused)


def test_a_process_that_a_solve_started_ends_with_it(bad_run: dict[str, Row], plugin: dict[str, str]) -> None:
    process = int(Path(plugin["BAD_BACKENDS_PROCESS"]).read_text())
    assert not is_running(process)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without faults, to be read only: two solvers, of which one proves EDGE, on five instances."""
    folder = tmp_path_factory.mktemp("plain")
    assert main([*PLAIN, "--jobs", "1", "--output", str(folder)]) == 0
    return folder


def bench(*arguments: str) -> list[str]:
    return [*BENCH, *arguments]


def test_figures_of_a_row_are_those_of_its_answer(tmp_path: Path) -> None:
    """Recomputed from the file by NumPy alone, without the code that wrote it."""
    run = ["bench", "run", "lossless-random", "--only", INSTANCE, "--solvers", "munkres", "--seeds", "1"]
    assert main([*run, "--output", str(tmp_path)]) == 0
    (row,) = read_rows(tmp_path)
    problem = next(found.problem for found in test_set("lossless-random") if found.name == INSTANCE)
    with np.load(tmp_path / "answers" / row.task.file) as archive:
        owner = archive["owner"]
    needed = {
        (column, owner[neuron])
        for neuron, column in zip(*problem.weight.nonzero(), strict=True)
        if owner[neuron] != problem.input_owner[column]
    }
    assert row.volume == row.objective == len(needed)
    assert (row.m, row.n, row.P, row.nonzeros) == (64, 64, 4, problem.weight.nnz)
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    for column, worker in needed:
        transfers[column, worker] = True
    assert priced_volume(problem, Exchange.of_transfers(transfers, problem.input_owner)) == row.volume


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL, and a torn last line as a crash of the machine would leave it."""
    command = bench(
        "run", "lossless-random", "--only", "*n64*", "--solvers", "random,contiguous", "--seeds", "4",
        "--jobs", "1", "--output", str(tmp_path),
    )  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = tmp_path / "rows.csv"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 6)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = path.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    path.write_bytes(kept + b"lossless-random,random-n64")
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert path.read_bytes().startswith(kept)
    rows = read_rows(tmp_path)
    expected = tasks(
        {"lossless-random": test_set("lossless-random")},
        ["random", "contiguous"],
        "*n64*",
        4,
        None,
        1,
    )
    assert len(rows) == len(expected) == 16
    assert {row.task for row in rows} == set(expected)
    assert len(read_run(tmp_path)["sessions"]) == 2


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_processes_of_a_killed_run_end(plugin: dict[str, str], tmp_path: Path) -> None:
    environment = {**plugin, "BAD_BACKENDS_PROCESS": str(tmp_path / "process")}
    command = bench(
        "run", "lossless-random", "--only", INSTANCE, "--solvers", "hangs", "--seeds", "1", "--time-limit", "100",
        "--jobs", "1", "--output", str(tmp_path / "run"),
    )  # fmt: skip
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    file = tmp_path / "process"
    wait_until(lambda: file.exists() and bool(file.read_text()))
    run.kill()
    run.wait()
    wait_until(lambda: not is_running(int(file.read_text())))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = main(["bench", "run", "tiny", "--solvers", "random", "--output", str(tmp_path)])
    assert code == 1
    assert "another run writes there" in capsys.readouterr().err


def test_a_run_with_other_limits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["bench", "run", "tiny", "--only", "edge-0", "--solvers", "random", "--seeds", "1", "--output", str(tmp_path)]
    assert main(run) == 0
    assert main([*run, "--memory-limit", "1"]) == 1
    assert "memory_limit" in capsys.readouterr().err
    assert main(run) == 0
    assert len(read_rows(tmp_path)) == 1


def test_check_finds_what_was_changed(plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(plain_run, tmp_path, dirs_exist_ok=True)
    assert main(["bench", "check", str(tmp_path)]) == 0
    path = tmp_path / "rows.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    changed = next(line for line in lines if line["volume"])
    changed["volume"] = str(int(changed["volume"]) - 1)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    capsys.readouterr()
    assert main(["bench", "check", str(tmp_path), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["differences"]
    assert (found["column"], found["instance"]) == ("volume", changed["instance"])
    assert found["recomputed"] == found["stored"] + 1


def test_parquet_holds_the_rows(plain_run: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    assert main(["bench", "export", str(plain_run), str(tmp_path / "rows.parquet")]) == 0
    rows = read_rows(plain_run)
    assert any(row.bound is None for row in rows)
    assert any(row.bound is not None for row in rows)
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert len(frame) == len(rows) > 0
    for column in ("objective", "bound", "volume", "seconds"):
        stored = [None if pandas.isna(value) else value for value in frame[column]]
        assert stored == [getattr(row, column) for row in rows]
    assert list(frame["solver"]) == [row.solver for row in rows]


def test_an_executor_of_ones_own_serves(plain_run: Path, tmp_path: Path) -> None:
    """A pool of processes stands for any executor of `concurrent.futures`."""
    assert main([*PLAIN, "--executor", "concurrent.futures:ProcessPoolExecutor", "--output", str(tmp_path)]) == 0
    assert figures(tmp_path) == figures(plain_run)


def test_dask_gives_the_same_rows(plain_run: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        assert main([*PLAIN, "--executor", f"dask://{address}", "--output", str(tmp_path)]) == 0
    assert figures(tmp_path) == figures(plain_run)


def figures(folder: Path) -> dict[object, tuple[object, ...]]:
    return {row.task: (row.termination, row.objective, row.volume, row.fingerprint) for row in read_rows(folder)}


def test_the_peak_of_memory_is_measured() -> None:
    outcome = call(lambda: len(np.ones(25 << 20)), seconds=30, memory_limit=1 << 30)
    assert outcome.value == 25 << 20
    assert 195 << 20 < outcome.peak_bytes < 260 << 20


def test_memory_within_the_limit_is_allowed_and_above_it_ends() -> None:
    assert call(lambda: len(np.ones(10 << 20)), seconds=30, memory_limit=150 << 20).failure is None
    outcome = call(lambda: len(np.ones(25 << 20)), seconds=30, memory_limit=150 << 20)
    assert outcome.failure is Failure.MEMORY
    assert outcome.value is None


def test_an_allocation_that_fails_is_memory() -> None:
    outcome = call(lambda: np.ones(1 << 50), seconds=30, memory_limit=1 << 30)
    assert outcome.failure is Failure.MEMORY


def is_pipe(descriptor: int) -> bool:
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def test_a_flood_of_output_does_not_hold_up_the_limits() -> None:
    """A call that writes into the pipe of its own answer."""

    def floods() -> None:
        opened = [int(name) for name in os.listdir("/proc/self/fd")]
        pipe = max(number for number in opened if os.path.exists(f"/proc/self/fd/{number}") and is_pipe(number))
        while True:
            os.write(pipe, b"x" * 4096)

    assert call(floods, seconds=1.0, memory_limit=1 << 30).failure in (Failure.TIMEOUT, Failure.MEMORY)


def test_what_a_call_left_in_another_session_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "process"

    def leaves() -> str:
        if os.fork() == 0:
            os.setsid()
            file.write_text(str(os.getpid()))
            time.sleep(600)
        wait_until(lambda: file.exists() and bool(file.read_text()))
        return "done"

    assert call(leaves, seconds=60, memory_limit=1 << 30).value == "done"
    assert not is_running(int(file.read_text()))


def test_pages_that_forks_share_count_once() -> None:
    def forks() -> None:
        held = np.ones(20 << 20)  # 160 MiB
        children = [os.fork() for _ in range(1)]
        if 0 in children:
            time.sleep(600)
        time.sleep(0.5)
        assert len(held)

    outcome = call(forks, seconds=60, memory_limit=260 << 20)
    assert outcome.failure is None, outcome.message
    assert 150 << 20 < outcome.peak_bytes < 230 << 20


@pytest.mark.parametrize("message", ["x" * 200_000, os.fsdecode(b"caf\xe9"), "a\r\nb\u2028c | d"])
def test_whatever_a_backend_says_can_be_read_again(tmp_path: Path, message: str) -> None:
    for name in ("first", "my  layer.npy", "line\u2028separator"):
        file = RowFile(tmp_path)
        file.append(row(instance=name, message=message, refused=(message,)))
        file.close()
    rows = read_rows(tmp_path)
    assert [found.instance for found in rows] == ["first", "my  layer.npy", "line\u2028separator"]
    assert all("\n" not in found.message and len(found.message) <= 1000 for found in rows)


@pytest.mark.parametrize("kept", [0, 5])
def test_a_run_killed_before_its_first_line_was_whole_begins_anew(tmp_path: Path, kept: int) -> None:
    (tmp_path / "rows.csv").write_text("testset,instance"[:kept])
    assert read_rows(tmp_path) == []
    file = RowFile(tmp_path)
    file.append(row())
    file.close()
    assert read_rows(tmp_path) == [row()]


def test_names_of_answers_fit_a_file_system_and_differ() -> None:
    long = [Task("./" + "folder/" * 60, f"layer-{number}", "auto", 0, 1.0).file for number in range(3)]
    assert len(set(long)) == 3
    assert all(len(name.encode()) <= 255 and "/" not in name for name in long)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--solvers", ",contiguous"), 1, "--solvers"),
        (("--solvers", "metis+"), 1, "--solvers"),
        (("--solvers", "flow@abc"), 1, "--solvers"),
        (("--solvers", "contiguous/"), 1, "--solvers"),
        (("--solvers", "nobody"), 1, "'nobody' is unknown"),
        (("--solvers", "random", "--executor", "os:getcwd"), 1, "gives a str"),
        (("--solvers", "random", "--executor", "nothing:at_all"), 1, "--executor"),
        (("--solvers", "random", "--only", "nothing*"), 1, "--only"),
        (("--memory-limit", "0"), 2, "GiB > 0"),
        (("--jobs", "1", "--executor", "a:b"), 2, "--jobs is for this machine"),
    ],
)
def test_wrong_usage_is_one_helpful_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    try:
        ended = main(["bench", "run", "tiny", *arguments, "--output", str(tmp_path)])
    except SystemExit as usage:
        ended = int(str(usage.code))
    said = capsys.readouterr().err
    assert (ended, message in said, "Traceback" in said) == (code, True, False), said


def test_runs_without_a_task_in_common_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("edge-0", "edge-1"):
        run = ["bench", "run", "tiny", "--only", name, "--solvers", "contiguous", "--seeds", "1"]
        assert main([*run, "--output", str(tmp_path / name)]) == 0
    assert main(["bench", "compare", str(tmp_path / "edge-0"), str(tmp_path / "edge-1")]) == 1
    assert "shares no task" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "edge-0"), str(tmp_path / "edge-0")]) == 0


def test_a_report_without_the_answers_says_so(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    for name in ("rows.csv", "run.json"):
        shutil.copy(plain_run / name, tmp_path)
    assert main(["bench", "report", str(tmp_path)]) == 0
    assert "no picture of" in capsys.readouterr().err
    assert main(["bench", "check", str(tmp_path)]) == 1
    assert "without its answers/" in capsys.readouterr().err
