"""What a report shows, as plain numbers: the page, the figures and --json are made of this and of nothing else."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.planning.budget import ExpertShape
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.vram.speed import Rest


@dataclass(frozen=True)
class Subject:
    """What a report is about: a file that was written, or a plan for a calibration."""

    name: str
    model: str
    written: bool
    """True for a file, False for a plan of one."""
    layers: tuple[LayerPlan, ...]
    shapes: tuple[ExpertShape, ...]
    """One per layer."""
    load: tuple[NDArray[np.float64], ...] | None
    """Per layer [n_expert] share of the layer's selections; None where unknown."""
    n_expert_used: int
    """0 where unknown."""
    tokens: int
    """Of the calibration text; 0 where unknown."""
    budget: str
    types: tuple[str, ...]
    """Types that experts were allowed, from few bits to many."""
    max_tiers: int
    dispatch: str
    file_bytes: int | None
    """Of the whole file; None for a plan."""
    calibration: Calibration | None
    """None for a file whose calibration is not at hand."""
    rest: Rest | None = None
    """What a token reads besides routed experts; None where the model is not at hand."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One block."""

    layer: int
    share: tuple[float, ...] | None
    """[n_expert] share of the layer's selections."""
    copies: tuple[int, ...]
    """[n_expert] instances beyond the primary."""
    gate_up: tuple[tuple[str, ...], ...]
    """[n_expert][instances] types, the primary's first."""
    down: tuple[tuple[str, ...], ...]
    lis_before: float | None
    lis_after: float | None
    importance: tuple[float, ...] | None
    """[n_expert] Wanda score over the layer's mean."""
    bytes: int
    bytes_by_type: dict[str, int]
    """Tier tensors with their padding; what is left of `bytes` is the map."""
    kld: float | None
    """Nats that the layer's errors add at this plan."""


@dataclass(frozen=True)
class Point:
    """Experts of so many bytes, and the KL divergence predicted for them."""

    name: str
    bytes: int
    kld: float
    """Nats."""


@dataclass(frozen=True)
class Choice:
    """Another plan of the same bytes, to compare with."""

    copies: int
    kld: float
    """Nats."""
    lis: float
    """Mean over layers."""
    log_lis: float
    """Mean over layers of ln LIS."""


@dataclass(frozen=True)
class Cover:
    """The busiest `experts` of every layer in fast memory."""

    experts: int
    bytes: int
    """Of their primaries, in all layers."""
    mean: float
    """Share of the selections that they catch, mean over layers."""
    worst: float
    """Of the layer where they catch least."""


@dataclass(frozen=True)
class Rate:
    """Experts of a KL divergence, and the speed predicted for them on a machine with some VRAM."""

    name: str
    kld: float | None
    """Nats; None where unknown."""
    decode: float
    """Tokens per second of one sequence, the busy experts in VRAM."""
    stock: float
    """The same in the best of stock llama.cpp's layouts of the same VRAM."""


@dataclass(frozen=True)
class Report:
    """Everything that a report says. KL divergences are predicted, in nats; load is that of the calibration text."""

    name: str
    model: str
    written: bool
    n_expert: int
    """Of the layer with most."""
    n_expert_used: int
    tokens: int
    budget: str
    dispatch: str
    layers: tuple[Layer, ...]
    file_bytes: int | None
    expert_bytes: int
    map_bytes: int
    bits_per_weight: float
    bytes_by_type: dict[str, int]
    """From few bits to many."""
    lis_before: float | None
    """Mean over layers."""
    lis_after: float | None
    log_lis: float | None
    """Mean over layers of ln LIS, with the copies."""
    importance_rank_correlation: float | None
    """Spearman's, of importance and load, mean over layers."""
    kld: float | None
    chosen: Point | None
    frontier: tuple[Point, ...]
    """Best plans without copies, from few bytes to many."""
    uniform: tuple[Point, ...]
    """All experts in one type."""
    plain: Choice | None
    """The best plan without copies in these bytes."""
    balanced: Choice | None
    """The plan with copies in these bytes: this one if it has any, else what automatic planning makes, else one copy per layer."""
    coverage: tuple[Cover, ...]
    vram: int | None
    """Bytes that the user has for experts."""
    notes: tuple[str, ...]
    machine: str | None = None
    """Whose speed is predicted; None where there is no VRAM to predict for, or the load is unknown."""
    rate: Rate | None = None
    """Of this plan or file."""
    rates: tuple[Rate, ...] = ()
    """Of the frontier."""
    uniform_rates: tuple[Rate, ...] = ()
    """Of all experts in one type."""

    @property
    def n_copies(self) -> int:
        return sum(sum(layer.copies) for layer in self.layers)

    @property
    def types(self) -> tuple[str, ...]:
        """Types in use, from few bits to many."""
        return tuple(self.bytes_by_type)


def covered(report: Report, size: int) -> Cover | None:
    """The largest set of busy experts within `size` bytes; None where not even one expert per layer fits, or the load is unknown."""
    return next((c for c in reversed(report.coverage) if c.bytes <= size), None)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data for json.dump."""
    data = asdict(report) | {"copies": report.n_copies}
    cover = None if report.vram is None else covered(report, report.vram)
    return data | {"vram_cover": None if cover is None else asdict(cover)}
