"""The plan's choices at a price per byte, and the price that meets a budget. Pure numpy.

Wanted is the least of  KLD + weight x sum over layers of ln LIS  within some bytes, where KLD is a sum over layers and groups of slope x
error. With a price on bytes instead of the limit every layer chooses for itself: how many copies, and the types of each instance, at most
`max_tiers` in a layer and matrix group. What this relaxation reaches is a bound: no plan has less  KLD + weight x sum of ln LIS +
price x bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.planning.load import place_copies
from rq_gguf.planning.tiers import best_subsets

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_MOST_STEPS = 60
_ZERO_AFTER = 3  # steps down: then whether all is affordable is asked at once


@dataclass(frozen=True)
class Market:
    """What the layers choose from."""

    error: tuple[Floats, ...]
    """Per group [types, layers, n_expert] of an expert with all its instances in a type."""
    slope: Floats
    """[layers, group] nats of KLD per unit of error."""
    size: tuple[Floats, ...]
    """Per group [types] bytes of one instance, ascending."""
    order: Ints
    """[layers, most] who gets the 1st, 2nd, ... copy (load.copy_order)."""
    least: int
    """Fewest copies that a layer may have, at most `most`."""
    log_lis: Floats
    """[layers, most + 1] ln LIS with 0, 1, ... copies."""
    map_bytes: Ints
    """[layers, most + 1] bytes of the layer's map; a layer without copies and with one type in each group needs none."""
    max_tiers: int
    """Most types in a layer and group."""
    charges: tuple[Floats, ...] | None = None
    """Per group [types, layers, n_expert] what an expert pays for a type, times the price, where that is not its bytes; without copies."""

    @property
    def n_expert(self) -> int:
        return self.error[0].shape[2]

    @property
    def least_bytes(self) -> float:
        """The fewest bytes that tiers and maps can take."""
        instances = len(self.order) * (self.n_expert + self.least)
        return float(instances * sum(size[0] for size in self.size) + (self.map_bytes[:, self.least].sum() if self.least else 0))

    @cached_property
    def items(self) -> tuple[tuple[Floats, ...], Floats]:
        """KLD, per group [types, layers, items], and instances [layers, items] of every expert without copies, then of those that get the
        1st, 2nd, ... copy with it, then of the same without it."""
        rows = np.arange(len(self.order))
        instances, before = np.ones((len(rows), self.n_expert)), np.empty(self.order.shape)
        for j in range(self.order.shape[1]):
            before[:, j] = instances[rows, self.order[:, j]]
            instances[rows, self.order[:, j]] += 1
        klds = []
        for error, slope in zip(self.error, self.slope.T, strict=True):
            kld = error * slope[:, None]
            growing = kld[:, rows[:, None], self.order]
            klds.append(np.concatenate([kld, growing, growing], axis=2))
        return tuple(klds), np.concatenate([np.ones((len(rows), self.n_expert)), before + 1, before], axis=1)

    def without_copies(self) -> "Market":
        return replace(self, order=self.order[:, :0], least=0, log_lis=self.log_lis[:, :1], map_bytes=self.map_bytes[:, :1])

    def sloped(self, slope: Floats) -> "Market":
        return replace(self, slope=slope)

    def charged(self, group: int, price: float, instances: Floats | Ints) -> Floats:
        """[types, layers, items] what a type costs at a price. instances: [layers, items] of every item."""
        if self.charges is not None:
            return price * self.charges[group]
        return np.asarray((price * self.size[group])[:, None, None] * instances)

    def totals(self, costs: Floats) -> Floats:
        """[rows, most + 1] what a layer costs with 0, 1, ... copies. costs: [rows, items], items as in `items`."""
        n, most = self.n_expert, self.order.shape[1]
        curve = np.empty((len(costs), most + 1))
        costs[:, :n].sum(axis=1, out=curve[:, 0])
        np.subtract(costs[:, n : n + most], costs[:, n + most :], out=curve[:, 1:])
        return np.cumsum(curve, axis=1, out=curve)


