"""Random calibrations for tests: skewed loads, errors that fall with the bits of a type."""

import numpy as np

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.types import typical_error


def synthetic_calibration(
    n_layers: int = 3,
    n_expert: int = 8,
    types: tuple[str, ...] = ("q4_k", "q8_0"),
    *,
    n_embd: int = 256,
    n_ff: int = 256,
    n_expert_used: int = 2,
    n_tokens: int = 4096,
    skew: float = 1.0,
    merged_gate_up: bool = False,
    seed: int = 0,
) -> Calibration:
    """A calibration of a model that does not exist.

    Loads are drawn from a log-normal distribution of width `skew` (0: uniform). Errors are the type's typical error times the expert's
    share of the load times a log-normal factor of its own.
    """
    rng = np.random.default_rng(seed)
    matrices = ("gate_up", "down") if merged_gate_up else ("gate", "up", "down")
    layers = []
    for i in range(n_layers):
        share = np.exp(skew * rng.standard_normal(n_expert))
        share /= share.sum()
        selections = rng.multinomial(n_tokens * n_expert_used, share)
        error = (selections / selections.sum())[:, None, None] * np.array([1 / 3, 2 / 3])[:, None] * [typical_error(t) for t in types]
        error = error * np.exp(rng.standard_normal((n_expert, 2, 1)) + 0.1 * rng.standard_normal((n_expert, 2, len(types))))
        columns = {m: n_ff if m == "down" else n_embd for m in matrices}
        layers.append(
            LayerCalibration(
                layer=i,
                selections=selections.astype(np.int64),
                gate_weight=selections / n_expert_used,
                output_energy=selections * rng.uniform(0.5, 2, n_expert),
                residual_energy=float(n_tokens),
                in_sum2={m: (selections[:, None] * rng.uniform(0.1, 2, (n_expert, c))).astype(np.float32) for m, c in columns.items()},
                error=error,
                wanda=rng.uniform(0.1, 1, n_expert),
            )
        )
    return Calibration(
        model="synthetic",
        model_fingerprint="0" * 64,
        arch="llama",
        types=types,
        n_tokens=n_tokens,
        text_sha256="1" * 64,
        n_expert_used=n_expert_used,
        n_embd=n_embd,
        n_ff=n_ff,
        merged_gate_up=merged_gate_up,
        layers=tuple(layers),
    )
