"""From a calibration and a user's choices to a plan: budget, copies, types, and the figures to expect."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.planning.allocate import Allocation, allocate, error_table, least_bytes
from rq_gguf.planning.budget import ExpertShape, expert_shape, parse_budget, plan_bytes, uniform_bytes
from rq_gguf.planning.load import choose_copies, lis, place_copies, split_load
from rq_gguf.planning.paper import paper_layers, paper_least
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.planning.types import TYPES, rank

POLICIES = ("budget", "paper")
AUTO = "auto"
AUTO_BUDGET_SHARE = 0.5
"""`auto` spends at most this part of what the budget leaves above the smallest type on copies; the rest is precision."""


def parse_replicas(text: str, policy: str) -> str | int:
    """A user's `--replicas`: `auto` or copies per layer. UserError for anything else, and for what `paper` does not know."""
    replicas: str | int = AUTO
    if text.strip().lower() != AUTO:
        if not text.strip().isdecimal():
            raise UserError(f"--replicas {text!r} is not understood; give auto or a number of copies per layer")
        replicas = int(text)
    if policy == "paper" and replicas not in (AUTO, 1):
        raise UserError(f"--policy paper makes exactly one copy per layer; --replicas {text} needs --policy budget")
    return replicas


def make_plan(
    calibration: Calibration,
    *,
    budget: str,
    types: tuple[str, ...],
    replicas: str | int,
    policy: str,
    other_bytes: int,
    calibration_sha256: str,
) -> Plan:
    """Choose copies and types of every layer under the budget.

    budget: as the user gave it (see budget.parse_budget). types: from few bits to many. replicas: `auto` or copies per layer.
    other_bytes: all of the file but tiers, padding and maps; counts where the budget is a size.
    Raises UserError where the budget cannot be met (with the least possible) or the calibration lacks what the policy needs.
    """
    if not calibration.layers:
        raise UserError(f"the calibration of {calibration.model} holds no layer with routed experts")
    spec, shape, n_layers = parse_budget(budget), expert_shape(calibration), len(calibration.layers)
    allowed = spec.expert_bytes(shape, n_layers, other_bytes)
    if policy == "paper":
        layers = paper_layers(calibration, shape, types, allowed)
        if layers is None:
            why = f"one copy per layer in {types[0]}, all but the busiest expert lowered"
            raise spec.too_small(paper_least(calibration, shape, types), shape, n_layers, other_bytes, why)
        bound = None
    elif policy == "budget":
        allocation, copies = _allocate(calibration, shape, types, replicas, allowed)
        if allocation is None:
            with_copies = f" and {replicas} copies per layer" if copies.any() else ""
            raise spec.too_small(least_bytes(shape, types, copies), shape, n_layers, other_bytes, f"all experts in {types[0]}{with_copies}")
        layers, bound = allocation.layers, allocation.bound
    else:
        raise UserError(f"--policy {policy} is unknown; choose {' or '.join(POLICIES)}")
    plan = Plan(
        policy=policy,
        budget=budget,
        budget_bytes=allowed,
        expert_bytes=plan_bytes(shape, layers),
        types=stored_types(shape, types, layers),
        layers=layers,
        calibration_sha256=calibration_sha256,
        calibration_tokens=calibration.n_tokens,
        model=calibration.model,
    )
    return replace(plan, summary=summarize(calibration, plan, bound))


