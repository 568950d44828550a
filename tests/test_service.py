"""Services: processes of a plan that stay and answer batches from files, standard input and clients."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_graph_plan import built, inputs_of
from test_plan import mlp, random_plan
from test_runtime import expected, samples
from worker_pool import WorkerPool

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.processes.client import Client
from repurpose_opt.runtime.processes.desk import Desk, Request
from repurpose_opt.runtime.processes.feed import Listener, targets_of
from repurpose_opt.runtime.processes.launch import Service

P = 3


def small_plan() -> Plan:
    """Outputs on workers 1 and 2."""
    return random_plan(mlp([11, 9, 6]), P, workers=[[0, 1, 2], [0, 1, 2], [1, 2]])


def npy(*arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    for array in arrays:
        np.save(file, array)
    return file.getvalue()


def workers_of(plan: Path) -> dict[int, int]:
    """The processes that run a plan, by rank, as the kernel knows them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        rank = [variable.removeprefix(b"RANK=") for variable in variables if variable.startswith(b"RANK=")]
        if rank and str(plan).encode() in command:
            found[int(rank[0])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to find the workers in")
def test_a_service_on_this_machine_goes_on_after_a_worker_was_killed(tmp_path: Path) -> None:
    plan, inputs = small_plan(), samples(20, 11)
    plan.save(tmp_path / "plan")
    answers = expected(plan, inputs)
    with Service(tmp_path / "plan", batch_size=8, timeout=100, max_restarts=1) as service:
        assert np.abs(service.answer(inputs) - answers).max() <= 1e-6
        first = workers_of(tmp_path / "plan")
        os.kill(first[1], signal.SIGKILL)
        assert np.abs(service.answer(inputs) - answers).max() <= 1e-6
        assert workers_of(tmp_path / "plan").keys() == {0, 1, 2}
        assert not set(workers_of(tmp_path / "plan").values()) & set(first.values())

        assert service.answer(inputs[:0]).shape == (0, 6)
        with pytest.raises(RepurposeError, match=r"^the batch: shape \(20, 10\); the plan reads 11 columns"):
            service.answer(inputs[:, :10])
        with pytest.raises(RepurposeError, match=r"^the batch: NaN or infinite at sample 19, column 10;"):
            service.answer(np.where(np.arange(220).reshape(20, 11) == 219, np.nan, inputs))

        def ask(number: int) -> bool:
            with Client(service.address) as client:
                ours = [client.answer(inputs[number : number + size]) for size in range(1, 10)]
            theirs = [answers[number : number + size] for size in range(1, 10)]
            return all(np.abs(a - b).max() <= 1e-6 for a, b in zip(ours, theirs, strict=True))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4)))

        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(service.address)
            raw.sendall(json.dumps(inputs[:2].tolist()).encode() + b"\n[[1]]\n")
            with raw.makefile() as lines:
                assert np.abs(np.array(json.loads(lines.readline())) - answers[:2]).max() <= 1e-6
                assert json.loads(lines.readline())["error"].startswith("the batch: shape (1, 1);")

        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(service.address)
            raw.sendall(npy(inputs)[:6] + b"nonsense" * 20)
            raw.shutdown(socket.SHUT_WR)
            assert b"no .npy array" in raw.makefile("rb").read().replace(b"\0", b"")

        os.kill(workers_of(tmp_path / "plan")[2], signal.SIGKILL)
        with pytest.raises(RepurposeError, match=r"^worker 2 \(process \d+ on \S+\) ended: worker [01] cannot "):
            service.answer(inputs)
    assert workers_of(tmp_path / "plan") == {}
    assert service.report is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_plan().save(tmp_path / "plan")
    for name in ("answers", "owners"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_service_over_files_and_standard_input(folder: Path) -> None:
    with WorkerPool(P) as pool:
        _files(folder, pool)
        _graphs(folder, pool)
        _standard_input(folder, pool)
        _stopped(folder, pool)


def _files(folder: Path, pool: WorkerPool) -> None:
    """Three files, one of them with a bad batch, fed by worker 0 and read by each worker."""
    plan, inputs = small_plan(), samples(23, 11)
    bad = inputs.copy()
    bad[17, 3] = np.nan
    for name, array in {"a": inputs, "bad": bad, "b": inputs[:5]}.items():
        np.save(folder / f"{name}.npy", array)
    names = [str(folder / f"{name}.npy") for name in ("a", "bad", "b")]
    common = [str(folder / "plan"), "--serve", "--batch-size=7", f"--report={folder / 'report.json'}"]

    ends = pool.run(P, [*common, "--input", *names, f"--output={folder / 'answers'}"])
    assert ends.codes == [1, 0, 0]
    assert ends.errors == [
        f"{names[1]}: NaN or infinite at sample 17, column 3; allowed: numbers that are finite in float32"
    ]
    assert sorted(path.name for path in (folder / "answers").iterdir()) == ["a.npy", "b.npy"]
    for name, count in (("a", 23), ("b", 5)):
        assert np.abs(np.load(folder / "answers" / f"{name}.npy") - expected(plan, inputs[:count])).max() <= 1e-6
    report = json.loads((folder / "report.json").read_text())
    answered = 23 + 14 + 5
    assert (report["samples"], report["batches"], report["batches_answered"]) == (answered, 7, 7)
    assert report["batches_refused"] == 1
    assert report["bytes_sent"] == (plan.traffic() * answered).tolist()
    held = [len(plan.layers[0].held(worker)) for worker in range(P)]
    assert report["bytes_fed"] == [0, 4 * held[1] * answered, 4 * held[2] * answered]
    latency = report["latency_seconds"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert report["samples_per_second"] == pytest.approx(answered / report["seconds"])

    files = ["--input", names[0], names[2], f"--output={folder / 'owners'}"]
    ends = pool.run(P, [*common, "--feed=owners", "--json", *files])
    assert ends.codes == [0, 0, 0]
    for name in ("a", "b"):
        assert (folder / "owners" / f"{name}.npy").read_bytes() == (folder / "answers" / f"{name}.npy").read_bytes()
    report = json.loads((folder / "report.json").read_text())
    assert report["bytes_fed"] == [0, 0, 0]
    assert json.loads(ends.printed[-1].partition("worker: ")[2]) == report

    ends = pool.run(P, [*common, "--feed=owners", "--input", *names, f"--output={folder / 'owners'}"])
    assert ends.codes == [1, 1, 1]
    assert len(ends.errors) == 1
    assert "NaN or infinite at sample 17, column 3" in ends.errors[0]


def _graphs(folder: Path, pool: WorkerPool) -> None:
    """Inputs that are images, flattened images, or token ids that every worker has."""
    for name in ("residual", "flattened", "transformer on two"):
        model, plan = built(name)
        plan.save(folder / name)
        inputs = inputs_of(model, 5, seed=4)
        np.save(folder / "inputs.npy", inputs)
        arguments = [str(folder / name), "--serve", "--batch-size=3", "--input", str(folder / "inputs.npy")]
        ends = pool.run(P, [*arguments, f"--output={folder / 'outputs.npy'}"])
        assert ends.codes == [0, 0, 0], ends
        assert np.abs(np.load(folder / "outputs.npy") - expected(plan, inputs)).max() <= 1e-5


def _standard_input(folder: Path, pool: WorkerPool) -> None:
    """A pipe of arrays, with a pause longer than any worker waits, a bad one, and rubbish at the end."""
    plan, inputs = small_plan(), samples(9, 11)
    os.mkfifo(folder / "pipe")

    def write() -> None:
        with (folder / "pipe").open("wb") as pipe:
            pipe.write(npy(inputs, inputs[:, :4]))
            pipe.flush()
            time.sleep(2.5)
            pipe.write(npy(inputs[:2]) + b"rubbish")

    writer = threading.Thread(target=write)
    writer.start()
    arguments = [str(folder / "plan"), "--serve", "--timeout=2"]
    ends = pool.run(P, arguments, stdin=folder / "pipe", stdout=folder / "printed")
    writer.join()
    assert ends.codes == [1, 0, 0]
    assert len(ends.errors) == 1
    assert ends.errors[0].startswith("standard input and output: what came in is no .npy array (")
    assert "11 samples in 2 batches, 1 batches refused" in ends.printed[-1] + ends.printed[-2]
    with (folder / "printed").open("rb") as printed:
        assert np.abs(np.load(printed) - expected(plan, inputs)).max() <= 1e-6
        assert str(np.load(printed)).startswith("the batch: shape (9, 4);")
        assert np.abs(np.load(printed) - expected(plan, inputs[:2])).max() <= 1e-6
        assert str(np.load(printed)).startswith("what came in is no .npy array")
        assert printed.read() == b""


def _stopped(folder: Path, pool: WorkerPool) -> None:
    """By SIGTERM in the middle of the second file; workers other than worker 0 do not follow one of their own."""
    for path in (folder / "answers").iterdir():
        path.unlink()
    for name, size in (("first", 2), ("second", 2000)):
        np.save(folder / f"{name}.npy", samples(size, 11))
    files = ["--input", str(folder / "first.npy"), str(folder / "second.npy"), f"--output={folder / 'answers'}"]
    arguments = [str(folder / "plan"), "--serve", "--batch-size=1", *files]
    ends = pool.run(P, arguments, sabotage={0: "terminate later", 1: "terminate"})
    assert ends.codes == [0, 0, 0]
    assert ends.errors == []
    assert [path.name for path in (folder / "answers").iterdir()] == ["first.npy"]
    assert any(
        line.endswith("second.npy: not answered: the service ended before this batch's turn") for line in ends.printed
    )
    figures = next(line for line in ends.printed if "samples/s" in line)
    assert 2 < int(figures.split(": ")[1].split(" samples")[0].replace(",", "")) < 2002


# In one process


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[Desk, str]]:
    """A desk at which nobody answers yet, and an address of clients."""
    desk = Desk()
    listener = Listener("127.0.0.1:0", desk)
    listener.start()
    yield desk, listener.name
    listener.close()


def _double(desk: Desk) -> None:
    request = desk.next(5)
    assert request is not None
    request.answer.set_result(2 * request.inputs)


def test_a_client_waits_for_its_own_timeout_only(listener: tuple[Desk, str]) -> None:
    desk, address = listener
    with Client(address, timeout=0.3) as client:
        with pytest.raises(RepurposeError, match=r"no answer within 0\.3 seconds"):
            client.answer(np.ones(3))
        _double(desk)  # the answer to the first attempt, which nobody waits for any longer
        thread = threading.Thread(target=lambda: _double(desk))
        thread.start()
        assert client.answer(np.arange(2)).tolist() == [0, 2]
        thread.join()
    with pytest.raises(InvalidArgument, match="timeout: got 0; allowed: seconds > 0"):
        Client(address, timeout=0)


def test_what_came_too_late_is_refused_and_what_was_answered_is_handed_on(listener: tuple[Desk, str]) -> None:
    desk, address = listener
    outcomes: list[object] = []

    def ask() -> None:
        with Client(address, timeout=10) as client:
            try:
                outcomes.append(client.answer(np.arange(2)).tolist())
            except RepurposeError as error:
                outcomes.append(str(error))

    for turn in (lambda: _double(desk), lambda: desk.close(5)):
        thread = threading.Thread(target=ask)
        thread.start()
        while thread.is_alive() and desk._requests.empty():
            time.sleep(0.01)
        turn()
        thread.join()
    with pytest.raises(RepurposeError, match="the service has ended"), desk.answered(Request("x", np.ones(1))):
        pass
    assert outcomes == [[0, 2], "the service ended before this batch's turn"]


def test_an_address_in_use_is_one_line(tmp_path: Path, listener: tuple[Desk, str]) -> None:
    _, address = listener
    with pytest.raises(RepurposeError, match=rf"^--listen {address}: Address already in use$"):
        Listener(address, Desk())
    first = Listener(str(tmp_path / "socket"), Desk())
    assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RepurposeError, match="Address already in use"):
        Listener(str(tmp_path / "socket"), Desk())
    first._server.socket.close()  # as a killed service leaves it: nobody listens, the file is there
    Listener(str(tmp_path / "socket"), Desk()).close()
    assert not (tmp_path / "socket").exists()


def test_outputs_never_replace_inputs_or_each_other(tmp_path: Path) -> None:
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    assert targets_of([one, two], Path(os.curdir)) == [Path("one.npy"), Path("two.npy")]
    assert targets_of([one], two) == [two]
    for names, output in (
        ([one, two], tmp_path),
        ([one, two], tmp_path / "new"),
        ([one, one], Path("/")),
        ([one], one),
    ):
        with pytest.raises(InvalidArgument):
            targets_of(names, output)
