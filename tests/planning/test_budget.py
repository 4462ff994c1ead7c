"""Bytes and budgets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf import format as fmt
from rq_gguf.errors import UserError
from rq_gguf.planning.budget import ExpertShape, layer_bytes, padded, parse_budget, uniform_bytes
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.types import TYPES, row_bytes

SHAPE = ExpertShape(n_expert=4, n_embd=512, n_ff=256, merged_gate_up=False)


def test_bytes_by_hand() -> None:
    # Q8_0: 34 bytes per 32 weights. gate and up are [256, 512] each, down is [512, 256].
    assert SHAPE.expert_bytes(0, "q8_0") == 2 * 256 * 512 // 32 * 34
    assert SHAPE.expert_bytes(1, "q4_k") == 512 * 144
    assert uniform_bytes(SHAPE, 3, "q8_0") == 3 * 4 * 3 * 256 * 512 // 32 * 34
    assert SHAPE.map_bytes(2) == 2 * 4 * 4 * 4  # 1 count and 3 slots


def test_an_identity_layer_has_no_map() -> None:
    row = (("q8_0",),) * 4
    assert layer_bytes(SHAPE, LayerPlan(0, row, row)) == uniform_bytes(SHAPE, 1, "q8_0")
    mixed = (("q8_0",), ("q8_0",), ("q8_0",), ("q4_k",))
    saved = SHAPE.expert_bytes(1, "q8_0") - SHAPE.expert_bytes(1, "q4_k")
    assert layer_bytes(SHAPE, LayerPlan(0, row, mixed)) == uniform_bytes(SHAPE, 1, "q8_0") - saved + SHAPE.map_bytes(0)


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(["q8_0", "q4_0", "f16"]), st.sampled_from(["q5_1", "q8_0"])), min_size=1, max_size=3),
             min_size=4, max_size=4),
    st.booleans(),
)  # fmt: skip
def test_bytes_are_those_of_the_stacked_tensors(rows: list[list[tuple[str, str]]], merged: bool) -> None:
    """Against a layout made by the format's own functions, with rows whose tiers need padding."""
    shape = ExpertShape(n_expert=4, n_embd=96, n_ff=32, merged_gate_up=merged)
    plan = LayerPlan(0, *(tuple(tuple(pair[g] for pair in row) for row in rows) for g in range(2)))
    layouts = tuple(fmt.layout_group(group, TYPES) for group in plan.groups)
    expected = 0
    for g, layout in enumerate(layouts):
        for tier in layout.tiers:
            for matrix_rows in shape.rows(g):
                expected += padded(len(tier.instances) * matrix_rows * row_bytes(tier.type, shape.columns(g)))
    if not fmt.is_identity(layouts, 4):
        expected += padded(fmt.build_map(layouts, 4).astype(np.int32).nbytes)
    assert layer_bytes(shape, plan) == expected


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("q8_0", "type", "q8_0"),
        ("Q4_K", "type", "q4_k"),
        ("16GiB", "size", 16 * 2**30),
        ("900MB", "size", 900_000_000),
        ("1.5 gib", "size", 3 * 2**29),
        ("12345", "size", 12345),
        ("5.0bpw", "bpw", 5.0),
        ("4bpw", "bpw", 4.0),
        ("like:Model (Q4_K_M).gguf (57201664 bytes)", "size", 57201664),
    ],
)
def test_parse_budget(text: str, kind: str, value: object) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value, budget.text) == (kind, value, text)


@pytest.mark.parametrize(
    "text", ["", "lots", "16G", "-3GB", "q9_0", "1.5", "0bpw", "64bpw", "GiB", "1e9", "nan", "5 bpw bpw", "like:x.gguf", "like:(5 bytes)"]
)
def test_a_budget_that_is_not_understood(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        parse_budget(text)


def test_budgets_in_bytes() -> None:
    assert parse_budget("q8_0").expert_bytes(SHAPE, 2, 999) == uniform_bytes(SHAPE, 2, "q8_0")
    assert parse_budget("1000kB").expert_bytes(SHAPE, 2, 999) == 1_000_000 - 999
    assert parse_budget("8.5bpw").expert_bytes(SHAPE, 2, 999) == uniform_bytes(SHAPE, 2, "q8_0")
