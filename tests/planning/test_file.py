"""plan.json: written, read, edited, broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.planning.budget import expert_shape
from rq_gguf.planning.error import error_model
from rq_gguf.planning.file import plan_text, read_plan, write_plan
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import make_plan
from rq_gguf.planning.summary import plan_errors

CALIBRATION = synthetic_calibration(n_layers=2, n_expert=8)
Edit = Callable[[dict[str, Any]], None]


def a_plan(budget: str = "q8_0", other_bytes: int = 0, calibration: Calibration = CALIBRATION) -> Plan:
    return make_plan(
        calibration,
        budget=budget,
        types=("q4_k", "q8_0"),
        replicas=1,
        policy="budget",
        other_bytes=other_bytes,
        calibration_sha256="c0ffee",
    )


def edited(path: Path, edit: Edit) -> Path:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", a_plan(), CALIBRATION)
    return tmp_path / "plan.json"


def test_round_trip(file: Path) -> None:
    assert read_plan(file, CALIBRATION) == a_plan()
    assert list(file.parent.iterdir()) == [file]


def test_a_plan_explains_itself() -> None:
    plan = a_plan()
    text = plan_text(plan, CALIBRATION)
    assert text == plan_text(a_plan(), CALIBRATION)
    lines = [line for line in text.splitlines() if line.startswith('      {"expert": ')]
    assert len(lines) == 16
    data = json.loads(text)
    assert data["rq_plan_version"] == 2
    assert plan.optimum is not None and data["kld_per_byte"] == plan.optimum.price > 0
    assert data["max_tiers"] == 4 and data["balance_weight"] is None
    assert data["gap"] == pytest.approx(plan.summary["gap"], rel=1e-5) and data["predicted_kld"] == pytest.approx(
        plan.summary["predicted_kld"], rel=1e-5
    )
    errors = plan_errors(CALIBRATION, expert_shape(CALIBRATION), plan.layers)
    assert errors is not None
    slope, _ = error_model(CALIBRATION).tangent(errors)
    for i, (layer, known, planned) in enumerate(zip(data["layers"], CALIBRATION.layers, plan.layers, strict=True)):
        assert layer["copies"] == 1 and layer["lis_after"] < layer["lis_before"]
        assert sum(e["share"] for e in layer["experts"]) == pytest.approx(1, abs=0.01)
        for expert in layer["experts"]:
            e = expert["expert"]
            assert expert["gate_up"].split("+") == list(planned.gate_up[e]) and expert["down"].split("+") == list(planned.down[e])
            assert expert["share"] == pytest.approx(known.selections[e] / known.selections.sum(), rel=0.01)
            assert expert["kld"]["down"]["q4_k"] == pytest.approx(slope[i, 1] * known.error[e, 1, 0], rel=0.01)
            assert list(expert["kld"]["gate_up"]) == ["q4_k", "q8_0"]
        predicted = sum(
            expert["kld"][group][t] / len(expert[group].split("+"))
            for expert in layer["experts"]
            for group in ("gate_up", "down")
            for t in expert[group].split("+")
        )
        assert layer["kld"] == pytest.approx(predicted, rel=0.01)


def test_what_explains_is_not_read(file: Path) -> None:
    def nonsense(data: dict[str, Any]) -> None:
        data |= {"gap": "none", "predicted_kld": -1, "summary": [], "expert_bytes": "many"}
        for layer in data["layers"]:
            layer |= {"lis_before": None, "kld": "?"}
            layer["experts"] = [{key: e[key] for key in ("expert", "gate_up", "down")} for e in layer["experts"]]

    assert read_plan(edited(file, nonsense), CALIBRATION) == a_plan()


def test_an_edit_is_counted_anew(file: Path) -> None:
    before = read_plan(file, CALIBRATION)

    def lower_all(data: dict[str, Any]) -> None:
        for expert in data["layers"][0]["experts"]:
            expert |= {"gate_up": "Q4_K", "down": "q4_k"}

    after = read_plan(edited(file, lower_all), CALIBRATION)
    assert after.layers[0].gate_up == (("q4_k",),) * 8
    assert after.expert_bytes < before.expert_bytes
    assert after.summary["copies"] == before.summary["copies"] - 1
    assert after.summary["expert_bytes"] == after.expert_bytes
    # The bound holds for every plan, so the gap is what the edit costs.
    assert after.summary["gap"] > before.summary["gap"] + 0.1


def test_a_plan_for_a_target(tmp_path: Path) -> None:
    calibration = synthetic_calibration(n_layers=2, n_expert=8, types=("q2_k", "q4_k", "q8_0"))
    plan = make_plan(
        calibration,
        budget=None,
        types=calibration.types,
        replicas=0,
        policy="budget",
        other_bytes=0,
        calibration_sha256="c0ffee",
        target_kld=0.003,
        other_kld=0.001,
    )
    path = tmp_path / "plan.json"
    write_plan(path, plan, calibration)
    assert read_plan(path, calibration, other_bytes=123) == plan

    def raise_first(data: dict[str, Any]) -> None:
        data["layers"][0]["experts"][0] |= {"gate_up": "f16", "down": "f16"}

    larger = read_plan(edited(path, raise_first), calibration)
    assert larger.budget_bytes == larger.expert_bytes > plan.expert_bytes

    def lower_all(data: dict[str, Any]) -> None:
        for expert in data["layers"][0]["experts"]:
            expert |= {"gate_up": "q2_k", "down": "q2_k"}

    with pytest.raises(UserError, match="predicted KL divergence of .*, above the target_kld of 0.002"):
        read_plan(edited(path, lower_all), calibration)


def test_a_type_that_was_not_measured_may_be_edited_in(file: Path) -> None:
    def lower_first(data: dict[str, Any]) -> None:
        expert = data["layers"][0]["experts"][0]
        expert["down"] = "+".join(["q2_k"] * len(expert["down"].split("+")))

    plan = read_plan(edited(file, lower_first), CALIBRATION)
    assert "q2_k" in plan.types
    assert plan.summary["predicted_kld"] is None and plan.summary["gap"] is None
    text = plan_text(plan, CALIBRATION)
    assert json.loads(text)["layers"][0]["experts"][0]["kld"]["down"].keys() == {"q4_k", "q8_0"}


def _set(*keys: Any, value: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def _eight_types(data: dict[str, Any]) -> None:
    for expert, t in zip(data["layers"][0]["experts"], ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "q4_0"], strict=True):
        expert |= {"gate_up": "q4_k", "down": t}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("layers", 1, "experts", 2, "gate_up", value="q9_k"), r"layer 1, expert 2: gate_up has the unknown type 'q9_k'"),
        (_set("layers", 1, "experts", 2, "down", value=""), r"layer 1, expert 2: down has the unknown type ''"),
        (_set("layers", 0, "experts", 5, "down", value=7), r"layer 0, expert 5: down is 7 instead of types"),
        (_set("layers", 0, "experts", 5, "down", value=None), r"layer 0, expert 5: down is None instead of types"),
        (_set("layers", 0, "experts", 5, "gate_up", value="q4_k+q4_k+q4_k"), r"layer 0, expert 5: 3 instances in gate_up and [12] in down"),
        (_set("layers", 0, "experts", value=[{"expert": e} for e in range(7)]), r"layer 0 lists 7 experts; the model has 8"),
        (_set("layers", 0, "experts", value=None), r"layer 0 lists no experts; the model has 8"),
        (_set("layers", 0, "experts", 3, "expert", value=4), r"layer 0: the entry of expert 3 is missing or says 4; experts are listed in"),
        (_set("layers", 0, "experts", 3, value="q8_0"), r"layer 0: the entry of expert 3 is missing or says None"),
        (_eight_types, r"layer 0: down has 8 types; a layer can hold at most 7"),
        (_set("max_tiers", value=8), r"max_tiers must be a whole number from 1 to 7, not 8"),
        (_set("bound", value="high"), r"bound is 'high'; it must be a number or null"),
        (_set("balance_weight", value=True), r"balance_weight is True; it must be a number or null"),
        (_set("target_kld", value=1e-9), r"above the target_kld of 1e-09; raise some types, or the target"),
        (_set("layers", 1, "layer", value=5), r"the plan is for layers \[0, 5\], the calibration of synthetic for \[0, 1\]"),
        (_set("layers", value="none"), r"layers must be a list"),
        (_set("dispatch", value="random"), r"dispatch 'random' is unknown"),
        (_set("dispatch_block", value=0), r"dispatch_block must be a whole number of at least 1"),
        (_set("rq_plan_version", value=1), r"plan of version 1; this rq-gguf reads version 2"),
        (_set("calibration_tokens", value="many"), r"calibration_tokens is 'many'; it must be a whole number"),
        (_set("policy", value=None), r"policy is missing; it must be text"),
        (_set("types", value=["q4"]), r"types must be a list"),
        (_set("budget", value="huge"), r"--budget 'huge' is not understood"),
    ],
)
def test_refused_with_the_place(file: Path, edit: Edit, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        read_plan(edited(file, edit), CALIBRATION)
    assert "\n" not in str(e.value)


def test_more_bytes_than_the_budget(file: Path) -> None:
    def raise_all(data: dict[str, Any]) -> None:
        for expert in data["layers"][0]["experts"]:
            copies = expert["down"].count("+")
            expert |= {"gate_up": "f16" + "+f16" * copies, "down": "f16" + "+f16" * copies}

    with pytest.raises(UserError, match=r"take \d+ bytes, \d+ more than the budget q8_0 allows"):
        read_plan(edited(file, raise_all), CALIBRATION)


def test_a_size_bounds_the_whole_file(tmp_path: Path) -> None:
    size = a_plan().expert_bytes + 5000
    write_plan(tmp_path / "plan.json", a_plan(str(size), 5000), CALIBRATION)
    assert read_plan(tmp_path / "plan.json", CALIBRATION).budget_bytes == size - 5000  # as recorded
    assert read_plan(tmp_path / "plan.json", CALIBRATION, 4000).budget_bytes == size - 4000
    with pytest.raises(UserError, match="more than the budget"):
        read_plan(tmp_path / "plan.json", CALIBRATION, size // 2)


def test_a_type_that_does_not_fit_the_rows(tmp_path: Path) -> None:
    narrow = synthetic_calibration(n_layers=2, n_expert=8, n_embd=96, n_ff=32)
    plan = a_plan(calibration=narrow)
    assert plan.types == ("q5_0", "q8_0")  # llama-quantize's fallback for q4_k
    write_plan(tmp_path / "plan.json", plan, narrow)
    with pytest.raises(UserError, match="layer 0, expert 0: rows of 32 weights in down cannot be q4_k; take q5_0"):
        read_plan(edited(tmp_path / "plan.json", _set("layers", 0, "experts", 0, "down", value="q4_k")), narrow)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON: .* in line 1, column 2"),
        (b"[]", "is no plan of rq-gguf"),
        (b'{"layers": []}', "is no plan of rq-gguf"),
        (b"\xff\xfe\x00", "it is not text"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "plan.json", CALIBRATION)
    with pytest.raises(UserError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json", CALIBRATION)
