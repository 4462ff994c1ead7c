"""Load per expert, its imbalance, and where copies go. Load = selections: how many tokens picked an expert."""

import numpy as np
from numpy.typing import NDArray

AUTO_SHARE = 0.25
"""Automatic planning gives a layer at most this share of its experts as copies. A bound by choice: the load it plans for is the
calibration text's, every further copy evens out a smaller difference of it, and other texts keep less of that (on one model a quarter of
the experts as copies lowered LIS 1.95-fold on mixed held-out text, 1.58-fold on texts of one subject)."""


def lis(loads: NDArray[np.floating] | NDArray[np.integer], n_logical: int) -> float:
    """Load imbalance score of a layer: `n_logical x max load / sum of loads`, 1 is perfect (Replicate-and-Quantize, arXiv 2602.19938).

    loads: [n_phys] per physical expert; without copies n_phys = n_logical. The mean stays over the logical experts, so that copies
    lower the score by what they take from the busiest. A layer that served nothing is balanced.
    """
    total = float(loads.sum())
    return n_logical * float(loads.max()) / total if total > 0 else 1.0


def split_load(load: NDArray[np.floating] | NDArray[np.integer], copies: NDArray[np.integer]) -> NDArray[np.float64]:
    """[n_phys] load of every instance, an expert's instances side by side, each with the same part of its load (dispatch `balanced`).

    load, copies: [n_expert]; copies counts instances beyond the primary.
    """
    instances = np.asarray(copies) + 1
    return np.repeat(np.asarray(load, dtype=np.float64) / instances, instances)


def copy_order(selections: NDArray[np.integer], most: int) -> NDArray[np.int64]:
    """[layers, most] the expert that gets the 1st, 2nd, ... copy: always argmax load / instances (DeepSeek EPLB, replicate_experts).

    The lowest expert wins a tie. Nested: the first n are the choice of n copies. selections: [layers, n_expert].
    """
    load = np.asarray(selections, dtype=np.float64)
    instances, rows = np.ones(load.shape, dtype=np.int64), np.arange(len(load))
    order = np.empty((len(load), most), dtype=np.int64)
    for placed in range(most):
        order[:, placed] = (load / instances).argmax(axis=1)
        instances[rows, order[:, placed]] += 1
    return order


def place_copies(order: NDArray[np.integer], n: NDArray[np.integer], n_expert: int) -> NDArray[np.int64]:
    """Copies per expert, int64 [layers, n_expert]: the first n of each layer's `copy_order`. order: [layers, most]. n: [layers]."""
    copies = np.zeros((len(order), n_expert), dtype=np.int64)
    layer, placed = np.nonzero(np.arange(order.shape[1]) < np.asarray(n)[:, None])
    np.add.at(copies, (layer, order[layer, placed]), 1)
    return copies


def lis_curve(selections: NDArray[np.integer], order: NDArray[np.integer]) -> NDArray[np.float64]:
    """[layers, most + 1] LIS of each layer after 0, 1, ..., `most` copies. selections: [layers, n_expert]. order: their `copy_order`."""
    load = np.asarray(selections, dtype=np.float64)
    instances, rows = np.ones(load.shape, dtype=np.int64), np.arange(len(load))
    total = load.sum(axis=1)
    curve = np.ones((len(load), order.shape[1] + 1))
    for placed in range(order.shape[1] + 1):
        busiest = (load / instances).max(axis=1)
        curve[:, placed] = np.where(total > 0, load.shape[1] * busiest / np.where(total > 0, total, 1), 1.0)
        if placed < order.shape[1]:
            instances[rows, order[:, placed]] += 1
    return curve
