"""The figures of a report: counted by hand, and the same from a plan and from the file made of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.samples import four_experts, planned, stored
from synthetic import synthetic_calibration

from rq_gguf import gguf_file as gg
from rq_gguf.errors import UserError
from rq_gguf.planning.budget import uniform_bytes
from rq_gguf.report.data import Report, covered, to_json
from rq_gguf.report.gather import gather, subject_of_file, subject_of_plan
from rq_gguf.types import row_bytes
from rq_gguf.writing.tiered import open_tiered

Q4, Q8 = (256 * row_bytes(t, 256) for t in ("q4_k", "q8_0"))  # bytes of a matrix


def report_of(budget: str = "q4_k", replicas: str | int = 1, **options: object) -> Report:
    c = synthetic_calibration(**{"n_layers": 3, "n_expert": 8, **options})  # type: ignore[arg-type]
    return gather(subject_of_plan("c.gguf", c, planned(c, budget, replicas)))


def test_counted_by_hand() -> None:
    c, plan = four_experts()
    r = gather(subject_of_plan("c.gguf", c, plan))
    layer = r.layers[0]
    assert layer.share == (0.6, 0.2, 0.15, 0.05) and layer.copies == (1, 0, 0, 0) and r.n_copies == 1
    assert layer.lis_before == pytest.approx(4 * 0.6) and layer.lis_after == pytest.approx(4 * 0.3)
    assert r.log_lis == pytest.approx(np.log(1.2))
    assert layer.importance == (0.5, 1.0, 2.0, 0.5)
    # gate and up: 1 in q8_0 and 4 in q4_k; down: 4 in q8_0 and 1 in q4_k.
    assert r.bytes_by_type == {"q4_k": 2 * 4 * Q4 + Q4, "q8_0": 2 * Q8 + 4 * Q8}
    assert r.map_bytes == 4 * 2 * 4 * 3 and r.expert_bytes == 9 * Q4 + 6 * Q8 + r.map_bytes
    # Primaries, the busiest first: q8_0 and q8_0, then q4_k and q8_0.
    assert [x.bytes for x in r.coverage] == [3 * Q8 + k * (2 * Q4 + Q8) for k in range(4)]
    assert [x.mean for x in r.coverage] == pytest.approx([0.6, 0.8, 0.95, 1.0])
    # Ranks 3 2 1 0 of the load and 0.5 2 3 0.5 of the importance: covariance -1/8, deviations sqrt(5/4) and sqrt(9/8).
    assert r.importance_rank_correlation == pytest.approx(-0.125 / np.sqrt(1.25 * 1.125))


def test_the_worst_layer_counts_for_coverage() -> None:
    c, plan = four_experts()
    other = replace(c.layers[0], layer=1, selections=np.array([25, 25, 25, 25]))
    two = replace(c, layers=(c.layers[0], other))
    r = gather(subject_of_plan("c.gguf", two, replace(plan, layers=(plan.layers[0], replace(plan.layers[0], layer=1)))))
    assert (r.coverage[0].mean, r.coverage[0].worst) == pytest.approx((0.425, 0.25))
    assert covered(r, r.coverage[2].bytes) == r.coverage[2] and covered(r, r.coverage[2].bytes - 1) == r.coverage[1]
    assert covered(r, r.coverage[0].bytes - 1) is None


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["6.5bpw", "q8_0"]), st.integers(0, 3))
def test_a_plan_s_own_figures(seed: int, budget: str, replicas: int) -> None:
    """The report says what the plan's summary says."""
    c = synthetic_calibration(2, 8, seed=seed)
    plan = planned(c, budget, replicas)
    r, s = gather(subject_of_plan("c.gguf", c, plan)), plan.summary
    assert r.expert_bytes == plan.expert_bytes and r.n_copies == s["copies"]
    assert (r.lis_before, r.lis_after, r.kld) == pytest.approx((s["lis_before"], s["lis_after"], s["predicted_kld"]))
    assert [x.kld for x in r.layers] == pytest.approx([row["kld"] for row in s["layers"]])
    assert r.bits_per_weight == pytest.approx(s["bits_per_expert_weight"])


def test_a_file_says_what_its_plan_says(tmp_path: Path) -> None:
    c = synthetic_calibration(2, 8, types=("q4_k", "q6_k", "q8_0"))
    plan = planned(c, "6.0bpw", 2, c.types)
    of_plan = gather(subject_of_plan("c.gguf", c, plan))
    file = open_tiered(stored(tmp_path / "out.gguf", plan, c))
    of_file = gather(subject_of_file("out.gguf", file, c))
    assert of_file.written and of_file.file_bytes == (tmp_path / "out.gguf").stat().st_size and of_file.model == "synthetic"
    assert (of_file.n_expert_used, of_file.tokens, of_file.budget) == (2, 4096, "6.0bpw")
    for name in ("n_copies", "expert_bytes", "map_bytes", "bytes_by_type", "uniform", "frontier", "plain", "kld"):
        assert getattr(of_file, name) == getattr(of_plan, name), name
    for a, b in zip(of_file.layers, of_plan.layers, strict=True):
        assert (a.gate_up, a.down, a.copies, a.bytes, a.importance) == (b.gate_up, b.down, b.copies, b.bytes, b.importance)
        assert a.share == pytest.approx(b.share, rel=1e-6) and a.lis_after == pytest.approx(b.lis_after, rel=1e-6)


