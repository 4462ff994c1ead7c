"""Plans for a machine: the best within the budget as planning makes it, and those that decode faster. Pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rq_gguf.calibration.data import Calibration
from rq_gguf.planning.budget import expert_shape
from rq_gguf.planning.fill import Planner
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import stored_types
from rq_gguf.planning.summary import plan_errors, summarize
from rq_gguf.vram.hits import shares_of
from rq_gguf.vram.machine import Machine
from rq_gguf.vram.model import experts_of
from rq_gguf.vram.optimize import Limits, Load, fastest
from rq_gguf.vram.speed import (
    PROMPT_BATCH,
    Experts,
    Floats,
    Layout,
    Missed,
    Rest,
    decode_table,
    held,
    missed,
    prompt_table,
    reads,
)

TYPICAL = Missed(0.99, 1.3)
"""Of two small models on texts that they were not calibrated on (docs/vram.md); used where no trace says better."""
FACTORS = (1.0, 1.25, 1.5, 2.0)
"""Predicted KL divergences of the faster plans, over the plain plan's."""
SEQUENCES = 4
"""That decode together, for the second figure of speed."""
_TRIED = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)  # numbers of slots, over those of the plain plan
_WORTH = 1.01  # times as fast as all plans before it, or it is not shown
_FLOOR = 1e-12


@dataclass(frozen=True)
class Speed:
    """What a plan comes to on a machine."""

    layout: Layout
    stock: Layout
    """The best of `--n-cpu-moe`."""
    vram_bytes: int
    hits: float
    """Share of the selections that VRAM serves, mean over layers, with the set that the calibration would choose."""
    adapted_hits: float
    """With the one that follows the text."""
    decode: float
    """Tokens per second of one sequence, adapted."""
    static: float
    """The same with the calibration's set."""
    together: float
    """Tokens per second of SEQUENCES sequences, in total."""
    prompt: float
    """Tokens per second of a prompt."""
    stock_decode: float
    """Tokens per second in stock's layout."""
    stock_together: float
    stock_prompt: float


@dataclass(frozen=True)
class Choice:
    """A plan and what it comes to."""

    name: str
    plan: Plan
    kld: float
    """Predicted, nats."""
    speed: Speed


@dataclass(frozen=True)
class Setting:
    """The machine and what is known of model and text."""

    machine: Machine
    rest: Rest
    missed: Missed


def measure(experts: Experts, setting: Setting, vram: float) -> Speed:
    """Predict a plan's speed. vram: bytes."""
    rest, machine = setting.rest, setting.machine
    decode = decode_table(experts, rest, machine, setting.missed.adapted)
    static = decode_table(experts, rest, machine, setting.missed.static)
    together = decode_table(experts, rest, machine, setting.missed.static, SEQUENCES)
    prompt = prompt_table(experts, rest, machine)
    layout, stock = decode.best(vram), decode.stock(vram)
    n_layers = len(experts.shares)
    share = missed(experts)[: n_layers - layout.whole, layout.slots]
    hits = [1 - float((share**power).sum()) / n_layers for power in (setting.missed.static, setting.missed.adapted)]
    return Speed(
        layout=layout,
        stock=stock,
        vram_bytes=decode.bytes_of(layout),
        hits=hits[0],
        adapted_hits=hits[1],
        decode=1 / decode.at(layout),
        static=1 / static.at(layout),
        together=SEQUENCES / together.at(layout),
        prompt=PROMPT_BATCH / prompt.at(layout),
        stock_decode=1 / decode.at(stock),
        stock_together=SEQUENCES / together.at(stock),
        stock_prompt=PROMPT_BATCH / prompt.at(stock),
    )


def shares(calibration: Calibration) -> Floats:
    """[layers, n_expert]"""
    return shares_of(np.stack([layer.selections for layer in calibration.layers]))


def choose(
    calibration: Calibration,
    plain: Plan,
    setting: Setting,
    vram: float,
    ram: float = math.inf,
    tick: Callable[[], object] = lambda: None,
) -> list[Choice]:
    """The plain plan, and for each of FACTORS the fastest plan of that error, where it is faster by a per cent than all before it.

    plain: of the policy `budget` and without copies, with a predicted KL divergence.
    vram, ram: bytes for experts. tick: called after each of FACTORS.
    """
    shape, machine = expert_shape(calibration), setting.machine
    load, n_used = shares(calibration), calibration.n_expert_used
    kld = plain.summary["predicted_kld"]

    def of(name: str, plan: Plan, kld: float) -> Choice:
        experts = experts_of(plan.layers, shape, load, n_used, machine)
        return Choice(name, plan, kld, measure(experts, setting, vram))

    found = [of("best in the budget", plain, kld)]
    errors = plan_errors(calibration, shape, plain.layers)
    if errors is None or kld <= _FLOOR:
        return found
    planner = Planner(calibration, shape, plain.types, plain.max_tiers, 0, 0)
    first = experts_of(plain.layers, shape, load, n_used, machine)

    def load_of(layout: Layout) -> Load:
        return Load(held(first, layout), reads(first, layout, setting.missed.adapted))

    layouts = _layouts(found[0].speed.layout, shape.n_expert)
    for factor in FACTORS:
        limits = Limits(vram, ram, factor * kld)
        candidate = fastest(planner, machine, load_of, layouts, limits, errors)
        tick()
        if candidate is None:
            continue
        layers = planner.plans(candidate)
        plan = replace(
            plain,
            budget=f"{plain.budget} with {factor:g}x its error on {machine.name}",
            budget_bytes=candidate.bytes,
            expert_bytes=candidate.bytes,
            types=stored_types(shape, plain.types, layers),
            layers=layers,
            target_kld=limits.kld,
            optimum=None,
        )
        plan = replace(plan, summary=summarize(calibration, plan))
        name = "as little error, faster" if factor == 1 else f"{factor:g}x the error"
        choice = of(name, plan, candidate.kld)
        if choice.speed.decode > _WORTH * max(c.speed.decode for c in found):
            found.append(choice)
    return found


def _layouts(layout: Layout, n_expert: int) -> list[Layout]:
    """To try around the plain plan's: with other types, other numbers of experts fit."""
    slots = {min(n_expert, max(0, round(layout.slots * f))) for f in _TRIED} if layout.slots else {0}
    whole = {0, layout.whole} if layout.slots else {layout.whole}
    return [Layout(w, s) for w in sorted(whole) for s in sorted(slots)]
