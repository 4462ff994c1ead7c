"""Policy `budget`: copies of experts and types of all their instances, by predicted KL divergence and balance per byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rq_gguf.calibration.data import Calibration
from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ExpertShape
from rq_gguf.planning.fill import Candidate, Planner, map_bytes
from rq_gguf.planning.knapsack import hull_steps, least_error
from rq_gguf.planning.lagrange import Floats, Ints, Relaxed, Search, relax, search
from rq_gguf.planning.load import AUTO_SHARE, copy_order
from rq_gguf.planning.plan import LayerPlan, Optimum

KLD_FLOOR = 0.001
"""Nats of KL divergence that nobody can tell: what Q8_0 in all other tensors alone leaves is 0.0006 to 0.0018 on two models. The exchange
rate of error and balance counts per cents of predicted KLD + KLD_FLOOR, so that a little error is not dear where there is hardly any."""
_ROUNDS = 8
_ROUND_TOLERANCE = 0.005
_WORTH_MORE = 0.001  # relative gap above which another plan is tried


@dataclass(frozen=True)
class Goal:
    """What bytes may buy."""

    types: tuple[str, ...]
    """From few bits to many."""
    max_tiers: int
    """Most types in a layer and matrix group."""
    replicas: int | None
    """Copies per layer; None where `balance_weight` decides."""
    balance_weight: float
    """Per cents by which predicted KLD + KLD_FLOOR may rise for each per cent by which LIS falls (geometric mean over layers)."""


@dataclass(frozen=True)
class Allocation:
    layers: tuple[LayerPlan, ...]
    bytes: int
    """Tier tensors, padding and maps."""
    kld: float
    """Predicted, see error.ErrorModel."""
    optimum: Optimum


def allocate(calibration: Calibration, shape: ExpertShape, goal: Goal, budget_bytes: int) -> Allocation | None:
    """The plan of least predicted KLD, balance counted in, within `budget_bytes`; None where even the smallest type does not fit.

    ln(KLD + KLD_FLOOR) + balance_weight x (mean over layers of ln LIS) is what is to be least. Neither KLD (error.ErrorModel) nor its
    logarithm is a sum over layers, but both are concave, so their tangent takes their place, slope x error + balance_price x (sum over
    layers of ln LIS), and is moved to what was found until both agree. It lies above the true figure everywhere, so that every round can
    only gain. The bound is that of the tangent at the plan returned.
    LIS is that of the calibration text. It promises more than other texts keep (their busy experts are others), hence AUTO_SHARE.
    UserError where the calibration lacks a type's error.
    """
    selections = np.stack([layer.selections for layer in calibration.layers])
    if budget_bytes < least_bytes(shape, goal, selections):
        return None
    planner = _planner(calibration, shape, goal)
    within = max(budget_bytes - planner.most_padding, planner.market.least_bytes)
    uniform = planner.uniform(budget_bytes, math.inf)
    assert uniform is not None  # the fewest bytes are those of one type

    def excess(relaxed: Relaxed) -> float:
        return math.log(relaxed.bytes / within)

    def tangent_at(error: Floats) -> _Tangent:
        return _tangent(planner, goal, error, planner.model.kld(error))

    def value(c: Candidate) -> tuple[float, int]:
        return math.log(c.kld + KLD_FLOOR) + goal.balance_weight * planner.log_lis(c.copies) / planner.n_layers, c.bytes

    def prove(c: Candidate) -> Optimum:
        return _prove(planner, tangent_at(c.error), excess, found, lambda bound, price: bound - price * budget_bytes)

    found, tangent = _settle(planner, tangent_at, excess, uniform.error)
    spent = [planner.spend(end, tangent.slope, budget_bytes) for end in found.ends]
    best = min((c for c in (uniform, *spent) if c is not None), key=value)
    optimum = prove(best)
    gap = best.kld + optimum.balance_price * planner.log_lis(best.copies) - (optimum.bound - optimum.price * budget_bytes)
    if gap > _WORTH_MORE * best.kld and (mixed := _mixed(planner, found, tangent, within)) is not None:
        another = planner.spend(mixed, tangent.slope, budget_bytes)
        if another is not None and value(another) < value(best):
            best, optimum = another, prove(another)
    return Allocation(planner.plans(best), best.bytes, best.kld, optimum)


def min_bytes(calibration: Calibration, shape: ExpertShape, goal: Goal, target_kld: float) -> Allocation | None:
    """The plan of fewest bytes whose predicted KLD is at most `target_kld`; None where no plan of these types is that good.

    The least budget, that is, at which `allocate` would meet the target: the KLD there is known, and with it the price of balance.
    UserError where the calibration lacks a type's error.
    """
    planner = _planner(calibration, shape, goal)
    finest = _finest(planner)
    if planner.model.kld(finest) > target_kld * (1 + 1e-9):
        return None
    most = target_kld * (1 + 2e-9)  # rounding
    uniform = planner.uniform(math.inf, most)

    def excess(relaxed: Relaxed) -> float:
        kld = planner.model.kld(relaxed.error)
        if kld <= 0:
            return math.inf
        return math.log(most / kld) if most > 0 else -math.inf

    def tangent_at(error: Floats) -> _Tangent:
        return _tangent(planner, goal, error, target_kld)

    found, tangent = _settle(planner, tangent_at, excess, finest if uniform is None else uniform.error)
    saved = [_save(planner, end, tangent_at, tangent, most) for end in found.ends]
    price = found.ends[0].price

    def value(c: Candidate) -> tuple[float, int, float]:
        return price * c.bytes + tangent.balance_price * planner.log_lis(c.copies), c.bytes, c.kld

    best = min((c for c in (uniform, *saved) if c is not None), key=value)
    balance = tangent.balance_price * planner.log_lis(best.copies)
    optimum = _prove(
        planner,
        tangent_at(best.error),
        excess,
        found,
        lambda bound, price: (bound - target_kld - balance) / price if price > 0 else -math.inf,
    )
    return Allocation(planner.plans(best), best.bytes, best.kld, optimum)


def least_kld(calibration: Calibration, shape: ExpertShape, goal: Goal) -> float:
    """The least predicted KLD that bytes can buy."""
    planner = _planner(calibration, shape, goal)
    return planner.model.kld(_finest(planner))


def least_bytes(shape: ExpertShape, goal: Goal, selections: Ints) -> int:
    """The fewest bytes that any plan takes. selections: [layers, n_expert]."""
    copies = goal.replicas or 0
    size = sum(min(shape.stacked_bytes(g, t, shape.n_expert + copies) for t in goal.types) for g in range(len(GROUPS)))
    maps = map_bytes(shape, copy_order(selections, copies))[:, -1].sum() if copies else 0
    return len(selections) * size + int(maps)


def _planner(calibration: Calibration, shape: ExpertShape, goal: Goal) -> Planner:
    most = goal.replicas if goal.replicas is not None else int(shape.n_expert * AUTO_SHARE) if goal.balance_weight > 0 else 0
    return Planner(calibration, shape, goal.types, goal.max_tiers, goal.replicas or 0, most)


def _finest(planner: Planner) -> Floats:
    """[layers, group] the least errors that the types and tiers allow."""
    return relax(planner.market.sloped(np.ones_like(planner.market.slope)), 0.0, 0.0).error


@dataclass(frozen=True)
class _Tangent:
    """KLD <= constant + sum of slope x error, and ln(KLD + KLD_FLOOR) likewise, with equality where they touch."""

    slope: Floats
    """[layers, group] nats per unit of error."""
    constant: float
    balance_price: float
    """Nats per unit of ln LIS of a layer."""


def _tangent(planner: Planner, goal: Goal, error: Floats, kld: float) -> _Tangent:
    """Where the errors are `error` [layers, group]. kld: that of the plan wanted, for the price of balance."""
    slope, constant = planner.model.tangent(error)
    return _Tangent(slope, constant, goal.balance_weight * (kld + KLD_FLOOR) / planner.n_layers)


def _settle(
    planner: Planner, tangent_at: Callable[[Floats], _Tangent], excess: Callable[[Relaxed], float], error: Floats
) -> tuple[Search, _Tangent]:
    """The tangent that agrees with the errors it leads to, and the search on it. error: [layers, group] to begin with."""
    market, model = planner.market, planner.model
    wide = replace(market, max_tiers=max(len(names) for names in planner.names))
    # First without copies, then without a limit on tiers: quicker, and copies start from what they have to be worth.
    stages = [wide.without_copies()] if market.order.shape[1] > market.least else []
    stages += [wide, market] if market.max_tiers < wide.max_tiers else [market]
    start = None
    for stage in stages:
        for _ in range(_ROUNDS):
            tangent = tangent_at(error)
            found = search(stage.sloped(tangent.slope), tangent.balance_price, excess, start=start, tolerance=_ROUND_TOLERANCE)
            start = found.ends[0].price or None
            before, error = model.kld(error), _between(found, excess)
            kld = model.kld(error)
            off = max(tangent.constant + float((tangent.slope * error).sum()) - kld, 0.0)
            if off <= _ROUND_TOLERANCE * kld and abs(kld - before) <= _ROUND_TOLERANCE * (kld + KLD_FLOOR):
                break
    tangent = tangent_at(error)
    return search(market.sloped(tangent.slope), tangent.balance_price, excess, start=start), tangent


def _between(found: Search, excess: Callable[[Relaxed], float]) -> Floats:
    """[layers, group] errors at the price where `excess` is 0, between the two ends of a search."""
    if found.low is None or found.high is None:
        return found.ends[0].error
    over, under = excess(found.low), -excess(found.high)
    part = under / (over + under) if math.isfinite(over) and math.isfinite(under) else 0.0
    return found.high.error + part * (found.low.error - found.high.error)


def _save(planner: Planner, end: Relaxed, tangent_at: Callable[[Floats], _Tangent], tangent: _Tangent, target: float) -> Candidate | None:
    """The fewest bytes that an end's copies and types need for a KLD of at most `target`; None where they cannot reach it."""
    best = planner.save(end, tangent.slope, target - tangent.constant)
    error = end.error if best is None else best.error
    for _ in range(_ROUNDS):
        # The tangent lies above the KLD: moved to what was found, it leaves more to save.
        tangent = tangent_at(error)
        found = planner.save(end, tangent.slope, target - tangent.constant)
        if found is None or (best is not None and found.bytes >= best.bytes):
            break
        best, error = found, found.error
    return best


def _prove(
    planner: Planner,
    tangent: _Tangent,
    excess: Callable[[Relaxed], float],
    found: Search,
    strength: Callable[[float, float], float],
) -> Optimum:
    """The bound on a plan, at the tangent there. found: the search that led to it. strength: bound, price -> what is to be largest."""
    start = found.ends[0].price or None
    tried = search(planner.market.sloped(tangent.slope), tangent.balance_price, excess, start=start).tried
    best = max(tried, key=lambda t: strength(t.bound + tangent.constant, t.price))
    return Optimum(best.price, tangent.balance_price, best.bound + tangent.constant)


def _mixed(planner: Planner, found: Search, tangent: _Tangent, within: float) -> Relaxed | None:
    """The best mix, within so many bytes, of what each layer chose at the prices tried: a few layers do not add up to any sum."""
    layers = np.arange(planner.n_layers)
    size = np.stack([t.layer_bytes for t in found.tried], axis=1)
    value = np.stack(
        [(tangent.slope * t.error).sum(axis=1) + tangent.balance_price * planner.market.log_lis[layers, t.copies] for t in found.tried],
        axis=1,
    )
    choice = least_error(size, value, hull_steps(size, value), within)
    return None if choice is None else found.mixed(choice)