@dataclass(frozen=True)
class Relaxed:
    """What the layers choose at a price."""

    price: float
    """Nats per byte."""
    bound: float
    """No plan has less KLD + weight x sum of ln LIS + price x bytes."""
    kld: float
    error: Floats
    """[layers, group]"""
    layer_bytes: Floats
    """[layers] of tiers and maps, without padding."""
    copies: Ints
    """[layers]"""
    allowed: tuple[Flags, ...]
    """Per group [types, layers] the types that the layer chose to use."""
    plain: Flags
    """[layers] True where a layer does without a map."""

    @cached_property
    def bytes(self) -> float:
        return float(self.layer_bytes.sum())


def relax(market: Market, price: float, weight: float) -> Relaxed:
    """Every layer's best choice where a byte costs `price`. Exact, but for `best_subsets` of very many types; the bound always holds."""
    klds, instances = market.items
    cost = weight * market.log_lis + price * market.map_bytes
    cost[:, : market.least] = np.inf
    bound = cost.copy()
    # A layer in one type per group and without copies has no map: an option of its own.
    plain_cost = np.full(len(cost), np.inf) if market.least else weight * market.log_lis[:, 0]
    plain_types, subsets = [], []
    for g, (kld, size) in enumerate(zip(klds, market.size, strict=True)):
        values = kld + market.charged(g, price, instances)
        least, used = _least(values)
        curve = market.totals(least)
        bound += curve
        # Where a layer needs no more types than it may have, the rest of them is free.
        few = np.repeat((used | (len(size) <= market.max_tiers))[:, :, None], curve.shape[1], axis=2)
        crowded = np.flatnonzero(used.sum(axis=0) > market.max_tiers)
        if len(crowded):
            best, few[:, crowded], exact = best_subsets(np.ascontiguousarray(values[:, crowded]), market.max_tiers, market.totals)
            if exact:
                bound[crowded] += best - curve[crowded]
            curve[crowded] = best
        cost += curve
        subsets.append(few)
        alone = values[:, :, : market.n_expert].sum(axis=2)
        plain_cost = plain_cost + alone.min(axis=0)
        plain_types.append(alone.argmin(axis=0))
    layers = np.arange(len(cost))
    copies = cost.argmin(axis=1)
    plain = plain_cost <= cost[layers, copies]
    copies[plain] = 0
    allowed = tuple(few[:, layers, copies] for few in subsets)
    for few, only in zip(allowed, plain_types, strict=True):
        few[:, plain] = False
        few[only[plain], layers[plain]] = True
    error, layer_bytes = _outcome(market, price, copies, allowed)
    return Relaxed(
        price=price,
        bound=float(np.minimum(bound.min(axis=1), plain_cost).sum()),
        kld=float((market.slope * error).sum()),
        error=error,
        layer_bytes=layer_bytes + np.where(plain, 0, market.map_bytes[layers, copies]),
        copies=copies,
        allowed=allowed,
        plain=plain,
    )


def _least(values: Floats) -> tuple[Floats, Flags]:
    """[rows, items] the cheapest type's cost, and [types, rows] which types are the cheapest somewhere. values: [types, rows, items]."""
    least, best = values[0].copy(), np.zeros(values.shape[1:], dtype=np.int64)
    for t in range(1, len(values)):
        best[values[t] < least] = t
        np.minimum(least, values[t], out=least)
    used = np.zeros(values.shape[:2], dtype=np.bool_)
    used[best, np.arange(len(best))[:, None]] = True
    return least, used


def _outcome(market: Market, price: float, copies: Ints, allowed: tuple[Flags, ...]) -> tuple[Floats, Floats]:
    """Errors [layers, group] and bytes [layers] of all instances at a price. copies: [layers]. allowed: per group [types, layers]."""
    instances = place_copies(market.order, copies, market.n_expert) + 1
    errors, total = np.zeros(market.slope.shape), np.zeros(len(copies))
    for g, (error, size, few) in enumerate(zip(market.error, market.size, allowed, strict=True)):
        value = error * market.slope[:, g, None] + market.charged(g, price, instances)
        best = np.where(few[:, :, None], value, np.inf).argmin(axis=0)
        errors[:, g] = np.take_along_axis(error, best[None], axis=0)[0].sum(axis=1)
        total += (size[best] * instances).sum(axis=1)
    return errors, total


