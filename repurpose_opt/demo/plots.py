"""The pictures of the demo's report."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from repurpose_opt.demo.rows import Ours, Row
from repurpose_opt.network.trace import Network
from repurpose_opt.runtime.plan import Plan

mpl.use("Agg")
_INK, _ACCENT, _GREY = "#222222", "#b3341f", "#8a8a8a"
_COLORS = {"ours": _ACCENT, "ours_codes": "#1f5fb3"}
_LABELS = {
    "central": (4, 6),
    "direct": (6, -3),
    "partial_sums": (-62, -3),
    "sparse": (6, -3),
    "late_fusion": (-58, -3),
    "late_fusion_filled": (6, -8),
    "ours": (6, 3),
    "ours_codes": (-58, 4),
}
"""Rows drawn as points, with where their names go, in points."""


def draw_matrices(plan: Plan, dense: Network, name: str, path: Path) -> None:
    """Weights before (as they stand) and after (rows and columns in the order of their workers)."""
    count = len(plan.layers)
    figure, axes = plt.subplots(2, count, figsize=(3.2 * count, 6), constrained_layout=True)
    for index, layer in enumerate(plan.layers):
        before = dense.product(layer.name).weight.detach().abs().numpy()
        after = plan.weight(layer).abs().numpy()
        rows, columns = np.argsort(layer.owner, kind="stable"), np.argsort(layer.input_owner, kind="stable")
        bright = np.quantile(before, 0.995)
        for axis, matrix in zip(axes[:, index], (before, after[rows][:, columns]), strict=True):
            image = _block_maxima(matrix, 256)
            axis.imshow(image, aspect="auto", cmap="Greys", vmin=0, vmax=bright, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        _draw_borders(axes[1, index], layer.owner, layer.input_owner, after.shape)
        axes[0, index].set_title(f"layer {index + 1}: {before.shape[1]} → {before.shape[0]}")
    axes[0, 0].set_ylabel("dense, as it stands")
    axes[1, 0].set_ylabel(f"{name}, by worker")
    figure.suptitle("Absolute weights; each column of blocks is a worker's inputs, each row its neurons")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(rows: dict[str, Row], seeds: list[dict[str, Ours]], path: Path) -> None:
    """Accuracy against the fraction of the direct volume; `seeds` has our rows, seed by seed."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for number, seed in enumerate(seeds):
        for name, ours in seed.items():
            x, y = np.array([point for point in ours.curve if point[0] > 0]).T
            label = f"{name}, before fine-tuning" if number == 0 else None
            axis.plot(100 * x, 100 * y, "o-", color=_COLORS[name], alpha=0.8, markersize=4, label=label)
    for name, offset in _LABELS.items():
        row = rows[name]
        point = (100 * row.cost.volume_fraction, 100 * row.accuracy)
        axis.plot(*point, "s", color=_COLORS.get(name, _INK), markersize=6)
        axis.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=8)
    axis.axhline(
        100 * rows["dense"].accuracy_before_finetuning,
        color=_GREY,
        linewidth=1,
        linestyle="--",
        label="dense, as trained",
    )
    axis.plot([], [], "s", color=_INK, label="after the same fine-tuning")
    axis.set_xscale("log")
    axis.set_xlim(right=300)
    axis.set_xlabel("numbers sent a sample, % of direct")
    axis.set_ylabel("accuracy on held-out groups, %")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 85))
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_traffic(plan: Plan, path: Path) -> None:
    """Numbers a sample between each pair of workers, layer by layer: values, or numbers of codes."""
    layers = plan.layers
    most = max(1, max(int(layer.traffic().max()) // layer.value_bytes for layer in layers))
    figure, axes = plt.subplots(1, len(layers), figsize=(3 * len(layers), 3.4), constrained_layout=True)
    for index, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        numbers = layer.traffic() // layer.value_bytes
        axis.imshow(numbers, cmap="Reds", vmin=0, vmax=most)
        for source, target in np.argwhere(numbers):
            ink = "white" if numbers[source, target] > most / 2 else _INK
            axis.text(target, source, int(numbers[source, target]), ha="center", va="center", fontsize=8, color=ink)
        axis.set_title(f"before layer {index + 1}: {int(numbers.sum())} numbers", fontsize=10)
        axis.set_xlabel("to worker")
        axis.set_xticks(range(len(numbers)))
        axis.set_yticks(range(len(numbers)))
    axes[0].set_ylabel("from worker")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _block_maxima(matrix: NDArray[np.floating], most: int) -> NDArray[np.floating]:
    """The matrix at no more than `most` pixels a side; a block is as dark as its largest weight."""
    for axis in (0, 1):
        edges = np.unique(np.linspace(0, matrix.shape[axis], min(most, matrix.shape[axis]) + 1).astype(int)[:-1])
        matrix = np.maximum.reduceat(matrix, edges, axis=axis)
    return matrix


def _draw_borders(axis: Axes, owner: NDArray[np.int64], input_owner: NDArray[np.int64], shape: tuple[int, ...]) -> None:
    height, width = (min(side, 256) for side in shape)
    for border in np.cumsum(np.bincount(owner))[:-1]:
        axis.axhline(border / shape[0] * height - 0.5, color=_ACCENT, linewidth=0.5)
    for border in np.cumsum(np.bincount(input_owner))[:-1]:
        axis.axvline(border / shape[1] * width - 0.5, color=_ACCENT, linewidth=0.5)
