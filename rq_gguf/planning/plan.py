"""The plan: which types and copies every layer gets. Data and its JSON; choosing is in `budget` and `paper`."""

from dataclasses import dataclass, field
from typing import Any

from rq_gguf.format import DEFAULT_DISPATCH_BLOCK

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
    summary: dict[str, Any] = field(default_factory=dict)
    """Predicted figures for people (LIS before and after, error); nothing reads them back."""
