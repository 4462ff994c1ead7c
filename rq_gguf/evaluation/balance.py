"""How evenly experts were loaded: LIS before and after copies, from the counts of the running llama.cpp.

The patched llama.cpp writes the counts as JSON where LLAMA_EXPERT_COUNTS names a file (see patches/README.md).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.planning.load import lis

COUNTS_VARIABLE = "LLAMA_EXPERT_COUNTS"


@dataclass(frozen=True)
class LayerCounts:
    """What one block served in a run."""

    layer: int
    n_expert_used: int
    logical: NDArray[np.int64]
    """[n_expert] selections of each logical expert."""
    physical: NDArray[np.int64]
    """[n_phys] selections that each physical expert served (numbered as in gate and up); `logical` where there are no copies."""


@dataclass(frozen=True)
class Counts:
    """What all blocks served in a run."""

    n_tokens: int
    layers: tuple[LayerCounts, ...]


@dataclass(frozen=True)
class LayerBalance:
    """Load imbalance of one block, all three 1 if even."""

    layer: int
    n_expert: int
    n_phys: int
    before: float
    """LIS by logical expert: what the block would have without copies."""
    after: float
    """LIS by physical expert, over the mean load of a logical one (planning.load.lis)."""
    over_physical: float
    """The busiest physical expert's load over the mean load of a physical one."""


@dataclass(frozen=True)
class Balance:
    """Load imbalance of a whole model."""

    n_tokens: int
    layers: tuple[LayerBalance, ...]

    @property
    def before(self) -> float:
        """Mean over layers."""
        return float(np.mean([x.before for x in self.layers]))

    @property
    def after(self) -> float:
        """Mean over layers."""
        return float(np.mean([x.after for x in self.layers]))

    @property
    def over_physical(self) -> float:
        """Mean over layers."""
        return float(np.mean([x.over_physical for x in self.layers]))

    @property
    def reduction(self) -> float:
        """How many times LIS falls: the mean over layers of before / after."""
        return float(np.mean([x.before / x.after for x in self.layers]))

    @property
    def reduction_of_means(self) -> float:
        """Mean before over mean after."""
        return self.before / self.after

    @property
    def worst(self) -> LayerBalance:
        """The layer with the highest LIS after."""
        return max(self.layers, key=lambda x: x.after)


def measure_balance(counts: Counts) -> Balance:
    """Load imbalance from counts."""
    return Balance(counts.n_tokens, tuple(_layer_balance(c) for c in counts.layers))


def _layer_balance(c: LayerCounts) -> LayerBalance:
    n_expert, n_phys = len(c.logical), len(c.physical)
    return LayerBalance(c.layer, n_expert, n_phys, lis(c.logical, n_expert), lis(c.physical, n_expert), lis(c.physical, n_phys))


def read_counts(path: Path) -> Counts:
    """Read a file that llama.cpp wrote. Raises UserError where it is not there or is not whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"llama.cpp wrote no counts of experts ({path.name}): it is unpatched; run `rq-gguf runtime install`") from e
    return parse_counts(text, path.name)


def parse_counts(text: str, name: str) -> Counts:
    """Counts from their JSON. name: what to call them in the UserError that is raised where they contradict themselves."""
    try:
        data = json.loads(text)
        counts = Counts(int(data["n_tokens"]), tuple(_parse_layer(layer) for layer in data["layers"]))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{name} is not a file of expert counts ({type(e).__name__}: {e}); run `rq-gguf runtime install`") from e
    if not counts.layers:
        raise UserError(f"{name} counts no experts: the model is dense or no text was run")
    return counts


def _parse_layer(data: dict[str, Any]) -> LayerCounts:
    logical, physical = (np.array(data[key], dtype=np.int64) for key in ("logical", "physical"))
    layer, n_expert = int(data["layer"]), int(data["n_expert"])
    if logical.shape != (n_expert,) or physical.ndim != 1 or len(physical) < n_expert:
        raise ValueError(f"layer {layer} has counts of {len(logical)} logical and {len(physical)} physical experts of {n_expert}")
    if logical.sum() != physical.sum() or min(logical.min(), physical.min()) < 0:
        raise ValueError(f"layer {layer}: logical experts were selected {logical.sum()} times, physical ones served {physical.sum()}")
    return LayerCounts(layer, int(data["n_expert_used"]), logical, physical)
