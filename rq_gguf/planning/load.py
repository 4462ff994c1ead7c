"""Load per expert, its imbalance, and where copies go. Load = selections: how many tokens picked an expert."""

import numpy as np
from numpy.typing import NDArray

from rq_gguf.planning.knapsack import hull_steps

AUTO_SHARE = 0.25
"""`auto` gives a layer at most this share of its experts as copies."""
AUTO_ELASTICITY = 0.5
"""`auto` stops where growing a layer by 1 % no longer lowers its LIS by at least this many per cent."""


def lis(loads: NDArray[np.floating] | NDArray[np.integer], n_logical: int) -> float:
    """Load imbalance score of a layer: `n_logical x max load / sum of loads`, 1 is perfect (Replicate-and-Quantize, arXiv 2602.19938).

    loads: [n_phys] per physical expert; without copies n_phys = n_logical. The mean stays over the logical experts, so that copies
    lower the score by what they take from the busiest. A layer that served nothing is balanced.
    """
    total = float(loads.sum())
    return n_logical * float(loads.max()) / total if total > 0 else 1.0


def split_load(selections: NDArray[np.integer], copies: NDArray[np.integer]) -> NDArray[np.float64]:
    """[n_phys] load of every instance, an expert's instances side by side, each with the same part of its load (dispatch `balanced`).

    selections, copies: [n_expert]; copies counts instances beyond the primary.
    """
    instances = np.asarray(copies) + 1
    return np.repeat(np.asarray(selections, dtype=np.float64) / instances, instances)


def place_copies(selections: NDArray[np.integer], n: NDArray[np.integer]) -> NDArray[np.int64]:
    """Copies per expert, int64 [layers, n_expert]: the next copy always goes to argmax load / instances (DeepSeek EPLB, replicate_experts).

    selections: [layers, n_expert]. n: [layers] copies to place. The lowest expert wins a tie.
    """
    load = np.asarray(selections, dtype=np.float64)
    instances = np.ones(load.shape, dtype=np.int64)
    for placed in range(int(np.max(n, initial=0))):
        rows = np.flatnonzero(np.asarray(n) > placed)
        instances[rows, (load[rows] / instances[rows]).argmax(axis=1)] += 1
    return instances - 1


def lis_curve(selections: NDArray[np.integer], most: int) -> NDArray[np.float64]:
    """[layers, most + 1] LIS of each layer after 0, 1, ..., `most` copies placed by `place_copies`. selections: [layers, n_expert]."""
    load = np.asarray(selections, dtype=np.float64)
    instances = np.ones(load.shape, dtype=np.int64)
    total, rows = load.sum(axis=1), np.arange(len(load))
    curve = np.ones((len(load), most + 1))
    for placed in range(most + 1):
        each = load / instances
        busiest = each.argmax(axis=1)
        curve[:, placed] = np.where(total > 0, load.shape[1] * each[rows, busiest] / np.where(total > 0, total, 1), 1.0)
        instances[rows, busiest] += 1
    return curve


def choose_copies(selections: NDArray[np.integer], most: int) -> NDArray[np.int64]:
    """[layers] how many copies each layer gets under `auto`, at most `most` in all.

    Layers compete by LIS saved per copy (as CRAFT does, arXiv 2603.28768); experts of all layers have the same bytes, so this is LIS
    saved per byte. Where k experts share the maximum a single copy saves nothing and k save something: each layer therefore moves
    along the lower convex hull of its curve, whose steps span such plateaus. A layer stops at AUTO_SHARE of its experts, and before
    a step that lowers its LIS by less than AUTO_ELASTICITY / n_expert per copy (relative): below that, copies cost more bytes
    than balance they bring, and what the calibration text promises is less than its distance from other texts.
    selections: [layers, n_expert].
    """
    n_layers, n_expert = selections.shape
    curve = lis_curve(selections, int(n_expert * AUTO_SHARE))
    steps = hull_steps(np.broadcast_to(np.arange(curve.shape[1], dtype=np.float64), curve.shape), curve)
    chosen = np.zeros(n_layers, dtype=np.int64)
    stopped = np.zeros(n_layers, dtype=bool)
    left = most
    for layer, target, cost, slope in zip(steps.item, steps.target, steps.cost.astype(np.int64), steps.slope, strict=True):
        worth = slope >= AUTO_ELASTICITY / n_expert * curve[layer, chosen[layer]] and slope > 0
        if stopped[layer] or cost > left or not worth:
            stopped[layer] = True
            continue
        chosen[layer] = target
        left -= cost
    return chosen
