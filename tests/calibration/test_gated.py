"""What errors of gate and up do to hidden units, against sampled ones."""

import numpy as np
import pytest

from rq_gguf.calibration.gated import MEASURED_SHARE, hidden_sensitivity

N = 400_000


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("deviation_g", "deviation_u"), [(0.1, 0.3), (1, 1), (2, 0.5), (6, 3)])
@pytest.mark.parametrize("coherence", [1, 4])
def test_against_sampled_units(deviation_g: float, deviation_u: float, coherence: float) -> None:
    """Normal g and u whose variances are `coherence` times what the diagonal says; the hidden units' energy tells."""
    rng = np.random.default_rng(3)
    g, u = (d * rng.standard_normal(N) for d in (deviation_g, deviation_u))
    h = silu(g) * u
    a, b = hidden_sensitivity(
        np.array([deviation_g**2 / coherence]), np.array([deviation_u**2 / coherence]), np.array([np.square(h).mean()])
    )
    small = 1e-3
    of_gate = np.square(silu(g + small * rng.standard_normal(N)) * u - h).mean() / small**2
    of_up = np.square(silu(g) * (u + small * rng.standard_normal(N)) - h).mean() / small**2
    assert a[0] / MEASURED_SHARE == pytest.approx(of_gate, rel=0.05)
    assert b[0] / MEASURED_SHARE == pytest.approx(of_up, rel=0.05)


def test_units_that_never_fire_and_dead_inputs_stay_finite() -> None:
    a, b = hidden_sensitivity(np.array([1.0, 0.0, 1e9]), np.array([1.0, 0.0, 1e9]), np.array([0.0, 1.0, 1e30]))
    assert np.isfinite(a).all() and np.isfinite(b).all() and (a >= 0).all() and (b >= 0).all()
