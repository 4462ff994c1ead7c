"""Traces that were not recorded."""

import numpy as np

from rq_gguf.calibration.trace import Trace


def sample_trace(
    n_expert: int = 16, n_used: int = 2, layers: tuple[int, ...] = (0, 1, 3), sequences: int = 12, length: int = 32, skew: float = 1.0
) -> Trace:
    """Tokens that pick by shares of a log-normal distribution, the same in a layer for all sequences."""
    rng = np.random.default_rng(5)
    n = sequences * length
    ids = []
    for _ in layers:
        score = skew * rng.standard_normal(n_expert) + rng.gumbel(size=(n, n_expert))
        ids.append(np.argsort(-score, axis=1)[:, :n_used].astype(np.uint8))
    return Trace("sample", n_expert, 64, 32, np.arange(sequences + 1) * length, layers, tuple(ids))
