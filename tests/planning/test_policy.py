"""Plans as a whole: hard budgets, coverage, error, both policies."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_calibration

from rq_gguf import defaults
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import MAX_TIERS, check_map
from rq_gguf.format import build_map as make_map
from rq_gguf.format import layout_group as stack
from rq_gguf.planning.budget import expert_shape, layer_bytes, plan_bytes
from rq_gguf.planning.error import error_model
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import make_plan, parse_balance_weight, parse_max_tiers, parse_replicas, parse_target_kld
from rq_gguf.types import TYPES, rank

LADDER = ("iq2_s", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


def plan_for(
    calibration: Calibration, budget: str | None = "q8_0", replicas: str | int = "auto", policy: str = "budget", **kwargs: object
) -> Plan:
    types = kwargs.pop("types", calibration.types)
    return make_plan(
        calibration, budget=budget, types=types, replicas=replicas, policy=policy, other_bytes=0, calibration_sha256="", **kwargs
    )  # type: ignore[arg-type]


def check_sound(calibration: Calibration, plan: Plan) -> None:
    """What holds for every plan: within the budget, every expert there, primaries the most precise, maps that load."""
    shape = expert_shape(calibration)
    assert plan.expert_bytes == plan_bytes(shape, plan.layers) <= plan.budget_bytes
    assert [p.layer for p in plan.layers] == [c.layer for c in calibration.layers]
    for p in plan.layers:
        assert len(p.gate_up) == len(p.down) == shape.n_expert
        for group in p.groups:
            assert [len(row) for row in group] == [1 + n for n in p.copies]
            assert len({t for row in group for t in row}) <= plan.max_tiers
            assert all(list(row) == sorted(row, key=rank, reverse=True) for row in group)
            assert {t for row in group for t in row} <= set(plan.types)
        layouts = tuple(stack(group, tuple(reversed(plan.types))) for group in p.groups)
        n_phys = tuple(layout.n_phys for layout in layouts)
        assert check_map(make_map(layouts, shape.n_expert), n_phys, shape.n_expert) is None


calibrations = st.builds(
    synthetic_calibration,
    n_layers=st.integers(1, 4),
    n_expert=st.integers(2, 20),
    types=st.sampled_from([("q4_k", "q8_0"), ("q8_0",), ("q2_k", "q4_k", "q6_k", "q8_0"), LADDER[1:], LADDER]),
    n_embd=st.sampled_from([96, 256, 512]),
    n_ff=st.sampled_from([32, 256]),
    skew=st.floats(0, 2),
    merged_gate_up=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=100)
@given(
    calibrations,
    st.sampled_from(["q8_0", "q6_k", "q4_k", "6.0bpw", "7.3bpw", "20bpw", "100kB", "1MiB"]),
    st.sampled_from(["auto", 0, 1, 2]),
)
def test_budget_policy_is_sound_or_says_the_least(calibration: Calibration, budget: str, replicas: str | int) -> None:
    try:
        plan = plan_for(calibration, budget, replicas)
    except UserError as e:
        assert "cannot be met: the least possible is" in str(e)
        return
    check_sound(calibration, plan)
    if replicas != "auto":
        assert all(sum(p.copies) == replicas for p in plan.layers)


@given(calibrations, st.sampled_from([0, 1, 2]), st.sampled_from(["", "bpw"]))
def test_the_least_possible_is_possible(calibration: Calibration, replicas: int, unit: str) -> None:
    with pytest.raises(UserError) as e:
        plan_for(calibration, f"0.001{unit}" if unit else "1", replicas)
    least = str(e.value).split("the least possible is ")[1].split(" ")[0]
    check_sound(calibration, plan_for(calibration, least, replicas))


def test_one_type_and_no_copies_is_the_stock_file() -> None:
    calibration = synthetic_calibration(types=("q4_k", "q8_0"))
    for budget in ("q8_0", "q4_k"):
        plan = plan_for(calibration, budget, 0)
        assert plan.expert_bytes == plan.budget_bytes
        assert {t for p in plan.layers for group in p.groups for row in group for t in row} == {budget}


def test_error_adds_up_by_hand() -> None:
    calibration = synthetic_calibration(n_layers=1, n_expert=2, types=("q4_k", "q8_0"))
    layer = replace(calibration.layers[0], selections=np.array([30, 10]), error=np.array([[[8.0, 2], [4, 1]], [[6, 3], [2, 1]]]))
    calibration = replace(calibration, layers=(layer,))
    plan = plan_for(calibration, "20bpw", 1)
    assert plan.layers[0].gate_up == (("q8_0", "q8_0"), ("q8_0",))
    # Of gate and up 2 + 3, of down 1 + 1: an expert's two instances share its error.
    assert plan.summary["predicted_kld"] == pytest.approx(error_model(calibration).kld(np.array([[5.0, 2.0]])))
    assert plan.summary["lis_before"] == pytest.approx(1.5)
    assert plan.summary["lis_after"] == pytest.approx(2 * 15 / 40)
    assert plan.summary["copies"] == 1


def test_the_cheapest_experts_are_lowered() -> None:
    calibration = synthetic_calibration(n_layers=1, n_expert=4, types=("q4_k", "q8_0"))
    error = np.zeros((4, 2, 2))
    error[:, 0, 0] = [4.0, 1, 3, 2]
    error[:, 1, 0] = [40.0, 10, 30, 20]
    calibration = replace(calibration, layers=(replace(calibration.layers[0], error=error),))
    plan = plan_for(calibration, "7.5bpw", 0)  # a quarter of the bits between q8_0 and q4_k, and the map
    assert plan.layers[0].gate_up == (("q8_0",), ("q4_k",), ("q4_k",), ("q4_k",)) or plan.layers[0].down[0] == ("q8_0",)
    assert plan.layers[0].down[0] == ("q8_0",)
    assert plan.layers[0].gate_up[1] == ("q4_k",)


@pytest.mark.parametrize("max_tiers", [1, 3, MAX_TIERS])
def test_at_most_so_many_tiers(max_tiers: int) -> None:
    """Of a ladder too wide for all subsets to be tried."""
    types = ("iq1_s", "iq2_xxs", "iq2_s", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "f16")
    calibration = synthetic_calibration(2, 128, types, skew=2)
    rng = np.random.default_rng(1)
    layers = tuple(replace(c, error=c.error * np.exp(3 * rng.standard_normal((128, 2, 1)))) for c in calibration.layers)
    calibration = replace(calibration, layers=layers)
    plan = plan_for(calibration, "4.0bpw", max_tiers=max_tiers)
    check_sound(calibration, plan)
    assert max(len({t for row in group for t in row}) for p in plan.layers for group in p.groups) == max_tiers
    assert -1e-9 <= plan.summary["gap"] <= (0.05 if max_tiers == MAX_TIERS else 2)


def test_balance_is_bought_by_its_weight() -> None:
    calibration = synthetic_calibration(6, 32, LADDER, skew=0.8)
    plans = [plan_for(calibration, "q8_0", balance_weight=weight) for weight in (0.0, 0.05, 0.25, 5.0)]
    copies = [plan.summary["copies"] for plan in plans]
    assert copies[0] == 0 and copies == sorted(copies) and copies[-1] > 40
    assert max(sum(p.copies) for p in plans[-1].layers) == 8  # a quarter of the experts
    assert [p.balance_weight for p in plans] == [0.0, 0.05, 0.25, 5.0]
    assert plan_for(calibration, "q8_0", 2).balance_weight is None
    assert all(0 <= plan.summary["gap"] < 0.05 for plan in plans)


def test_a_target_instead_of_a_budget() -> None:
    calibration = synthetic_calibration(4, 32, LADDER)
    shape = expert_shape(calibration)
    plan = plan_for(calibration, None, 0, target_kld=0.01)
    check_sound(calibration, plan)
    assert plan.budget == "target-kld 0.01" and plan.budget_bytes == plan.expert_bytes and plan.target_kld == 0.01
    assert 0.0099 < plan.summary["predicted_kld"] <= 0.01 and 0 <= plan.summary["gap"] < 0.01
    # A budget of as many bytes buys as little error.
    same = plan_for(calibration, f"{8 * plan.expert_bytes / (4 * 32 * shape.weights):.6f}bpw", 0)
    assert same.summary["predicted_kld"] == pytest.approx(0.01, rel=0.01)
    # What the rest of the file causes is part of the target.
    other = plan_for(calibration, None, 0, target_kld=0.012, other_kld=0.002)
    assert other.layers == plan.layers and other.budget == "target-kld 0.012"


def test_a_target_that_cannot_be_met() -> None:
    calibration = synthetic_calibration(4, 32, LADDER)
    with pytest.raises(
        UserError, match=r"--target-kld 1e-06 cannot be met: the least possible is 0\.\d+ \(.* of experts, all as precise"
    ) as e:
        plan_for(calibration, None, target_kld=1e-6)
    assert "all else" not in str(e.value)
    with pytest.raises(UserError, match=r"; 0\.003 of all else\)") as e:
        plan_for(calibration, None, target_kld=0.002, other_kld=0.003)
    least = float(str(e.value).split("the least possible is ")[1].split(" ")[0])
    plan = plan_for(calibration, None, target_kld=least, other_kld=0.003)
    assert plan.summary["predicted_kld"] + 0.003 <= least
    with pytest.raises(UserError):
        plan_for(calibration, None, target_kld=0.999 * least, other_kld=0.003)
    with pytest.raises(UserError, match="--target-kld needs --policy budget"):
        plan_for(calibration, None, policy="paper", target_kld=0.1)
    with pytest.raises(UserError, match="neither a budget nor a target"):
        plan_for(calibration, None)


def test_a_plain_imatrix_is_planned_by_load() -> None:
    calibration = replace(synthetic_calibration(n_expert=8, types=("q4_k", "q8_0")), types=())
    plan = plan_for(calibration, "7bpw", 0, types=("q4_k", "q8_0"))
    check_sound(calibration, plan)
    for c, p in zip(calibration.layers, plan.layers, strict=True):
        low = [e for e in range(8) if p.gate_up[e] == ("q4_k",)]
        high = [e for e in range(8) if p.gate_up[e] == ("q8_0",)]
        assert not low or not high or c.selections[low].max() <= c.selections[high].min()


def test_what_the_calibration_lacks_is_named() -> None:
    calibration = synthetic_calibration()
    with pytest.raises(UserError, match=r"measured no error for q6_k \(it has q4_k, q8_0\)"):
        plan_for(calibration, types=("q4_k", "q6_k"))
    broken = calibration.layers[1].error.copy()
    broken[0, 0, 0] = np.nan
    layers = (calibration.layers[0], replace(calibration.layers[1], error=broken), calibration.layers[2])
    with pytest.raises(UserError, match="negative or non-finite error in layer 1"):
        plan_for(replace(calibration, layers=layers))
    with pytest.raises(UserError, match="--replicas 9 is more than the 8 experts"):
        plan_for(calibration, replicas=9)


def test_parse_replicas() -> None:
    assert parse_replicas("Auto", "budget") == "auto"
    assert parse_replicas("3", "budget") == 3
    for text in ("-1", "many", "1.5", ""):
        with pytest.raises(UserError, match="--replicas"):
            parse_replicas(text, "budget")
    with pytest.raises(UserError, match="exactly one copy per layer"):
        parse_replicas("2", "paper")


def test_parse_max_tiers() -> None:
    assert parse_max_tiers(None, "paper") == defaults.MAX_TIERS and parse_max_tiers("7", "budget") == 7
    for text in ("0", "8", "-1", "two", "1.5", ""):
        with pytest.raises(UserError, match="--max-tiers .* is not understood; give a number .* from 1 to 7"):
            parse_max_tiers(text, "budget")
    with pytest.raises(UserError, match="--max-tiers needs --policy budget"):
        parse_max_tiers("2", "paper")


def test_parse_balance_weight() -> None:
    assert parse_balance_weight(None, "paper", 1) == defaults.BALANCE_WEIGHT
    assert parse_balance_weight("0.5", "budget", "auto") == 0.5 and parse_balance_weight("0", "budget", "auto") == 0
    for text in ("-1", "much", "nan", "inf", ""):
        with pytest.raises(UserError, match="--balance-weight .* is not understood"):
            parse_balance_weight(text, "budget", "auto")
    with pytest.raises(UserError, match="--balance-weight and --replicas 3 exclude each other"):
        parse_balance_weight("1", "budget", 3)
    with pytest.raises(UserError, match="--balance-weight needs --policy budget"):
        parse_balance_weight("1", "paper", "auto")


def test_parse_target_kld() -> None:
    assert parse_target_kld("5e-3") == 0.005
    for text in ("0", "-1", "small", "nan", "inf", ""):
        with pytest.raises(UserError, match="--target-kld .* is not understood"):
            parse_target_kld(text)


class TestPaper:
    def test_one_low_copy_and_two_lowered_experts(self) -> None:
        calibration = synthetic_calibration(n_expert=16)
        plan = plan_for(calibration, policy="paper")
        check_sound(calibration, plan)
        shape = expert_shape(calibration)
        for c, p in zip(calibration.layers, plan.layers, strict=True):
            busiest = int(c.selections.argmax())
            least = [e for e in np.argsort(c.wanda) if e != busiest][:2]
            for group in p.groups:
                assert group[busiest] == ("q8_0", "q4_k")
                assert [e for e in range(16) if group[e] == ("q4_k",)] == sorted(least)
                assert sum(row == ("q8_0",) for row in group) == 13
            assert layer_bytes(shape, p) <= plan.budget_bytes // len(plan.layers)

    def test_the_busiest_is_never_lowered(self) -> None:
        calibration = synthetic_calibration(n_layers=1, n_expert=4)
        layer = replace(calibration.layers[0], selections=np.array([1, 9, 3, 2]), wanda=np.array([4.0, 1, 2, 3]))
        plan = plan_for(replace(calibration, layers=(layer,)), policy="paper")
        assert plan.layers[0].down == (("q8_0",), ("q8_0", "q4_k"), ("q4_k",), ("q4_k",))

    def test_a_smaller_budget_lowers_more(self) -> None:
        calibration = synthetic_calibration(n_expert=16)
        lowered = [
            sum(row == ("q4_k",) for row in plan_for(calibration, budget, policy="paper").layers[0].down)
            for budget in ("10bpw", "8.5bpw", "7bpw", "6bpw")
        ]
        assert lowered == sorted(lowered) and lowered[0] == 0 and lowered[-1] > 2

    @given(calibrations, st.sampled_from(["q8_0", "5.5bpw", "7bpw", "300kB"]))
    def test_sound_or_refused(self, calibration: Calibration, budget: str) -> None:
        try:
            plan = plan_for(calibration, budget, policy="paper")
        except UserError as e:
            assert "cannot be met" in str(e) or "two types of different size" in str(e)
        else:
            check_sound(calibration, plan)

    def test_the_least_possible_is_possible(self) -> None:
        calibration = synthetic_calibration()
        with pytest.raises(UserError, match="one copy per layer in q4_k, all but the busiest expert lowered") as e:
            plan_for(calibration, "1", policy="paper")
        least = str(e.value).split("the least possible is ")[1].split(" ")[0]
        check_sound(calibration, plan_for(calibration, least, policy="paper"))
        with pytest.raises(UserError):
            plan_for(calibration, str(int(least) - 1), policy="paper")

    def test_it_needs_wanda_scores_and_two_sizes(self) -> None:
        calibration = synthetic_calibration()
        layers = tuple(replace(layer, wanda=np.zeros(8)) for layer in calibration.layers)
        with pytest.raises(UserError, match="no Wanda scores for layer 0"):
            plan_for(replace(calibration, layers=layers), policy="paper")
        with pytest.raises(UserError, match="needs two types of different size"):
            plan_for(calibration, policy="paper", types=("q8_0",))


@pytest.mark.parametrize("types", [("q4_k", "q8_0"), LADDER])
def test_planning_is_quick(types: tuple[str, ...]) -> None:
    """Loosely, in processor time; tools/bench_planning.py measures."""
    calibration = synthetic_calibration(60, 256, types, n_embd=2048, n_ff=768)
    start = time.process_time()
    plan = plan_for(calibration, "q4_k" if types == LADDER else "q8_0")
    assert time.process_time() - start < 3
    check_sound(calibration, plan)


def test_every_type_alone_works() -> None:
    for name in TYPES:
        calibration = synthetic_calibration(1, 4, (name,))
        check_sound(calibration, plan_for(calibration, name, 0))
