"""From a calibration and a user's choices to a plan: budget, copies, types, and the figures to expect."""

import math
from dataclasses import replace

import numpy as np

from rq_gguf import defaults
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS, MAX_TIERS
from rq_gguf.planning.allocate import Allocation, Goal, allocate, least_bytes, least_kld, min_bytes
from rq_gguf.planning.budget import ExpertShape, expert_shape, parse_budget, plan_bytes
from rq_gguf.planning.paper import paper_layers, paper_least
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.planning.summary import summarize
from rq_gguf.types import rank

POLICIES = ("budget", "paper")
AUTO = "auto"


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


def parse_max_tiers(text: str | None, policy: str) -> int:
    """A user's `--max-tiers`, None where the user named none. UserError for what is no number from 1 to 7, and beside `paper`."""
    if text is None:
        return defaults.MAX_TIERS
    if not text.strip().isdecimal() or not 1 <= int(text) <= MAX_TIERS:
        raise UserError(f"--max-tiers {text!r} is not understood; give a number of types per layer and matrix from 1 to {MAX_TIERS}")
    if policy == "paper":
        raise UserError("--policy paper has two types in every layer; --max-tiers needs --policy budget")
    return int(text)


def parse_balance_weight(text: str | None, policy: str, replicas: str | int) -> float:
    """A user's `--balance-weight`, None where the user named none. UserError for what is no number of at least 0, and where something
    else decides on copies."""
    if text is None:
        return defaults.BALANCE_WEIGHT
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(
            f"--balance-weight {text!r} is not understood; give the per cents of KL divergence that a per cent less imbalance is worth, "
            "0 or more"
        )
    if policy == "paper":
        raise UserError("--policy paper makes exactly one copy per layer; --balance-weight needs --policy budget")
    if replicas != AUTO:
        raise UserError(f"--balance-weight and --replicas {replicas} exclude each other: a number fixes the copies")
    return weight


def parse_target_kld(text: str) -> float:
    """A user's `--target-kld`: nats. UserError for what is no number above 0."""
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not 0 < target < math.inf:
        raise UserError(f"--target-kld {text!r} is not understood; give a mean KL divergence in nats such as 0.005")
    return target


def make_plan(
    calibration: Calibration,
    *,
    budget: str | None,
    types: tuple[str, ...],
    replicas: str | int,
    policy: str,
    other_bytes: int,
    calibration_sha256: str,
    max_tiers: int = defaults.MAX_TIERS,
    balance_weight: float = defaults.BALANCE_WEIGHT,
    target_kld: float | None = None,
    other_kld: float = 0.0,
) -> Plan:
    """Choose copies and types of every layer: the best under a budget, or the smallest for a target.

    budget: as the user gave it (see budget.parse_budget); not looked at where there is a target. types: from few bits to many.
    replicas: `auto` or copies per layer. other_bytes: all of the file but tiers, padding and maps; counts where the budget is a size.
    max_tiers: most types in a layer and matrix group. balance_weight: see allocate.Goal; for `auto`. target_kld: most nats of predicted
    KL divergence; other_kld: what of it the rest of the file causes.
    Raises UserError where the budget or the target cannot be met (with the least possible) or the calibration lacks what the policy needs.
    """
    if not calibration.layers:
        raise UserError(f"the calibration of {calibration.model} holds no layer with routed experts")
    if policy not in POLICIES:
        raise UserError(f"--policy {policy} is unknown; choose {' or '.join(POLICIES)}")
    shape = expert_shape(calibration)
    if policy == "paper":
        if target_kld is not None or budget is None:
            raise UserError("--policy paper looks at no error; --target-kld needs --policy budget")
        layers, allowed = _paper(calibration, shape, types, budget, other_bytes)
        plan = _plan(calibration, shape, policy, budget, allowed, types, layers, calibration_sha256)
        return replace(plan, summary=summarize(calibration, plan))
    if replicas != AUTO and int(replicas) > shape.n_expert:
        raise UserError(f"--replicas {replicas} is more than the {shape.n_expert} experts of a layer")
    weight = balance_weight if replicas == AUTO else None
    goal = Goal(types, max_tiers, None if replicas == AUTO else int(replicas), weight or 0.0)
    if target_kld is not None:
        found = _for_target(calibration, shape, goal, target_kld, other_kld)
        text, allowed = f"target-kld {target_kld:g}", found.bytes
    elif budget is not None:
        found, allowed = _for_budget(calibration, shape, goal, budget, other_bytes)
        text = budget
    else:
        raise UserError("there is neither a budget nor a target to plan for; give --budget or --target-kld")
    plan = replace(
        _plan(calibration, shape, policy, text, allowed, types, found.layers, calibration_sha256),
        feedback=all(layer.moments is not None for layer in calibration.layers),
        max_tiers=max_tiers,
        balance_weight=weight,
        target_kld=None if target_kld is None else target_kld - other_kld,
        optimum=found.optimum,
    )
    return replace(plan, summary=summarize(calibration, plan))


