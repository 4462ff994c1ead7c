"""plan.json: written, read, edited, broken."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.planning.file import plan_text, read_plan, write_plan
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import make_plan

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
    write_plan(tmp_path / "plan.json", a_plan())
    return tmp_path / "plan.json"


def test_round_trip(file: Path) -> None:
    read, plan = read_plan(file, CALIBRATION), a_plan()
    assert replace(read, summary={}) == replace(plan, summary={})
    assert {**read.summary, "error_gap_to_bound": None} == {**plan.summary, "error_gap_to_bound": None}  # the bound is not stored
    assert list(file.parent.iterdir()) == [file]


def test_one_line_per_layer_and_group() -> None:
    lines = plan_text(a_plan()).splitlines()
    rows = [line for line in lines if line.strip().startswith(('"gate_up": [', '"down": ['))]
    assert len(rows) == 4
    assert all(line.count('"q8_0') + line.count('"q4_k') == 8 for line in rows)
    assert sum("q8_0+q4_k" in line or "q8_0+q8_0" in line or "q4_k+q4_k" in line for line in rows) == 4
    assert plan_text(a_plan()) == plan_text(a_plan())


def test_an_edit_is_counted_anew(file: Path) -> None:
    before = read_plan(file, CALIBRATION)

    def lower_all(data: dict[str, Any]) -> None:
        data["layers"][0]["gate_up"] = ["Q4_K"] * 8
        data["layers"][0]["down"] = ["q4_k"] * 8

    after = read_plan(edited(file, lower_all), CALIBRATION)
    assert after.layers[0].gate_up == (("q4_k",),) * 8
    assert after.expert_bytes < before.expert_bytes
    assert after.summary["copies"] == before.summary["copies"] - 1
    assert after.summary["expert_bytes"] == after.expert_bytes


def test_a_type_that_was_not_measured_may_be_edited_in(file: Path) -> None:
    def lower_first(data: dict[str, Any]) -> None:
        row = data["layers"][0]["down"]
        row[0] = "+".join(["q2_k"] * len(row[0].split("+")))

    plan = read_plan(edited(file, lower_first), CALIBRATION)
    assert "q2_k" in plan.types
    assert plan.summary["error"] is None


def _set(*keys: Any, value: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("layers", 1, "gate_up", 2, value="q9_k"), r"layer 1, expert 2: gate_up has the unknown type 'q9_k'"),
        (_set("layers", 1, "down", 2, value=""), r"layer 1, expert 2: down has the unknown type ''"),
        (_set("layers", 0, "down", 5, value=7), r"layer 0, expert 5: down is 7 instead of types"),
        (_set("layers", 0, "gate_up", 5, value="q4_k+q4_k+q4_k"), r"layer 0, expert 5: 3 instances in gate_up and [12] in down"),
        (_set("layers", 0, "gate_up", value=["q8_0"] * 7), r"layer 0: gate_up lists 7 experts; the model has 8"),
        (_set("layers", 0, "gate_up", value=None), r"layer 0: gate_up lists no experts; the model has 8"),
        (_set("layers", 0, "down", value=["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "q4_0"]), r"layer 0: down has 8 types"),
        (_set("layers", 0, "gate_up", value=["f16"] * 8), r"instances in gate_up|more than the budget q8_0 allows"),
        (_set("layers", 1, "layer", value=5), r"the plan is for layers \[0, 5\], the calibration of synthetic for \[0, 1\]"),
        (_set("layers", value="none"), r"layers must be a list"),
        (_set("dispatch", value="random"), r"dispatch 'random' is unknown"),
        (_set("dispatch_block", value=0), r"dispatch_block must be a whole number of at least 1"),
        (_set("rq_plan_version", value=2), r"plan of version 2; this rq-gguf reads version 1"),
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
        for group in ("gate_up", "down"):
            data["layers"][0][group] = ["f16" + "+f16" * text.count("+") for text in data["layers"][0][group]]

    with pytest.raises(UserError, match=r"take \d+ bytes, \d+ more than the budget q8_0 allows"):
        read_plan(edited(file, raise_all), CALIBRATION)


def test_a_size_bounds_the_whole_file(tmp_path: Path) -> None:
    size = a_plan().expert_bytes + 5000
    write_plan(tmp_path / "plan.json", a_plan(str(size), 5000))
    assert read_plan(tmp_path / "plan.json", CALIBRATION).budget_bytes == size - 5000  # as recorded
    assert read_plan(tmp_path / "plan.json", CALIBRATION, 4000).budget_bytes == size - 4000
    with pytest.raises(UserError, match="more than the budget"):
        read_plan(tmp_path / "plan.json", CALIBRATION, size // 2)


def test_a_type_that_does_not_fit_the_rows(tmp_path: Path) -> None:
    narrow = synthetic_calibration(n_layers=2, n_expert=8, n_embd=96, n_ff=32)
    plan = a_plan(calibration=narrow)
    assert plan.types == ("q5_0", "q8_0")  # llama-quantize's fallback for q4_k
    write_plan(tmp_path / "plan.json", plan)
    with pytest.raises(UserError, match="layer 0, expert 0: rows of 32 weights in down cannot be q4_k; take q5_0"):
        read_plan(edited(tmp_path / "plan.json", _set("layers", 0, "down", 0, value="q4_k")), narrow)


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
