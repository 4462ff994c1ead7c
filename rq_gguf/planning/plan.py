"""The plan: which types and copies every layer gets. Data and its JSON; choosing is in `budget` and `paper`."""

from dataclasses import dataclass, field
from typing import Any

from rq_gguf.format import DEFAULT_DISPATCH_BLOCK, MAX_TIERS

Instances = tuple[tuple[str, ...], ...]
"""[n_expert][instances] ggml type names in lower case, the primary's first."""


@dataclass(frozen=True)
class LayerPlan:
    """One block's routed experts. Both groups have the same number of instances per logical expert."""

    layer: int
    gate_up: Instances
    down: Instances

    @property
    def groups(self) -> tuple[Instances, Instances]:
        """In the order of format.GROUPS."""
        return (self.gate_up, self.down)

    @property
    def n_expert(self) -> int:
        return len(self.gate_up)

    @property
    def copies(self) -> tuple[int, ...]:
        """[n_expert] copies beyond the primary."""
        return tuple(len(row) - 1 for row in self.gate_up)


@dataclass(frozen=True)
class Optimum:
    """What the optimizer proved: every plan of the same types, tiers and choice of copies has at least `bound` of
    KLD + balance_price x (sum over layers of ln LIS) + price x bytes. KLD is the tangent of the predicted KLD at the plan found
    (error.ErrorModel), LIS is that of the calibration text."""

    price: float
    """Nats of KLD per byte: about what the last byte saved."""
    balance_price: float
    """Nats of KLD per unit of ln LIS of a layer."""
    bound: float


@dataclass(frozen=True)
class Plan:
    """What the write step needs, and where it came from."""

    policy: str
    budget: str
    """As the user gave it."""
    budget_bytes: int
    """Most bytes that tier tensors, their padding and maps may take."""
    expert_bytes: int
    """Bytes that they will take."""
    types: tuple[str, ...]
    """Types that were allowed, from few bits to many; the order of tiers in the file is the reverse."""
    layers: tuple[LayerPlan, ...]
    calibration_sha256: str
    calibration_tokens: int
    model: str
    dispatch: str = "balanced"
    dispatch_block: int = DEFAULT_DISPATCH_BLOCK
    feedback: bool = False
    """Whether gate and up are quantized with error feedback (see calibration.feedback)."""
    max_tiers: int = MAX_TIERS
    """Most types that a layer and group was to use."""
    balance_weight: float | None = None
    """Per cents of KLD for a per cent of LIS, where that decided on copies."""
    target_kld: float | None = None
    """Predicted KLD that the experts may cause, where that was wanted instead of a number of bytes."""
    optimum: Optimum | None = None
    """None for a plan that was not optimized."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Predicted figures for people (LIS before and after, KLD); nothing reads them back."""
