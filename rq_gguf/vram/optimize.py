"""Types for a machine that holds the busy experts in VRAM: least time for a given error. Pure.

Wanted is the least time of a step with a predicted KL divergence of at most a target, where the experts in VRAM take no more than it has
and all experts no more than the RAM has. With prices in nats for a second, for a byte in VRAM and for a byte in RAM, every expert chooses
its types by itself, as in planning.lagrange: what an expert in RAM costs is mostly time, in proportion to how often it is picked; what one
in VRAM costs is mostly room. KL divergence is concave, so its tangent takes its place and is moved to what was found.

Which experts are in VRAM follows from the number of slots, and that is tried out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rq_gguf.planning.fill import Candidate, Planner
from rq_gguf.planning.lagrange import Flags, Floats, Ints, relax
from rq_gguf.vram.machine import Machine
from rq_gguf.vram.speed import Layout

_ROUNDS = 3
_HALVINGS = 14
_STEP = 16.0
_SMALLEST = 1e-60


@dataclass(frozen=True)
class Limits:
    """What a plan must keep."""

    vram: float
    """Bytes of experts in VRAM."""
    ram: float
    """Bytes of all experts."""
    kld: float
    """Nats, predicted."""


@dataclass(frozen=True)
class Load:
    """What the layout makes of every expert. [layers, n_expert]"""

    held: Flags
    """Whether it is in VRAM."""
    reads: Floats
    """How often a token reads it, there or in RAM."""


@dataclass(frozen=True)
class _Prices:
    """In nats."""

    second: float
    vram: float
    """A byte."""
    ram: float
    """A byte."""

    def as_start(self, before: "_Prices") -> "_Prices":
        """Where to look next: a price of 0 says nothing, and the one before stays."""
        return _Prices(self.second or before.second, self.vram or before.vram, self.ram or before.ram)


@dataclass(frozen=True)
class _Choice:
    options: tuple[Ints, ...]
    """Per group [layers, n_expert] which type."""
    error: Floats
    """[layers, group]"""
    kld: float
    vram: float
    ram: float
    seconds: float


class _Problem:
    """A planner's model on a machine, laid out in one way."""

    def __init__(self, planner: Planner, machine: Machine, load: Load, limits: Limits) -> None:
        self.planner, self.limits, self.load = planner, limits, load
        speed = [
            np.array([[machine.ram_seconds(t, size), size / machine.vram_bandwidth] for t, size in zip(names, sizes.tolist(), strict=True)])
            for names, sizes in zip(planner.names, planner.market.size, strict=True)
        ]
        self.seconds = tuple(np.where(load.held, s[:, 1, None, None], s[:, 0, None, None]) * load.reads for s in speed)
        self.allowed: tuple[Flags, ...] | None = None
        """Per group [types, layers]; None for all."""

    def charges(self, prices: _Prices) -> tuple[Floats, ...]:
        byte = np.where(self.load.held, prices.vram + prices.ram, prices.ram)
        return tuple(prices.second * s + size[:, None, None] * byte for s, size in zip(self.seconds, self.planner.market.size, strict=True))

    def choose(self, slope: Floats, prices: _Prices) -> _Choice:
        options, errors, vram, ram, seconds = [], [], 0.0, 0.0, 0.0
        market = self.planner.market
        for g, charge in enumerate(self.charges(prices)):
            value = market.error[g] * slope[:, g, None] + charge
            if self.allowed is not None:
                value = np.where(self.allowed[g][:, :, None], value, np.inf)
            best = value.argmin(axis=0)
            size = market.size[g][best]
            options.append(best)
            errors.append(np.take_along_axis(market.error[g], best[None], axis=0)[0].sum(axis=1))
            vram, ram = vram + float(size[self.load.held].sum()), ram + float(size.sum())
            seconds += float(np.take_along_axis(self.seconds[g], best[None], axis=0).sum())
        error = np.stack(errors, axis=1)
        return _Choice(tuple(options), error, self.planner.model.kld(error), vram, ram, seconds)

    def settle(self, slope: Floats, start: _Prices) -> tuple[_Choice, _Prices] | None:
        """The largest price of time at which the error is kept, with the least prices of bytes that keep those; None where there is
        none. slope: [layers, group] nats per unit of error. start: where to look first."""
        smallest = self.choose(np.zeros_like(slope), _Prices(0.0, 1.0, 1.0))
        if smallest.vram > self.limits.vram or smallest.ram > self.limits.ram:
            return None
        byte = [start.vram, start.ram]

        def at(second: float) -> tuple[_Choice, _Prices]:
            prices = _Prices(second, 0.0, 0.0)
            for i, name, limit in ((1, "ram", self.limits.ram), (0, "vram", self.limits.vram)):

                def kept(value: float, prices: _Prices = prices, name: str = name, limit: float = limit) -> bool:
                    return bool(getattr(self.choose(slope, replace(prices, **{name: value})), name) <= limit)

                if not kept(0.0):
                    byte[i] = _least(kept, byte[i])
                    prices = replace(prices, **{name: byte[i]})
            return self.choose(slope, prices), prices

        def kept(second: float) -> bool:
            found, _ = at(second)
            return found.kld <= self.limits.kld and found.vram <= self.limits.vram and found.ram <= self.limits.ram

        if not kept(0.0):
            return None
        found, prices = at(_most(kept, start.second))
        return found, prices


