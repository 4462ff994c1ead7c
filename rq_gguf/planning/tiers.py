"""Which few types a layer and matrix group may use: the best subsets at a given price per byte. Pure numpy."""

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_SUBSETS = 512
"""All subsets are tried where there are at most so many; otherwise those of the types that are hardest to do without."""


def best_subsets(values: Floats, most: int, total: Callable[[Floats], Floats]) -> tuple[Floats, NDArray[np.bool_], bool]:
    """The best `most` types of every row in each of its states.

    values: [types, rows, items] what each item costs by type; an item takes the cheapest type of the subset.
    total: [rows, items] -> [rows, states], what a row costs in each state, given what its items cost.
    Returns the least totals [rows, states], the subsets [types, rows, states], and whether all subsets were tried.
    """
    kept = len(values)
    while comb(kept, most) > MOST_SUBSETS:
        kept -= 1
    exact = kept == len(values)
    kinds = np.broadcast_to(np.arange(kept)[:, None], (kept, values.shape[1])) if exact else _hardest_to_drop(values, kept)
    tried = values if exact else np.take_along_axis(values, kinds[:, :, None], axis=0)

    subsets = np.array(list(combinations(range(kept), most)))
    stack: list[Floats] = []  # the items' least cost over the first one, two, ... types of the subset
    best = total(tried[subsets[0]].min(axis=0))
    chosen = np.zeros(best.shape, dtype=np.intp)
    for i, subset in enumerate(subsets):
        shared = int((subset != subsets[i - 1]).argmax()) if i else 0
        del stack[shared:]
        for t in subset[shared:]:
            stack.append(np.minimum(stack[-1], tried[t]) if stack else tried[t])
        found = total(stack[-1])
        chosen[found < best] = i
        np.minimum(best, found, out=best)
    allowed = np.zeros((len(values), *best.shape), dtype=np.bool_)
    rows, states = np.indices(best.shape)
    for place in range(most):
        allowed[kinds[subsets[chosen, place], rows], rows, states] = True
    return best, allowed, exact


def _hardest_to_drop(values: Floats, keep: int) -> NDArray[np.intp]:
    """[keep, rows] types that remain when, one after the other, the type whose absence costs least is dropped. values: as above."""
    values = values.copy()
    alive = np.ones(values.shape[:2], dtype=np.bool_)
    rows = np.arange(values.shape[1])
    for _ in range(len(values) - keep):
        best = values.argmin(axis=0)
        two = np.partition(values, 1, axis=0)
        loss = np.where(alive, 0.0, np.inf)
        np.add.at(loss, (best, rows[:, None]), two[1] - two[0])
        dropped = loss.argmin(axis=0)
        alive[dropped, rows] = False
        values[dropped, rows] = np.inf
    return np.nonzero(alive.T)[1].reshape(-1, keep).T