def _allocate(
    calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], replicas: str | int, allowed: int
) -> tuple[Allocation | None, NDArray[np.int64]]:
    """The allocation and its copies [layers, n_expert]."""
    selections = np.stack([layer.selections for layer in calibration.layers])
    none = np.zeros(selections.shape, dtype=np.int64)
    if replicas != AUTO:
        if int(replicas) > shape.n_expert:
            raise UserError(f"--replicas {replicas} is more than the {shape.n_expert} experts of a layer")
        copies = place_copies(selections, np.full(len(selections), int(replicas)))
        return allocate(calibration, shape, types, copies, allowed), copies
    copy_bytes = sum(min(shape.expert_bytes(g, t) for t in types) for g in range(len(GROUPS)))
    spare = AUTO_BUDGET_SHARE * (allowed - least_bytes(shape, types, none))
    copies = place_copies(selections, choose_copies(selections, max(0, int(spare // copy_bytes))))
    allocation = allocate(calibration, shape, types, copies, allowed)
    if allocation is None and copies.any():  # a tiny model, whose maps take what was meant for copies
        copies, allocation = none, allocate(calibration, shape, types, none, allowed)
    return allocation, copies


def stored_types(shape: ExpertShape, types: tuple[str, ...], layers: tuple[LayerPlan, ...]) -> tuple[str, ...]:
    """All types that the file may hold, from few bits to many: the allowed ones (their fallbacks, where rows do not fit) and the used."""
    names = {shape.stored_type(g, t) for t in types for g in range(len(GROUPS))}
    names |= {t for layer in layers for group in layer.groups for row in group for t in row}
    return tuple(sorted(names, key=rank))


def plan_errors(calibration: Calibration, shape: ExpertShape, layers: tuple[LayerPlan, ...]) -> NDArray[np.float64] | None:
    """[layers] weighted error (see allocate.error_table) of planned layers; None where a type of theirs was not measured."""
    types = calibration.types or TYPES
    column = [{shape.stored_type(g, t): i for i, t in enumerate(types)} | {t: i for i, t in enumerate(types)} for g in range(len(GROUPS))]
    if any(t not in column[g] for layer in layers for g, group in enumerate(layer.groups) for row in group for t in row):
        return None
    table = error_table(calibration, types)
    return np.array([
        sum(
            table[i, e, g, column[g][t]] / len(row)
            for g, group in enumerate(layer.groups)
            for e, row in enumerate(group)
            for t in row
        )
        for i, layer in enumerate(layers)
    ])  # fmt: skip


def _one_type(calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], allowed: int) -> dict[str, Any] | None:
    """The type with which all experts alike have the least error in the same bytes; None where none fits."""
    known = tuple(t for t in types if not calibration.types or t in calibration.types)
    if not known:
        return None
    error = error_table(calibration, known).sum(axis=(0, 1, 2))
    size = [uniform_bytes(shape, len(calibration.layers), t) for t in known]
    fitting = [i for i in range(len(known)) if size[i] <= allowed]
    if not fitting:
        return None
    best = min(fitting, key=lambda i: (error[i], size[i]))
    return {"type": known[best], "bytes": size[best], "error": float(error[best])}


def summarize(calibration: Calibration, plan: Plan, bound: float | None = None) -> dict[str, Any]:
    """The figures to expect of a plan, for people: plain numbers and strings only.

    `lis_before` and `lis_after` are means over layers, `lis_reduction` is the mean of the layers' ratios. They are those of the
    calibration text itself; another text's busy experts are others, so what is measured on it is less.
    bound: no plan with these copies and types has less error (policy `budget`).
    """
    shape = expert_shape(calibration)
    errors = plan_errors(calibration, shape, plan.layers)
    rows: list[dict[str, Any]] = []
    for i, (layer, planned) in enumerate(zip(calibration.layers, plan.layers, strict=True)):
        after = lis(split_load(layer.selections, np.array(planned.copies)), layer.n_expert)
        rows.append({
            "layer": layer.layer,
            "lis_before": lis(layer.selections, layer.n_expert),
            "lis_after": after,
            "copies": sum(planned.copies),
            "error": None if errors is None else float(errors[i]),
        })  # fmt: skip
    before, after = (float(np.mean([row[key] for row in rows])) for key in ("lis_before", "lis_after"))
    worst = max(rows, key=lambda row: row["lis_after"])
    error = None if errors is None else float(errors.sum())
    gap = (error - bound) / bound if error is not None and bound is not None and bound > 0 else None
    weights = len(plan.layers) * shape.n_expert * shape.weights
    used = [Counter(t for layer in plan.layers for row in layer.groups[g] for t in row) for g in range(len(GROUPS))]
    return {
        "lis_before": before,
        "lis_after": after,
        "lis_reduction": float(np.mean([row["lis_before"] / row["lis_after"] for row in rows])),
        "worst_layer": {key: worst[key] for key in ("layer", "lis_before", "lis_after")},
        "copies": sum(row["copies"] for row in rows),
        "expert_bytes": plan.expert_bytes,
        "budget_bytes": plan.budget_bytes,
        "bits_per_expert_weight": 8 * plan.expert_bytes / weights,
        "error": error,
        "error_gap_to_bound": gap,
        "one_type": _one_type(calibration, shape, plan.types, plan.budget_bytes),
        "instances_by_type": {name: {t: count[t] for t in sorted(count, key=rank)} for name, count in zip(GROUPS, used, strict=True)},
        "layers": rows,
    }
