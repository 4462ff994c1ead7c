"""Plans for a machine: within their limits, and never slower than the plain one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.planning.budget import expert_shape, plan_bytes
from rq_gguf.planning.error import error_model
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import make_plan
from rq_gguf.planning.summary import plan_errors
from rq_gguf.types import LADDER
from rq_gguf.vram.machine import MACHINES
from rq_gguf.vram.model import experts_of
from rq_gguf.vram.plans import FACTORS, TYPICAL, Setting, choose, shares
from rq_gguf.vram.speed import Layout, Rest, held

SETTING = Setting(MACHINES["12gb"], Rest(0, 6, 1e8), TYPICAL)


def plain(c: Calibration, budget: str = "q4_k") -> Plan:
    return make_plan(c, budget=budget, types=LADDER, replicas=0, policy="budget", other_bytes=0, calibration_sha256="c" * 64)


def model(seed: int = 0, n_layers: int = 6, n_expert: int = 16) -> Calibration:
    return synthetic_calibration(n_layers, n_expert, LADDER, n_embd=2048, n_ff=1024, n_tokens=65536, seed=seed)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), part=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), room=st.sampled_from([None, 1.0, 1.05]))
def test_choices(seed: int, part: float, room: float | None) -> None:
    c = model(seed)
    first = plain(c)
    ram, vram = np.inf if room is None else room * first.expert_bytes, part * first.expert_bytes
    found = choose(c, first, SETTING, vram, ram)
    assert found[0].plan is first
    shape = expert_shape(c)
    for i, choice in enumerate(found):
        errors = plan_errors(c, shape, choice.plan.layers)
        assert errors is not None
        assert error_model(c).kld(errors) == pytest.approx(choice.kld)
        assert choice.kld <= max(FACTORS) * found[0].kld * (1 + 1e-9)
        assert choice.plan.expert_bytes == plan_bytes(shape, choice.plan.layers)
        assert choice.plan.expert_bytes <= ram
        assert choice.speed.vram_bytes <= vram
        assert choice.speed.decode >= choice.speed.stock_decode
        assert i == 0 or choice.speed.decode > found[i - 1].speed.decode
        for layer in choice.plan.layers:
            assert max(len({t for row in group for t in row}) for group in layer.groups) <= first.max_tiers


def test_cold_experts_go_lower() -> None:
    """What is read from RAM most gets fewer bits than the plain plan gives it; what VRAM holds does not pay for it."""
    c = model(n_expert=32)
    first = plain(c)
    found = choose(c, first, SETTING, 0.25 * first.expert_bytes)
    assert len(found) > 1
    fast = found[-1]

    def cold_reads(plan: Plan) -> float:
        e = experts_of(plan.layers, expert_shape(c), shares(c), c.n_expert_used, SETTING.machine)
        return float((e.bytes * e.shares)[~held(e, Layout(0, 8))].sum())

    assert cold_reads(fast.plan) < 0.97 * cold_reads(first)


def test_more_vram_is_not_slower() -> None:
    c = model()
    first = plain(c)
    speeds = [max(x.speed.decode for x in choose(c, first, SETTING, part * first.expert_bytes)) for part in np.linspace(0, 1, 4).tolist()]
    assert all(b >= a * 0.99 for a, b in zip(speeds, speeds[1:], strict=False))
