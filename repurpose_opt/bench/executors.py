"""Where solves run: threads of this process that each have a server, or any executor of `concurrent.futures`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module

from repurpose_opt.bench.slot import close_all
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.registry import check_importable

_DASK = "dask://"
_ALLOWED = f"{_DASK}HOST:PORT of a scheduler, or MODULE:FUNCTION that gives an Executor"


@contextmanager
def local(jobs: int) -> Iterator[Executor]:
    """So many solves at a time on this machine."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        close_all()  # ends the solves under way after an interrupt, which their threads wait for
        pool.shutdown(cancel_futures=True)


@contextmanager
def named(address: str) -> Iterator[tuple[Executor, int]]:
    """(executor, tasks to hand to it at a time) for `dask://HOST:PORT` or `MODULE:FUNCTION`.

    This package and the backends must be installed where it works. Raises InvalidArgument, SolverNotInstalled.
    """
    if address.startswith(_DASK):
        check_importable("a Dask executor", "distributed")
        from distributed import Client

        try:
            client = Client(f"tcp://{address.removeprefix(_DASK)}", timeout=10)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InvalidArgument("--executor", f"{address} ({reason})", _ALLOWED) from None
        with client:
            threads = sum(client.nthreads().values())
            if threads == 0:
                raise InvalidArgument("--executor", f"{address}, which has no workers", "a scheduler with workers")
            yield client.get_executor(), threads
        return
    module, _, function = address.partition(":")
    try:
        executor = getattr(import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InvalidArgument("--executor", f"{address!r} ({error})", _ALLOWED) from None
    if not isinstance(executor, Executor):
        raise InvalidArgument("--executor", f"{address!r}, which gives a {type(executor).__name__}", _ALLOWED)
    with executor:
        yield executor, getattr(executor, "_max_workers", 1)