def _most(kept: Callable[[float], bool], start: float) -> float:
    """About the largest value for which `kept`, which holds for 0 and small values; 0 where even small ones are too large."""
    low, high = start, start
    for _ in range(12):
        if kept(high):
            low, high = high, high * _STEP
        elif not kept(low):
            low, high = low / _STEP, low
        else:
            break
    if not kept(low):
        return 0.0
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kept(middle) else (low, middle)
        if high < low * 1.002:
            break
    return low


def _least(kept: Callable[[float], bool], start: float) -> float:
    """About the least value for which `kept`, which holds for large values."""
    return 1 / (_most(lambda inverse: kept(1 / inverse), 1 / start) or _SMALLEST)


def fastest(
    planner: Planner, machine: Machine, load_of: Callable[[Layout], Load], layouts: list[Layout], limits: Limits, error: Floats
) -> Candidate | None:
    """The plan without copies of least time within the limits; None where none of the layouts leads to one.

    load_of: what a layout makes of the experts. layouts: to try. error: [layers, group] of a plan of about this error, to begin with.
    """
    aside = planner.most_padding + int(planner.market.map_bytes[:, 0].sum())
    limits = replace(limits, ram=limits.ram - aside)
    slope = planner.model.tangent(error)[0]
    prices = _first_prices(planner, machine, slope, limits)
    best: tuple[float, _Problem, _Prices] | None = None
    for layout in layouts:
        problem = _Problem(planner, machine, load_of(layout), limits)
        found = problem.settle(slope, prices)
        if found is None:
            continue
        choice, prices = found[0], found[1].as_start(prices)
        split = planner.n_layers - layout.whole if layout.slots < planner.n_expert else 0
        seconds = choice.seconds + machine.handover_with(layout.slots) * split
        if best is None or seconds < best[0]:
            best = seconds, problem, prices
    if best is None:
        return None
    _, problem, prices = best
    return _finish(problem, prices, error)


def _finish(problem: _Problem, prices: _Prices, error: Floats) -> Candidate | None:
    """Tangents and tiers that agree with what they lead to."""
    planner, kept, here = problem.planner, None, prices
    for i in range(2 * _ROUNDS):
        slope = planner.model.tangent(error)[0]
        if i == _ROUNDS:  # from here on, with few types in a layer and group
            market = planner.market.sloped(slope)
            market = replace(market, charges=problem.charges(here), map_bytes=np.zeros_like(market.map_bytes))
            problem.allowed = relax(market, 1.0, 0.0).allowed
        found = problem.settle(slope, prices)
        if found is None:
            break
        choice, here = found
        error, prices = choice.error, here.as_start(prices)
        if i >= _ROUNDS and (kept is None or choice.seconds < kept.seconds):
            kept = choice
    if kept is None:
        return None
    copies = np.zeros(planner.n_layers, dtype=np.int64)
    options = tuple(best.reshape(-1) for best in kept.options)
    return Candidate(copies, options, kept.error, kept.kld, planner.bytes(copies, options))


def _first_prices(planner: Planner, machine: Machine, slope: Floats, limits: Limits) -> _Prices:
    """Of the right order: the error over what it is paid with."""
    market = planner.market
    gain = sum(float(((e[0] - e[-1]).sum(axis=1) * slope[:, g]).sum()) for g, e in enumerate(market.error))
    byte = max(gain, 1e-30) / max(market.least_bytes, 1.0)
    return _Prices(byte * machine.ram_bandwidth, byte, byte)
