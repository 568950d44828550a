"""How the lines of a chart are told apart: by colour, dashes and marker, never by colour alone."""

from __future__ import annotations

# Of Okabe and Ito, without yellow, some darker to stand out on white; then the ink itself.
COLORS = ("#0072b2", "#d55e00", "#007f5f", "#b0478f", "#b07400", "#2a93d5", "#222222")
DASHES = ((), (6, 2), (2, 2), (7, 2, 2, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""As matplotlib names them."""


def color(series: int) -> int:
    return series % len(COLORS)


def dashes(series: int) -> tuple[int, ...]:
    return DASHES[(series + series // len(COLORS)) % len(DASHES)]


def marker(series: int) -> str:
    return MARKERS[series % len(MARKERS)]


def marked(count: int, series: int) -> range:
    """Which of a curve's points carry its marker: about five, at other places for other series."""
    stride = max(1, count // 5)
    return range(series % stride, count, stride)
