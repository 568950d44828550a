"""Which values of one source serve a receiver best: greedily, beside what it knows already."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_values(
    residual: NDArray[np.float64], variance: NDArray[np.float64], width: int, most: int, least: float
) -> NDArray[np.int64]:
    """Positions of at most `most` values, each worth more than `least` when it is taken, in the order of taking.

    For B (rows, n_p·b) and K (n_p·b, n_p·b) or its diagonal. O(most · b · n_p (rows + n_p · b)).
    """
    left = residual.copy()
    moment = np.diag(variance) if variance.ndim == 1 else variance.copy()
    count = len(moment) // width
    taken: list[int] = []
    for _ in range(min(most, count)):
        blocks = moment.reshape(count, width, count, width)[np.arange(count), :, np.arange(count)]
        blocks[taken] = np.eye(width)
        worth = left.reshape(-1, count, width).swapaxes(0, 1)
        gains = np.einsum("vri,vir->v", worth, np.linalg.solve(blocks, worth.swapaxes(1, 2)))
        gains[taken] = 0.0
        best = int(gains.argmax())
        if not gains[best] > least:
            break
        columns = slice(best * width, (best + 1) * width)
        shared = np.linalg.solve(moment[columns, columns], moment[columns])
        left -= left[:, columns] @ shared
        moment -= moment[:, columns] @ shared
        taken.append(best)
    return np.array(taken, dtype=np.int64)