def test_a_file_without_its_calibration(tmp_path: Path) -> None:
    c, plan = four_experts()
    r = gather(subject_of_file("out.gguf", open_tiered(stored(tmp_path / "out.gguf", plan, c)), None))
    assert r.lis_after == pytest.approx(1.2, rel=1e-6) and r.coverage
    assert r.kld is None and r.frontier == () and r.plain is None and r.layers[0].importance is None


def test_primary_dispatch_evens_out_nothing(tmp_path: Path) -> None:
    c, plan = four_experts()
    file = open_tiered(stored(tmp_path / "out.gguf", plan, c, rq__dispatch=gg.string("primary")))
    assert gather(subject_of_file("out.gguf", file, None)).lis_after == pytest.approx(2.4, rel=1e-6)


def test_another_model_s_calibration_is_refused(tmp_path: Path) -> None:
    c, plan = four_experts()
    file = open_tiered(stored(tmp_path / "out.gguf", plan, c))
    with pytest.raises(UserError, match="the calibration is of synthetic, with 2 layers of 4 experts, and out.gguf has 1 of 4"):
        subject_of_file("out.gguf", file, synthetic_calibration(2, 4))


def test_unknown_load_is_left_out() -> None:
    c = replace(synthetic_calibration(2, 8), load_known=False)
    r = gather(subject_of_plan("c.gguf", c, planned(c, replicas=0)))
    assert r.lis_before is None and r.lis_after is None and r.coverage == () and r.balanced is None
    assert r.layers[0].share is None and r.importance_rank_correlation is None
    assert r.kld is not None and r.plain is not None


def test_an_imatrix_has_typical_errors() -> None:
    c = synthetic_calibration(2, 8)
    c = replace(c, types=(), layers=tuple(replace(x, error=x.error[:, :, :0]) for x in c.layers))
    r = gather(subject_of_plan("c.gguf", c, planned(c, "6.5bpw", 0)))
    assert r.kld is not None and [p.name for p in r.uniform] == ["q4_k", "q8_0"] and len(r.frontier) == 12
    assert "typical ones of each type stand in" in r.notes[0]


def test_a_type_that_was_not_measured() -> None:
    c, plan = four_experts()
    fewer = replace(c, types=("q8_0",), layers=tuple(replace(x, error=x.error[:, :, 1:]) for x in c.layers))
    r = gather(subject_of_plan("c.gguf", fewer, plan))
    assert r.kld is None and r.frontier == () and r.uniform == () and "measured none for some of the types" in r.notes[0]


def test_the_frontier_lies_below_every_single_type() -> None:
    r = report_of("q8_0", 0)
    klds = [p.kld for p in r.frontier]
    assert len(r.frontier) == 12 and klds == sorted(klds, reverse=True)
    for p in r.uniform:
        within = [q.kld for q in r.frontier if q.bytes <= p.bytes]
        assert within and min(within) <= p.kld * 1.000001
    assert [p.name for p in r.uniform] == ["q4_k", "q8_0"]
    c = synthetic_calibration(3, 8)
    shape = subject_of_plan("c", c, planned(c, replicas=0)).shapes[0]
    assert [p.bytes for p in r.uniform] == [uniform_bytes(shape, 3, t) for t in ("q4_k", "q8_0")]


def test_plans_to_compare_with() -> None:
    """Without copies in the same bytes, and with them: this plan's, or else others."""
    mine = report_of("6.5bpw", 2)
    assert mine.plain is not None and mine.balanced is not None and mine.kld is not None
    assert mine.plain.copies == 0 and mine.plain.kld < mine.kld and mine.plain.lis == pytest.approx(mine.lis_before)
    assert (mine.balanced.copies, mine.balanced.kld, mine.balanced.lis) == (6, mine.kld, mine.lis_after)
    without = report_of("6.5bpw", 0)
    assert without.n_copies == 0 and without.balanced is not None and without.balanced.copies > 0


def test_step_is_called_for_every_budget() -> None:
    c, plan = four_experts()
    calls: list[int] = []
    gather(subject_of_plan("c.gguf", c, plan), step=lambda: calls.append(1))
    assert len(calls) == 12


def test_json_holds_what_fits_into_memory() -> None:
    c, plan = four_experts()
    r = gather(subject_of_plan("c.gguf", c, plan), vram=3 * Q8 + 2 * Q4 + Q8)
    data = to_json(r)
    assert data["vram_cover"] == {"experts": 2, "bytes": 4 * Q8 + 2 * Q4, "mean": pytest.approx(0.8), "worst": pytest.approx(0.8)}
    assert data["copies"] == 1 and data["layers"][0]["down"][0] == ("q8_0", "q4_k")
