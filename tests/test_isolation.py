"""Calls in a child process. The child imports the functions by name: the standard library's, or this file's."""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from repurpose_opt import Edge, LayerProblem, isolation
from repurpose_opt.isolation import DeadlinePassed, call, last

LONG = 60.0


@pytest.fixture(autouse=True, params=[True, False], ids=["forked", "fresh"])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to start a child."""
    monkeypatch.setattr(isolation, "_is_safe_to_fork", lambda: request.param)


def test_answer_equals_the_one_in_this_process() -> None:
    data = list(np.random.default_rng(0).normal(size=1000))
    assert call(statistics.fmean, data, time_limit=LONG) == call(statistics.fmean, data, time_limit=None)


def test_metis_answers_the_same_in_a_child() -> None:
    pytest.importorskip("pymetis")
    from repurpose_opt_solvers.metis_ import graph, partition

    weight = np.random.default_rng(0).normal(size=(40, 30))
    data = graph(LayerProblem.create(weight, 4), Edge(transfer_price=0.01))
    here = call(partition, data, 3, time_limit=None)
    np.testing.assert_array_equal(call(partition, data, 3, time_limit=LONG), here)


def test_without_a_limit_it_stays_in_this_process() -> None:
    assert call(os.getpid, time_limit=None) == os.getpid()
    assert call(os.getpid, time_limit=LONG) != os.getpid()


def test_deadline_ends_the_child() -> None:
    began = time.monotonic()
    with pytest.raises(DeadlinePassed, match=r"sleep was ended after 0\.5 s"):
        call(time.sleep, 30, time_limit=0.5)
    assert time.monotonic() - began < 5


def test_deadline_leaves_no_process_behind(tmp_path: Path) -> None:
    # The child would make the folder after a second, if it still ran.
    late = tmp_path / "late"
    with pytest.raises(DeadlinePassed):
        call(exec, f"import os, time; time.sleep(1.5); os.mkdir({str(late)!r})", time_limit=0.8)
    time.sleep(1.5)
    assert not late.exists()


def test_exception_in_the_child_names_its_last_line() -> None:
    with pytest.raises(RuntimeError, match=r"sqrt ended with code 1: ValueError: .*") as caught:
        call(math.sqrt, -1.0, time_limit=LONG)
    assert "\n" not in str(caught.value)


def test_crash_of_the_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"exec ended with code -9"):
        call(exec, "import os; os.kill(os.getpid(), 9)", time_limit=LONG)


def test_native_output_does_not_reach_the_answer() -> None:
    # A shell writes to file descriptor 1 below Python, as native libraries do.
    assert call(os.system, "echo a native banner", time_limit=LONG) == 0
    assert call(os.write, 1, b"more noise", time_limit=LONG) == len(b"more noise")


def test_large_arrays_pass_both_ways() -> None:
    sent = np.random.default_rng(0).normal(size=1_000_000)
    np.testing.assert_array_equal(call(np.sort, sent, time_limit=LONG), np.sort(sent))


def counts_then_hangs(until: int) -> Iterator[int]:
    yield from range(until)
    time.sleep(60)


def counts_then_dies(until: int) -> Iterator[int]:
    yield from range(until)
    os._exit(3)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("importable")
def test_the_last_answer_before_the_deadline_is_returned() -> None:
    began = time.monotonic()
    assert last(counts_then_hangs, 5, time_limit=4.0) == (4, False)
    assert time.monotonic() - began < 30
    assert last(range_of, 3, time_limit=60.0) == (2, True)
    assert last(range_of, 3, time_limit=None) == (2, True)


def range_of(until: int) -> Iterator[int]:
    yield from range(until)


@pytest.mark.usefixtures("importable")
def test_no_answer_before_the_deadline_is_said() -> None:
    with pytest.raises(DeadlinePassed, match=r"no answer after 0\.5 s"):
        last(counts_then_hangs, 0, time_limit=0.5)


@pytest.mark.usefixtures("importable")
def test_a_child_that_dies_between_answers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="code 3"):
        last(counts_then_dies, 2, time_limit=60.0)


def leaves_a_process(seconds: float) -> int:
    child = os.fork()
    if child == 0:
        time.sleep(seconds)
        os._exit(0)
    return child


@pytest.mark.usefixtures("importable")
def test_a_process_that_keeps_the_pipe_does_not_hold_up_the_answer() -> None:
    began = time.monotonic()
    child = call(leaves_a_process, 60.0, time_limit=LONG)
    assert time.monotonic() - began < 30
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(("threads", "parent"), [(0, "this"), (1, "other")])
def test_a_process_with_threads_does_not_fork(threads: int, parent: str) -> None:
    """A fork has what its parent has in memory, a fresh interpreter has not."""
    code = f"""
import builtins, sys, threading
from repurpose_opt.isolation import call
for _ in range({threads}):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
builtins.known = "this"
print(call(eval, "getattr(__import__('builtins'), 'known', 'other')", time_limit={LONG}))
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LONG)
    assert done.stdout.strip() == parent, done.stderr
