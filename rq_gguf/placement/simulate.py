"""What placements of experts on devices do to decode batches. Pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.placement.batches import Part, batches_for, counts_from_shares, counts_of, draw
from rq_gguf.placement.machine import ExpertSize, Machine, layer_seconds
from rq_gguf.placement.pack import (
    Load,
    Placement,
    even_copies,
    packed,
    packed_with_copies,
    paper_copy,
    split_over_instances,
    stock_order,
)

ARRANGEMENTS = ("stock", "paper", "packed", "copies")
"""Contiguous blocks; those with the paper's single copy; packed by load; packed with copies."""
_SEED = 20938


@dataclass(frozen=True)
class Figures:
    """One arrangement, on some devices, at one batch size: means over layers and batches."""

    arrangement: str
    copies: int
    """Per layer."""
    tokens: float
    """Selections that the busiest device serves, over the mean of the devices: 1 is even."""
    distinct: float
    """Experts that the device with most of them reads; an expert's copies count each where they serve a token."""
    distinct_over_mean: float
    """The same over the mean of the devices."""
    seconds: float
    """Predicted time of a step's routed experts and exchanges, all layers."""


@dataclass(frozen=True)
class Point:
    """All arrangements at one number of devices and one batch size."""

    devices: int
    batch: int
    figures: tuple[Figures, ...]
    uniform: float
    """`tokens` if routing were uniform: what chance alone does."""

    def of(self, arrangement: str) -> Figures:
        return next(f for f in self.figures if f.arrangement == arrangement)


@dataclass(frozen=True)
class Workload:
    """What is decoded, and what placements are planned on."""

    planned_on: NDArray[np.float64]
    """[layers, n_expert] selections, or shares."""
    n_used: int
    """Experts per token."""
    decoded: Part | None
    """Recorded tokens to draw batches from; None: tokens that are drawn from the planned loads, independently."""

    @property
    def n_expert(self) -> int:
        return int(self.planned_on.shape[1])

    def counts(self, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Per layer [batches, n_expert]; the same tokens in all layers."""
        n = batches_for(batch, self.n_used)
        if self.decoded is None:
            for load in self.planned_on:
                yield counts_from_shares(load, self.n_used, batch, n, rng)
            return
        tokens = draw(self.decoded, batch, n, rng)
        for layer in range(len(self.planned_on)):
            yield counts_of(self.decoded, tokens, layer)


def arrangements(load: Load, n_devices: int, wanted: int) -> dict[str, Placement]:
    """Name -> placement of one layer. wanted: copies; rounded up to equal slots, at most an instance of each expert on each device."""
    wanted = min(wanted, most_copies(len(load), n_devices))
    return {
        "stock": stock_order(len(load), n_devices),
        "paper": paper_copy(load, n_devices),
        "packed": packed(load, n_devices),
        "copies": packed_with_copies(load, even_copies(len(load), wanted, n_devices), n_devices),
    }


def most_copies(n_expert: int, n_devices: int) -> int:
    """Copies of a layer when every device holds every expert."""
    return n_expert * (n_devices - 1)


def simulate(
    work: Workload,
    devices: tuple[int, ...],
    batches: tuple[int, ...],
    wanted: int,
    machine: Machine,
    size: ExpertSize,
    tick: Callable[[], object] = lambda: None,
) -> list[Point]:
    """A point per number of devices and batch size, in that order. wanted: copies per layer, rounded up to equal slots.

    Each batch size draws its batches once, for all numbers of devices. The same input gives the same figures.
    """
    placed = {d: [arrangements(load, d, wanted) for load in work.planned_on] for d in devices}
    points: dict[tuple[int, int], Point] = {}
    for batch in batches:
        rng = np.random.default_rng([_SEED, batch])
        sums = {d: np.zeros((len(ARRANGEMENTS), 4)) for d in devices}
        for layer, counts in enumerate(work.counts(batch, rng)):
            for d in devices:
                for i, name in enumerate(ARRANGEMENTS):
                    sums[d][i] += measure(placed[d][layer][name], counts, batch, machine, size)
            tick()
        # One layer instead of all: more batches.
        even = counts_from_shares(np.ones(work.n_expert), work.n_used, batch, 4 * batches_for(batch, work.n_used), rng)
        for d in devices:
            figures = tuple(_figures(name, placed[d][0][name], work, sums[d][i]) for i, name in enumerate(ARRANGEMENTS))
            uniform = measure(stock_order(work.n_expert, d), even, batch, machine, size)[0]
            points[d, batch] = Point(d, batch, figures, float(uniform))
    return [points[d, b] for d in devices for b in batches]


def _figures(name: str, placement: Placement, work: Workload, sums: NDArray[np.float64]) -> Figures:
    """sums: of `measure` over the layers."""
    tokens, distinct, over_mean = (float(v) for v in sums[:3] / len(work.planned_on))
    return Figures(name, len(placement.devices) - work.n_expert, tokens, distinct, over_mean, float(sums[3]))


def measure(placement: Placement, counts: NDArray[np.int64], batch: int, machine: Machine, size: ExpertSize) -> NDArray[np.float64]:
    """(tokens, distinct, distinct over mean, seconds) as in Figures, of one layer, mean over batches. counts: [batches, n_expert]."""
    served = split_over_instances(counts, placement.instances)
    tokens, distinct = placement.sums(served), placement.sums(served > 0)
    seconds = layer_seconds(machine, size, tokens, distinct, batch)
    ratios = [(v.max(axis=-1) / v.mean(axis=-1)).mean() for v in (tokens, distinct)]
    return np.array([ratios[0], distinct.max(axis=-1).mean(), ratios[1], seconds.mean()])