def _plan(
    calibration: Calibration,
    shape: ExpertShape,
    policy: str,
    budget: str,
    allowed: int,
    types: tuple[str, ...],
    layers: tuple[LayerPlan, ...],
    calibration_sha256: str,
) -> Plan:
    return Plan(
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


def _paper(
    calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], budget: str, other_bytes: int
) -> tuple[tuple[LayerPlan, ...], int]:
    """The paper's layers and the bytes that the budget allows them."""
    spec, n_layers = parse_budget(budget), len(calibration.layers)
    allowed = spec.expert_bytes(shape, n_layers, other_bytes)
    layers = paper_layers(calibration, shape, types, allowed)
    if layers is None:
        why = f"one copy per layer in {types[0]}, all but the busiest expert lowered"
        raise spec.too_small(paper_least(calibration, shape, types), shape, n_layers, other_bytes, why)
    return layers, allowed


def _for_budget(calibration: Calibration, shape: ExpertShape, goal: Goal, budget: str, other_bytes: int) -> tuple[Allocation, int]:
    """The best allocation and the bytes that the budget allows it."""
    spec, n_layers = parse_budget(budget), len(calibration.layers)
    allowed = spec.expert_bytes(shape, n_layers, other_bytes)
    found = allocate(calibration, shape, goal, allowed)
    if found is None:
        with_copies = f" and {goal.replicas} copies per layer" if goal.replicas else ""
        least = least_bytes(shape, goal, np.stack([layer.selections for layer in calibration.layers]))
        raise spec.too_small(least, shape, n_layers, other_bytes, f"all experts in {goal.types[0]}{with_copies}")
    return found, allowed


def _for_target(calibration: Calibration, shape: ExpertShape, goal: Goal, target: float, other_kld: float) -> Allocation:
    """The smallest allocation that meets the target."""
    found = min_bytes(calibration, shape, goal, target - other_kld)
    if found is None:
        least = least_kld(calibration, shape, goal)
        parts = f"{least:.3g} of experts, all as precise as {', '.join(goal.types)} allow"
        parts += f"; {other_kld:.3g} of all else" if other_kld else ""
        raise UserError(f"--target-kld {target:g} cannot be met: the least possible is {_round_up(least + other_kld)} ({parts})")
    return found


def _round_up(value: float) -> str:
    """A number in four digits that is no less."""
    digits = 4 - math.ceil(math.log10(value)) if value > 0 else 0
    return f"{math.ceil(value * 10**digits) / 10**digits:.{max(digits, 0)}f}"


def stored_types(shape: ExpertShape, types: tuple[str, ...], layers: tuple[LayerPlan, ...]) -> tuple[str, ...]:
    """All types that the file may hold, from few bits to many: the allowed ones (their fallbacks, where rows do not fit) and the used."""
    names = {shape.stored_type(g, t) for t in types for g in range(len(GROUPS))}
    names |= {t for layer in layers for group in layer.groups for row in group for t in row}
    return tuple(sorted(names, key=rank))
