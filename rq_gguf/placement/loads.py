"""How busy a model's experts are, whatever says so."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.trace import Trace


@dataclass(frozen=True)
class Loads:
    """How busy a model's experts are."""

    model: str
    layers: tuple[int, ...]
    """Blocks with routed experts."""
    load: NDArray[np.float64]
    """[layers, n_expert] selections, or shares of them: they mean the same up to a factor per layer."""
    n_expert_used: int | None = None
    """None where the file does not say."""
    n_embd: int | None = None
    n_ff: int | None = None
    trace: Trace | None = None
    instances: NDArray[np.int64] | None = None
    """[layers, n_expert] instances that a plan gives each expert."""

    @property
    def n_expert(self) -> int:
        return int(self.load.shape[1])


def loads_of_trace(trace: Trace) -> Loads:
    """Those of all its tokens."""
    load = trace.selections().astype(np.float64)
    return Loads(trace.model, trace.layers, load, trace.n_expert_used, trace.n_embd, trace.n_ff, trace)