@dataclass(frozen=True)
class Search:
    """The prices that were tried."""

    low: Relaxed | None
    """The highest price found too low, None where none is."""
    high: Relaxed | None
    """The lowest price found high enough; None where none is."""
    tried: tuple[Relaxed, ...]

    @property
    def ends(self) -> tuple[Relaxed, ...]:
        return tuple(end for end in (self.high, self.low) if end is not None)

    def mixed(self, choice: Ints) -> Relaxed:
        """What the layers chose at different prices. choice: [layers] which of those tried. The figures that bind all layers are void."""
        layers = np.arange(len(choice))

        def pick(arrays: list[NDArray[Any]]) -> NDArray[Any]:
            return np.stack(arrays)[choice, layers]

        return Relaxed(
            price=math.nan,
            bound=-math.inf,
            kld=math.nan,
            error=pick([t.error for t in self.tried]),
            layer_bytes=pick([t.layer_bytes for t in self.tried]),
            copies=pick([t.copies for t in self.tried]),
            allowed=tuple(pick([few.T for few in group]).T for group in zip(*(t.allowed for t in self.tried), strict=True)),
            plain=pick([t.plain for t in self.tried]),
        )


def search(
    market: Market, weight: float, excess: Callable[[Relaxed], float], *, start: float | None = None, tolerance: float = 5e-5
) -> Search:
    """The price where `excess` changes its sign.

    excess: above 0 where the price is too low; falls with the price. start: where to begin, from an earlier search.
    tolerance: how much of the KLD a price in between could still change.
    """
    tried: list[Relaxed] = []

    def look(price: float) -> tuple[Relaxed, float]:
        found = relax(market, price, weight)
        tried.append(found)
        return found, excess(found)

    low: tuple[Relaxed, float] | None = None
    high: tuple[Relaxed, float] | None = None
    price, step = (_typical_price(market, weight), 4.0) if start is None else (start, 1.1)
    while low is None or high is None:
        found, over = look(price)
        if over > 0:
            low = (found, over)
            if found.bytes <= market.least_bytes:
                return Search(found, None, tuple(tried))
            price *= step
        else:
            high = (found, over)
            if len(tried) == _ZERO_AFTER:
                free, over = look(0.0)
                if over <= 0:
                    return Search(None, free, tuple(tried))
            price /= step
        step *= step
    for i in range(_MOST_STEPS):
        (a, over_a), (b, over_b) = low, high
        # The bound as a function of the price lies below the tangents at both ends and above their chord: where these meet, all is known.
        meet = (b.bound - a.bound + a.bytes * a.price - b.bytes * b.price) / (a.bytes - b.bytes) if a.bytes > b.bytes else a.price
        meet = min(max(meet, a.price), b.price)
        chord = a.bound + (b.bound - a.bound) * (meet - a.price) / (b.price - a.price)
        if a.bound + a.bytes * (meet - a.price) - chord <= tolerance * a.kld:
            break
        price = meet
        if i % 2 == 0 and a.price > 0 and math.isfinite(over_a) and math.isfinite(over_b):
            price = math.exp((over_a * math.log(b.price) - over_b * math.log(a.price)) / (over_a - over_b))
        if not a.price < price < b.price:
            price = math.sqrt(a.price * b.price)
        if not a.price < price < b.price:
            break
        found, over = look(price)
        if over > 0:
            low = (found, over)
        else:
            high = (found, over)
    return Search(low[0], high[0], tuple(tried))


def _typical_price(market: Market, weight: float) -> float:
    """A price of the right order: all that can be gained over all the bytes that it takes."""
    gain = weight * float((market.log_lis[:, 0] - market.log_lis[:, -1]).sum())
    for error, slope in zip(market.error, market.slope.T, strict=True):
        gain += float(((error[0] - error[-1]).sum(axis=1) * slope).sum())
    return max(gain, 1e-30) / market.least_bytes
