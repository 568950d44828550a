"""What the report says, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repurpose_opt.bench import statistics
from repurpose_opt.bench.report import failures, instances, method, solvers
from repurpose_opt.bench.report.charts import formulation_charts
from repurpose_opt.bench.report.document import Block, Bullets, Document, Paragraph, Section
from repurpose_opt.bench.report.grouped import Grouped, slug
from repurpose_opt.bench.report.instances import Layer
from repurpose_opt.bench.row import Row

_OBJECTIVES = {
    "edge": "The objective is the squared error on the diagonal of C plus the prices of kept weights and transfers.",
    "lossless": "Nothing is pruned: the objective is the volume in bytes a sample, each byte at the price of its link.",
    "volume": "The objective is the squared error after refit plus the priced volume; a budget of bytes is hard.",
}


def document(
    rows: Sequence[Row], run: Mapping[str, Any], layer: Layer | None = None, most_pictures: int = 80
) -> Document:
    """The whole report; `rows` as they were recorded."""
    grouped = Grouped.of(rows)
    sections = [
        Section("All solvers", "solvers", _overview(grouped)),
        *(_formulation(name, group, grouped) for name, group in grouped.formulations.items()),
        Section("Failures and refused claims", "failures", failures.blocks(grouped)),
        Section("Instances", "instances", _instances(grouped)),
        Section("How it was measured", "method", method.blocks(grouped, run)),
        Section("Known limitations", "limitations", (Bullets(method.LIMITATIONS),)),
    ]
    details = instances.sections(grouped, layer, most_pictures)
    if details:
        notes = instances.notes(grouped, layer, most_pictures)
        sections.append(Section("Each instance", "each-instance", notes, details, is_detail=True))
    return Document("Solver benchmark", method.lead(grouped.rows, run), solvers.answer(grouped), tuple(sections))


def _overview(grouped: Grouped) -> tuple[Block, ...]:
    if not grouped.summaries:
        return (Paragraph("There are no rows."),)
    note = Paragraph(
        "By the gap to the best known, where a solve that is not supported counts as 100 %. Solvers differ in what "
        "they support: compare those of one formulation, in its section."
    )
    return (
        note,
        solvers.summary_table("Every solver over all instances that it supports", grouped.summaries),
    )


def _formulation(name: str, rows: Sequence[Row], grouped: Grouped) -> Section:
    every = statistics.summaries(rows)
    summaries = [summary for summary in every if summary.solves]
    without = [summary.solver for summary in every if not summary.solves]
    rows = [row for row in rows if row.solver not in without]
    blocks: list[Block] = [Paragraph(_OBJECTIVES[name])] if name in _OBJECTIVES else []
    if without:
        blocks.append(Paragraph(f"Not supported by {', '.join(without)}."))
    blocks.append(solvers.summary_table(f"Solvers on instances of the formulation {name}", summaries))
    tables = (solvers.paired_table(rows, summaries), solvers.wins_table(rows), solvers.kinds_table(rows))
    blocks.append(formulation_charts(name, rows, grouped))
    blocks += [table for table in tables if table is not None]
    return Section(f"Formulation {name}", f"formulation-{slug(name)}", tuple(blocks))


def _instances(grouped: Grouped) -> tuple[Block, ...]:
    return (instances.table(grouped),) if grouped.instances else (Paragraph("There are no instances."),)
