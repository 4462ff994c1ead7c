"""From what layers choose at a price to real instances: types filled up to the last byte, padding and maps counted."""

from dataclasses import dataclass

import numpy as np

from rq_gguf.calibration.data import Calibration
from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ALIGNMENT, ExpertShape
from rq_gguf.planning.error import error_model
from rq_gguf.planning.knapsack import hull_steps, least_error
from rq_gguf.planning.lagrange import Flags, Floats, Ints, Market, Relaxed
from rq_gguf.planning.load import copy_order, lis_curve, place_copies
from rq_gguf.planning.plan import Instances, LayerPlan
from rq_gguf.planning.stored import stored_errors


@dataclass(frozen=True)
class Candidate:
    copies: Ints
    """[layers]"""
    options: tuple[Ints, ...]
    """Per group [instances of all layers] which stored type; an expert's instances lie side by side."""
    error: Floats
    """[layers, group]"""
    kld: float
    bytes: int


@dataclass(frozen=True)
class _Items:
    """What each type costs and leaves of all instances of both groups, one group's after the other's. [instances, types] each."""

    cost: Floats
    """Bytes."""
    error: Floats
    kld: Floats
    """The error at the market's slope."""
    forbidden: Flags


class Planner:
    """A model as the optimizer sees it."""

    def __init__(
        self, calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], max_tiers: int, least_copies: int, most_copies: int
    ) -> None:
        """least_copies, most_copies: per layer. UserError where the calibration lacks a type's error."""
        self.calibration, self.shape = calibration, shape
        selections = np.stack([layer.selections for layer in calibration.layers])
        self.n_layers, self.n_expert = selections.shape
        order = copy_order(selections, most_copies)
        found = stored_errors(calibration, shape, types)
        self.names = tuple(tuple(errors) for errors in found)
        """Per group the types as stored, from few bits to many."""
        sizes = [np.array([shape.expert_bytes(g, name) for name in names], dtype=np.float64) for g, names in enumerate(self.names)]
        self.model = error_model(calibration)
        self.market = Market(
            error=tuple(np.stack(list(errors.values())) for errors in found),
            slope=np.zeros((self.n_layers, len(GROUPS))),
            size=tuple(sizes),
            order=order,
            least=least_copies,
            log_lis=np.log(lis_curve(selections, order)),
            map_bytes=map_bytes(shape, order),
            max_tiers=max_tiers,
        )
        """Without slopes: see `error.ErrorModel.tangent`."""
        # Per group: whether a tier's tensors may need padding, and how many they are.
        self._loose = [
            len(shape.rows(g)) * (ALIGNMENT - 1) * any(size % (len(shape.rows(g)) * ALIGNMENT) for size in sizes[g].tolist())
            for g in range(len(GROUPS))
        ]

    @property
    def most_padding(self) -> int:
        """Bytes that the padding of all tiers can take."""
        return self.n_layers * sum(loose * min(self.market.max_tiers, len(n)) for loose, n in zip(self._loose, self.names, strict=True))

    def log_lis(self, copies: Ints) -> float:
        """Sum over layers of ln LIS. copies: [layers]."""
        return float(self.market.log_lis[np.arange(self.n_layers), copies].sum())

    def bytes(self, copies: Ints, options: tuple[Ints, ...]) -> int:
        """Tiers with their padding, and maps; as budget.plan_bytes. copies, options: as in `Candidate`."""
        layer = np.repeat(np.arange(self.n_layers), self.n_expert + copies)
        total, plain = 0, copies == 0
        for g, (names, chosen) in enumerate(zip(self.names, options, strict=True)):
            count = np.bincount(layer * len(names) + chosen, minlength=self.n_layers * len(names)).reshape(-1, len(names))
            plain = plain & ((count > 0).sum(axis=1) == 1)
            for name, column in zip(names, count.T, strict=True):
                for experts, layers in zip(*np.unique(column, return_counts=True), strict=True):
                    total += int(layers) * self.shape.stacked_bytes(g, name, int(experts))
        return total + int(self.market.map_bytes[np.arange(self.n_layers), copies][~plain].sum())

    def uniform(self, budget: float, target: float) -> Candidate | None:
        """One type per group for all layers and no more copies than must be, within both limits; of several the one of least KLD under
        a budget, of fewest bytes for a target. None where none is.

        budget: bytes, infinite where there is a target. target: predicted KLD, infinite where there is a budget.
        """
        instances = self.n_expert + self.market.least
        copies = np.full(self.n_layers, self.market.least)
        maps = int(self.market.map_bytes[:, self.market.least].sum()) if self.market.least else 0
        sizes = [[self.n_layers * self.shape.stacked_bytes(g, name, instances) for name in names] for g, names in enumerate(self.names)]
        errors = [error.sum(axis=2) for error in self.market.error]  # [types, layers]
        best, least = None, (np.inf, np.inf)
        for pair in np.ndindex(*(len(names) for names in self.names)):
            size = maps + sum(sizes[g][t] for g, t in enumerate(pair))
            if size > budget:
                continue
            error = np.stack([errors[g][t] for g, t in enumerate(pair)], axis=1)
            kld = self.model.kld(error)
            order = (kld, size) if np.isinf(target) else (size, kld)
            if kld <= target and order < least:
                options = tuple(np.full(self.n_layers * instances, t) for t in pair)
                best, least = Candidate(copies, options, error, kld, size), order
        return best

    def spend(self, relaxed: Relaxed, slope: Floats, budget: int) -> Candidate | None:
        """The relaxation's copies and types to choose from, with types filled up to the budget; None where they do not fit.

        slope: [layers, group] nats per unit of error.
        """
        items = self._items(relaxed, slope)
        kld = np.where(items.forbidden, np.inf, items.kld)
        steps = hull_steps(items.cost, kld)
        maps = int(np.where(relaxed.plain, 0, self.market.map_bytes[np.arange(self.n_layers), relaxed.copies]).sum())
        # Maps and padding are set aside at their worst first; what is left of that is spent as well.
        aside = maps + sum(loose * int(few.sum()) for loose, few in zip(self._loose, relaxed.allowed, strict=True))
        best: Candidate | None = None
        while (chosen := least_error(items.cost, kld, steps, budget - aside)) is not None:
            found = self._candidate(relaxed.copies, items, chosen)
            if found.bytes > budget or (best is not None and (found.kld, found.bytes) >= (best.kld, best.bytes)):
                break
            best, reserved = found, aside
            aside = found.bytes - int(np.take_along_axis(items.cost, chosen[:, None], axis=1).sum())
            if aside >= reserved:
                break
        return best

    def save(self, relaxed: Relaxed, slope: Floats, target: float) -> Candidate | None:
        """The relaxation's copies and types to choose from, with the fewest bytes for a sum of slope x error of at most `target`.

        None where they cannot reach it. slope: [layers, group] nats per unit of error.
        """
        items = self._items(relaxed, slope)
        # The same knapsack with the parts exchanged: the KLD is what may be spent.
        cost = np.where(items.forbidden, np.inf, items.cost)
        chosen = least_error(items.kld, cost, hull_steps(items.kld, cost), target)
        return None if chosen is None else self._candidate(relaxed.copies, items, chosen)

    def _items(self, relaxed: Relaxed, slope: Floats) -> _Items:
        copies = place_copies(self.market.order, relaxed.copies, self.n_expert)
        layer, expert = np.divmod(np.repeat(np.arange(copies.size), copies.ravel() + 1), self.n_expert)
        instances = copies[layer, expert] + 1
        n, shape = len(layer), (2 * len(layer), max(len(names) for names in self.names))
        cost, error, kld, forbidden = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.ones(shape, dtype=np.bool_)
        for g, (market_error, size, few) in enumerate(zip(self.market.error, self.market.size, relaxed.allowed, strict=True)):
            part = (slice(g * n, (g + 1) * n), slice(len(size)))
            cost[part] = size
            error[part] = (market_error[:, layer, expert] / instances).T
            kld[part] = error[part] * slope[layer, g, None]
            forbidden[part] = ~few[:, layer].T
        return _Items(cost, error, kld, forbidden)

    def _candidate(self, copies: Ints, items: _Items, chosen: Ints) -> Candidate:
        options = tuple(np.split(chosen, len(GROUPS)))
        starts = np.cumsum(self.n_expert + copies) - self.n_expert - copies
        errors = np.split(np.take_along_axis(items.error, chosen[:, None], axis=1)[:, 0], len(GROUPS))
        error = np.stack([np.add.reduceat(part, starts) for part in errors], axis=1)
        return Candidate(copies, options, error, self.model.kld(error), self.bytes(copies, options))

    def plans(self, candidate: Candidate) -> tuple[LayerPlan, ...]:
        """An expert's most precise instance becomes its primary."""
        copies = place_copies(self.market.order, candidate.copies, self.n_expert)
        ends = np.cumsum(self.n_expert + candidate.copies)[:-1]
        groups = [
            [_instances(part, row + 1, names) for part, row in zip(np.split(options, ends), copies, strict=True)]
            for options, names in zip(candidate.options, self.names, strict=True)
        ]
        return tuple(
            LayerPlan(layer.layer, *instances) for layer, instances in zip(self.calibration.layers, zip(*groups, strict=True), strict=True)
        )


def map_bytes(shape: ExpertShape, order: Ints) -> Ints:
    """[layers, most + 1] bytes of a layer's map with 0, 1, ... copies. order: [layers, most], see load.copy_order."""
    rows, copies = np.arange(len(order)), np.zeros((len(order), shape.n_expert), dtype=np.int64)
    most = np.zeros((len(order), order.shape[1] + 1), dtype=np.int64)
    for j in range(order.shape[1]):
        copies[rows, order[:, j]] += 1
        most[:, j + 1] = np.maximum(most[:, j], copies[rows, order[:, j]])
    return np.array([shape.map_bytes(n) for n in range(int(most.max()) + 1)])[most]


def _instances(options: Ints, instances: Ints, names: tuple[str, ...]) -> Instances:
    """A layer's group from options [all instances]. instances: [n_expert] how many each expert has."""
    rows, at, chosen = [], 0, options.tolist()
    alone = [(name,) for name in names]
    for count in instances.tolist():
        if count == 1:
            rows.append(alone[chosen[at]])
        else:
            rows.append(tuple(names[t] for t in sorted(chosen[at : at + count], reverse=True)))
        at += count
    return tuple(rows)
