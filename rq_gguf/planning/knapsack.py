"""Multiple-choice knapsack by convex hulls: every item takes one option, error is traded for cost. Pure numpy."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Steps:
    """Upgrades along the items' lower convex hulls, by error saved per unit of cost, best first.

    Steps of one item come in the order in which they must be taken.
    """

    item: NDArray[np.int64]
    """[n_steps]"""
    target: NDArray[np.int64]
    """[n_steps] the option that the item takes after the step."""
    place: NDArray[np.int64]
    """[n_steps] 0 for an item's first step, 1 for its second, ..."""
    cost: NDArray[np.float64]
    """[n_steps] added cost."""
    gain: NDArray[np.float64]
    """[n_steps] error saved."""
    slope: NDArray[np.float64]
    """[n_steps] error saved per unit of cost; never rises along an item."""


def cheapest(cost: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n] each item's option of least cost, of least error among those.

    cost, error: [n, options]; an error of infinity marks an option that the item may not take.
    """
    allowed = np.isfinite(error)
    least = np.where(allowed, cost, np.inf).min(axis=1, keepdims=True)
    return np.where(allowed & (cost == least), error, np.inf).argmin(axis=1)


def hull_steps(cost: NDArray[np.float64], error: NDArray[np.float64]) -> Steps:
    """The steps from each item's cheapest option along its lower convex hull (gift wrapping, all items at once).

    cost, error: [n, options]; an error of infinity marks an option that the item may not take. Steps that save nothing
    are part of the hull (an item whose error is zero takes more bits when nothing else wants the bytes), steps that lose are not.
    """
    rows = np.arange(len(cost))
    at = cheapest(cost, error)
    previous = np.full(len(cost), np.inf)
    parts: list[Steps] = []
    while len(rows) or not parts:
        added = cost[rows] - cost[rows, at][:, None]
        saved = error[rows, at][:, None] - error[rows]
        slope = np.where(added > 0, saved / np.where(added > 0, added, 1.0), -np.inf)
        best = slope.max(axis=1)
        # Among equal slopes the farthest option: fewer steps, and the most precise type where the error is zero.
        target = np.where(slope == best[:, None], added, -np.inf).argmax(axis=1)
        going = best >= 0
        rows, at, target, best = rows[going], at[going], target[going], best[going]
        picked = np.flatnonzero(going)
        previous = np.minimum(previous[going], best)  # rounding must not turn two steps of an item around
        place = np.full(len(rows), len(parts))
        parts.append(Steps(rows, target, place, added[picked, target], saved[picked, target], previous))
        at = target
    columns = (np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Steps))
    steps = Steps(*columns)
    order = np.argsort(-steps.slope, kind="stable")  # stable: an item's earlier steps stay first
    return Steps(*(getattr(steps, f.name)[order] for f in fields(Steps)))


def least_error(cost: NDArray[np.float64], error: NDArray[np.float64], steps: Steps, capacity: float) -> NDArray[np.int64] | None:
    """[n] options of least total error with a total cost of at most `capacity`; None if even the cheapest options cost more.

    Takes hull steps best first and skips those that no longer fit (an item that skips one stops there), so more capacity never
    gives more error: where two runs part, the richer one takes a step that saves more than all that the other can still take.
    cost, error: [n, options]; steps: their `hull_steps`.
    """
    choice = cheapest(cost, error)
    left = capacity - float(np.take_along_axis(cost, choice[:, None], axis=1).sum())
    if left < 0:
        return None
    stop = np.full(len(cost), np.iinfo(np.int64).max)  # the first step that an item cannot pay
    todo = np.arange(len(steps.cost))
    while len(todo):
        fits = int(np.searchsorted(np.cumsum(steps.cost[todo]), left, side="right"))
        taken, todo = todo[:fits], todo[fits:]
        choice[steps.item[taken]] = steps.target[taken]  # an item's last step wins: numpy assigns in order
        left -= float(steps.cost[taken].sum())
        too_large = todo[steps.cost[todo] > left]
        np.minimum.at(stop, steps.item[too_large], steps.place[too_large])
        todo = todo[steps.place[todo] < stop[steps.item[todo]]]
    return choice
