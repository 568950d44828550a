"""Layouts of the three layers for DTensor."""

from __future__ import annotations

LAYOUTS = {
    "DTensor, columns": (("column", "split", "split"), ("column", "split", "split"), ("column", "split", "whole")),
    "DTensor, rows with reduce-scatter": (
        ("row", "split", "split"),
        ("row", "split", "split"),
        ("row", "split", "whole"),
    ),
    "DTensor, rows with all-reduce": (("row", "split", "whole"), ("row", "whole", "whole"), ("row", "whole", "whole")),
    "DTensor, column, row, column": (
        ("column", "split", "split"),
        ("row", "split", "whole"),
        ("column", "whole", "whole"),
    ),
    "DTensor, row, column, row": (("row", "split", "whole"), ("column", "whole", "split"), ("row", "split", "whole")),
}
"""How the weights of each layer are split (column: ColwiseParallel, row: RowwiseParallel), how its inputs come and how
its outputs go: split along the last dimension, or whole on every worker."""
