"""Policy `budget`: every instance's types by measured error per byte, under one byte budget."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS, MAX_TIERS
from rq_gguf.planning.budget import ALIGNMENT, ExpertShape, plan_bytes
from rq_gguf.planning.knapsack import error_bound, hull_steps, least_error
from rq_gguf.planning.plan import Instances, LayerPlan
from rq_gguf.planning.types import rank, typical_error

GROUP_WEIGHTS = (1.9, 1.0)
"""KL divergence per unit of measured error, by group (order of format.GROUPS; only the ratio matters). The error of `down` is white over
the residual's dimensions, that of gate and up comes out through `down` in directions that matter more. Measured on two models:
1.3 to 2.5 against 0.8 to 1.2, and 2.1 to 2.8 against 1.3 to 2.1."""

_TYPICAL_GROUP_SHARE = (1 / 3, 2 / 3)  # where nothing was measured: `down` carries two thirds of the error


@dataclass(frozen=True)
class Allocation:
    layers: tuple[LayerPlan, ...]
    bytes: int
    """Tier tensors, padding and maps."""
    error: float
    """Weighted as by `error_table`."""
    bound: float
    """No allocation of these types and copies in the budget has less."""


def error_table(calibration: Calibration, types: tuple[str, ...]) -> NDArray[np.float64]:
    """Weighted error [layers, n_expert, group, type] of each expert when all its instances take a type.

    Taken from the calibration's measurements times GROUP_WEIGHTS. Where a calibration measured nothing (a plain imatrix) the table is
    each expert's share of the selections times the type's typical error; an expert that no token picked counts for half a selection,
    as it does in measuring. UserError where a type was not measured or a value is not a finite number of at least 0.
    """
    weights = np.array(GROUP_WEIGHTS)[:, None]
    selections = np.stack([layer.selections for layer in calibration.layers]).astype(np.float64)
    if not calibration.types:
        share = np.maximum(selections, 0.5) / np.maximum(selections.sum(axis=1, keepdims=True), 1)
        typical = np.array(_TYPICAL_GROUP_SHARE)[:, None] * np.array([typical_error(t) for t in types])
        return share[:, :, None, None] * weights * typical
    missing = [t for t in types if t not in calibration.types]
    if missing:
        raise UserError(
            f"the calibration of {calibration.model} measured no error for {', '.join(missing)} (it has {', '.join(calibration.types)}); "
            "calibrate again with these types, or choose others with --types"
        )
    index = [calibration.types.index(t) for t in types]
    table = np.empty((*selections.shape, len(GROUPS), len(types)))
    for i, layer in enumerate(calibration.layers):
        error = layer.error[:, :, index]
        if not (np.isfinite(error).all() and (error >= 0).all()):
            raise UserError(
                f"the calibration of {calibration.model} holds a negative or non-finite error in layer {layer.layer}; make it again"
            )
        table[i] = error * weights
    return table


def _instances(table: NDArray[np.intp], copies: NDArray[np.int64], names: tuple[str, ...]) -> Instances:
    """A layer's group from option indices [n_instances], an expert's side by side; the most precise becomes the primary."""
    rows, at = [], 0
    for count in (copies + 1).tolist():
        rows.append(tuple(sorted((names[t] for t in table[at : at + count].tolist()), key=rank, reverse=True)))
        at += count
    return tuple(rows)


def _layers(
    calibration: Calibration, choice: NDArray[np.int64], copies: NDArray[np.int64], names: tuple[tuple[str, ...], ...]
) -> tuple[LayerPlan, ...]:
    """Plans from options [instances of all layers, group]. names: [group][option] stored types."""
    ends = np.cumsum(copies.sum(axis=1) + copies.shape[1])
    parts = np.split(choice, ends[:-1])
    return tuple(
        LayerPlan(layer.layer, *(_instances(part[:, g], copies[i], names[g]) for g in range(len(GROUPS))))
        for i, (layer, part) in enumerate(zip(calibration.layers, parts, strict=True))
    )


def reserve(shape: ExpertShape, types: tuple[str, ...], copies: NDArray[np.int64]) -> int:
    """Bytes that maps and the padding of tiers take at worst. copies: [layers, n_expert]."""
    maps = sum(shape.map_bytes(int(row.max())) for row in copies)
    padding = 0
    for g in range(len(GROUPS)):
        aligned = all(shape.expert_bytes(g, t) // len(shape.rows(g)) % ALIGNMENT == 0 for t in types)
        padding += 0 if aligned else min(len(types), MAX_TIERS) * len(shape.rows(g)) * (ALIGNMENT - 1)
    return maps + len(copies) * padding


def _uniform(
    calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], table: NDArray[np.float64], budget_bytes: int, bound: float
) -> Allocation | None:
    """The best choice of one type per group for all layers, no copies: stored in logical order, so that no map is needed."""
    n_layers, n_expert = table.shape[:2]
    size = np.array([[n_layers * shape.stacked_bytes(g, t, n_expert) for t in types] for g in range(len(GROUPS))])
    error = table.sum(axis=(0, 1))
    total_size, total_error = size[0][:, None] + size[1], error[0][:, None] + error[1]
    total_error = np.where(total_size <= budget_bytes, total_error, np.inf)
    # Of equal errors the smaller file.
    pair = np.unravel_index(np.lexsort((total_size.ravel(), total_error.ravel()))[0], total_error.shape)
    if not np.isfinite(total_error[pair]):
        return None
    names = [shape.stored_type(g, types[t]) for g, t in enumerate(pair)]
    layers = tuple(LayerPlan(layer.layer, ((names[0],),) * n_expert, ((names[1],),) * n_expert) for layer in calibration.layers)
    return Allocation(layers, int(total_size[pair]), float(total_error[pair]), bound)


def allocate(
    calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], copies: NDArray[np.int64], budget_bytes: int
) -> Allocation | None:
    """The types of least weighted error for all instances within `budget_bytes`; None where even the smallest type does not fit.

    Every instance of an expert is an item with the types as options: with k instances each serves 1/k of the expert's tokens, so it
    carries 1/k of the expert's error, and errors add. Maps and padding are reserved at their worst, so the bound is hard.
    copies: [layers, n_expert].
    """
    table = error_table(calibration, types)
    names = tuple(tuple(shape.stored_type(g, t) for t in types) for g in range(len(GROUPS)))
    layer, expert = np.divmod(np.repeat(np.arange(copies.size), copies.ravel() + 1), copies.shape[1])
    instances = copies.ravel()[layer * copies.shape[1] + expert] + 1
    error = table[layer, expert] / instances[:, None, None]  # [instances, group, type]
    cost = np.array([[shape.expert_bytes(g, t) for t in types] for g in range(len(GROUPS))], dtype=np.float64)
    cost = np.broadcast_to(cost, error.shape)
    capacity = budget_bytes - reserve(shape, types, copies)

    flat_cost, flat_error = cost.reshape(-1, len(types)), error.reshape(-1, len(types))
    steps = hull_steps(flat_cost, flat_error)
    bound = error_bound(flat_cost, flat_error, steps, budget_bytes)

    best: Allocation | None = None
    while (solution := least_error(flat_cost, flat_error, steps, capacity)) is not None:
        choice = solution.reshape(-1, len(GROUPS))
        if _forbid_rarest(layer, choice, names, cost, error):
            steps = hull_steps(flat_cost, flat_error)
        else:
            plans = _layers(calibration, choice, copies, names)
            total = float(np.take_along_axis(error, choice[:, :, None], axis=2).sum())
            best = Allocation(plans, plan_bytes(shape, plans), total, bound)
            break
    if not copies.any():
        uniform = _uniform(calibration, shape, types, table, budget_bytes, bound)
        if uniform is not None and (best is None or (uniform.error, uniform.bytes) <= (best.error, best.bytes)):
            best = uniform
    return best


def _forbid_rarest(
    layer: NDArray[np.intp],
    choice: NDArray[np.int64],
    names: tuple[tuple[str, ...], ...],
    cost: NDArray[np.float64],
    error: NDArray[np.float64],
) -> bool:
    """Forbid (in `error`, in place) the rarest types of every layer and group that uses more than MAX_TIERS; True if there was one.

    The smallest type stays, so that what fitted before still fits. layer: [instances]. choice: [instances, group].
    names: [group][type] stored types. cost, error: [instances, group, type].
    """
    crowded = False
    for g, stored in enumerate(names):
        kinds = sorted(set(stored), key=rank)
        kind_of = np.array([kinds.index(name) for name in stored])
        used = np.zeros((int(layer.max()) + 1, len(kinds)), dtype=np.int64)
        np.add.at(used, (layer, kind_of[choice[:, g]]), 1)
        crowds = np.flatnonzero((used > 0).sum(axis=1) > MAX_TIERS)
        used[:, kind_of[int(cost[0, g].argmin())]] = 0
        for i in crowds:
            crowded = True
            present = np.flatnonzero(used[i])
            rarest = present[np.argsort(used[i, present], kind="stable")][: len(present) + 1 - MAX_TIERS]
            error[np.ix_(np.flatnonzero(layer == i), np.array([g]), np.flatnonzero(np.isin(kind_of, rarest)))] = np.inf
    return crowded


def least_bytes(shape: ExpertShape, types: tuple[str, ...], copies: NDArray[np.int64]) -> int:
    """The fewest bytes that these copies can take in `allocate`. copies: [layers, n_expert]."""
    instances = int(copies.sum()) + copies.size
    if not copies.any():
        per_group = (min(shape.stacked_bytes(g, t, shape.n_expert) for t in types) for g in range(len(GROUPS)))
        return len(copies) * sum(per_group)
    return instances * sum(min(shape.expert_bytes(g, t) for t in types) for g in range(len(GROUPS))) + reserve(shape, types, copies)
