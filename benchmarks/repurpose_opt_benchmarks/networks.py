"""`repurpose` against other ways to run a network on several workers, at equal volume and with equal training.

Every row that is trained sees the same batches for the same number of steps. Its learning rate, and whether it also
learns from the dense network, are chosen from one small grid on validation images of the first seed. Test images judge.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from repurpose_opt.demo.digits import Digits, load_digits
from repurpose_opt.errors import NoSolution
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.networks_report import FIGURES, bars, markdown, plot, summary
from repurpose_opt_benchmarks.networks_rows import Cell, Contender, cells, contender
from repurpose_opt_benchmarks.networks_tasks import FULL, QUICK, Setting, Task, make
from repurpose_opt_benchmarks.report import write

Row = dict[str, Any]
NOT_MEASURED: Row = dict.fromkeys(FIGURES) | {"chosen": None, "tried": []}


@dataclass(frozen=True)
class Log:
    """Rows in a file of JSON lines, each written when it is done; in memory alone where there is no file."""

    path: Path | None

    @cached_property
    def rows(self) -> dict[Cell, Row]:
        if self.path is None or not self.path.exists():
            return {}
        whole, _, cut = self.path.read_text().rpartition("\n")
        if cut:  # the run was ended while it wrote
            self.path.write_text(whole + "\n" * bool(whole))
        return {_cell(row): row for row in map(json.loads, whole.splitlines())}

    def add(self, row: Row) -> None:
        self.rows[_cell(row)] = row
        if self.path is not None:
            with self.path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def _cell(row: Row) -> Cell:
    return Cell(**{field.name: row[field.name] for field in fields(Cell)})


def measure(
    settings: Sequence[Setting], digits: Callable[[Setting], Digits], seeds: int, rounds: int, log: Log
) -> list[Row]:
    """All rows, in order; those that the log does not have yet are measured."""
    rows = []
    for setting in settings:
        data = digits(setting)
        for seed in range(seeds):
            wanted = list(cells(setting, data.source, seed, rounds))
            missing = [cell for cell in wanted if cell not in log.rows]
            if missing:
                started = time.perf_counter()
                task = make(setting, data, seed)
                print(f"{setting.name}, seed {seed}: trained in {time.perf_counter() - started:.1f} s", flush=True)
                for cell in missing:
                    log.add(measured(task, cell, log))
            rows += [log.rows[cell] for cell in wanted]
    return rows


def measured(task: Task, cell: Cell, log: Log) -> Row:
    """The row of a cell, trained as the first seed's was; that there is no plan is a row as well."""
    first = log.rows.get(replace(cell, seed=0))
    try:
        row = {**asdict(cell), **figures(task, cell, None if first is None else first["chosen"]), "error": None}
    except NoSolution as error:
        row = {**asdict(cell), **NOT_MEASURED, "error": str(error)}
    print(_line(row), flush=True)
    return row


def figures(task: Task, cell: Cell, chosen: int | None) -> Row:
    """The row of a cell; `chosen` of its choices, or the one that is best on validation images."""
    started = time.perf_counter()
    found = contender(task, cell)
    made = time.perf_counter()
    cost, before, after, tried = found.cost, found.before, None, []
    if found.train is not None and found.choices:
        trained = {index: found.train(found.choices[index]) for index in _indices(found, chosen)}
        validation = {index: task.validation.accuracy(model) for index, (model, _) in trained.items()}
        tried = [found.choices[index].named() | {"accuracy": validation[index]} for index in trained]
        chosen = max(validation, key=lambda index: validation[index])
        model, cost = trained[chosen]
        after = task.test.accuracy(model)
    assert cost is not None
    return {
        "numbers": cost.values_per_sample,
        "volume_fraction": cost.volume_fraction,
        "busiest_macs": cost.busiest_macs,
        "before": None if before is None else task.test.accuracy(before),
        "after": after,
        "chosen": chosen,
        "tried": tried,
        "seconds": made - started,
        "training_seconds": (time.perf_counter() - made) / len(tried) if tried else None,
    }


def _indices(found: Contender, chosen: int | None) -> Sequence[int]:
    return range(len(found.choices)) if chosen is None else [chosen]


def _line(row: Row) -> str:
    if row["error"] is not None:
        return f"  {row['row']}: {row['error']}"
    accuracies = " → ".join("–" if row[when] is None else f"{row[when]:.2%}" for when in ("before", "after"))
    training = f", {len(row['tried'])} × {row['training_seconds']:.1f} s" if row["tried"] else ""
    limit = "" if row["budget"] is None else f" {row['budget']:.2%}"
    return (
        f"  {row['row']} {row['messages'] or ''}{limit}: {row['numbers']} numbers ({row['volume_fraction']:.2%}), "
        f"{accuracies}; {row['seconds']:.1f} s{training}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    folder = args.output or (None if args.quick else RESULTS)
    name = "networks-quick" if args.quick else "networks"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = Log(None if folder is None else folder / f"{name}.rows.jsonl")
    small, digits = load_digits(None), load_digits(args.mnist_dir)
    settings = [setting for task in args.task for setting in (QUICK if args.quick else FULL)[task]]

    def data(setting: Setting) -> Digits:
        """The sensors see the demo's digits."""
        return small if setting.name == "sensors" else digits

    rows = measure(settings, data, args.seeds, args.rounds, log)
    report = {
        "command": command(args),
        "data": " and ".join(dict.fromkeys(row["data"] for row in rows)),
        "environment": environment("torch", "mlxtend", "mtkahypar"),
        "seeds": list(range(args.seeds)),
        "settings": [described(setting) for setting in settings],
        "summary": summary(rows),
        # They were set for all of MNIST at full size.
        "bars": [] if args.quick or args.mnist_dir is None else list(bars(rows)),
    }
    text = markdown(report, rows, str(__doc__).strip())
    print(text)
    if folder is not None:
        for family in args.task:
            figure = f"{name}-{family}.png"
            plot(rows, family, folder / figure)
            text += f"\n\n![{family}]({figure})"
        write(folder, name, report, text)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks networks", description=__doc__)
    parser.add_argument("--task", default=",".join(FULL), help=f"some of {', '.join(FULL)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 … N−1 (default 5)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="also ours, alternating in N rounds")
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files, for all but the sensors")
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not measured again")
    args = parser.parse_args(argv)
    args.task = args.task.split(",")
    for name in args.task:
        if name not in FULL:
            parser.error(f"--task {name}; allowed: {', '.join(FULL)}")
    for option in ("seeds", "rounds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}; allowed: at least 1")
    if args.quick:
        args.seeds = 1
    return args


def command(args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    data = "" if args.mnist_dir is None else " --mnist-dir DIR"
    rounds = "" if args.rounds == 1 else f" --rounds {args.rounds}"
    quick = " --quick" if args.quick else ""
    task = ",".join(args.task)
    return f"python -m repurpose_opt_benchmarks networks --task {task} --seeds {args.seeds}{rounds}{data}{quick}"


def described(setting: Setting) -> Row:
    """A setting as JSON."""
    return {field.name: getattr(setting, field.name) for field in fields(setting) if field.name != "draw"} | {
        "training": asdict(setting.training),
        "choices": [asdict(choice) for choice in setting.choices],
    }


if __name__ == "__main__":
    sys.exit(main())
