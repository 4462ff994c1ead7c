"""A whole MoE layer as llama.cpp builds it, against the CPU and double precision: routing, remap, gate, up, GLU, down, weighted sum."""

from pathlib import Path

import pytest
from golden.test_tiered import PLANS, random_plan
from metal.cases import Outcome, run_cases, spec

from rq_gguf.format import build_map, layout_group
from rq_gguf.planning.plan import LayerPlan

FOUR = "0,1,2,3"
TOKENS = (1, 2, 4, 8, 40)
MOST_CPU = 5e-4
MOST_EXACT_DECODE = 1e-10
MOST_EXACT_PREFILL = 2e-6
MOST_EXACT_BF16 = 5e-5
"""Activations and weights of matrix times matrix are rounded to bfloat there."""


def layer_case(layer: LayerPlan, types: tuple[str, ...], **more: object) -> str:
    """A layer with the tiers and the map that the project would write."""
    layouts = tuple(layout_group(group, tuple(reversed(types))) for group in layer.groups)
    table = build_map(layouts, layer.n_expert)
    gate_up, down = ("+".join(f"{t.type}:{len(t.instances)}" for t in layout.tiers) for layout in layouts)
    values = ",".join(str(v) for v in table.ravel())
    return spec(op="moe", experts=layer.n_expert, types=gate_up, types_down=down, slots=table.shape[2] - 1, map=values, **more)


def check(harness: Path, lines: list[str]) -> list[Outcome]:
    outcomes = run_cases(harness, lines)
    failures = []
    for outcome in outcomes:
        prefill = any(run.count("kernel_mul_mm_id") for run in outcome.runs)
        most = MOST_EXACT_DECODE if not prefill else MOST_EXACT_BF16 if "bf16" in outcome.line else MOST_EXACT_PREFILL
        failures.append(outcome.failure(MOST_CPU, most))
    assert [f for f in failures if f] == []
    return outcomes


@pytest.mark.parametrize(("tiers", "copies", "block"), PLANS)
def test_random_plans(harness: Path, tiers: int, copies: int, block: int) -> None:
    """The plans of tests/golden, in both dispatches (`primary` is block 0)."""
    plan = random_plan(tiers, tiers, copies, block)
    lines = []
    for layer in plan.layers[:2]:
        for i, tokens in enumerate(TOKENS):
            common = {"used": 2, "tokens": tokens, "norm": i % 2, "seed": tiers, "schedules": FOUR if tokens <= 8 else "0,2"}
            lines.append(layer_case(layer, plan.types, block=block, **common))
        lines.append(layer_case(layer, plan.types, block=0, used=3, tokens=4, schedules="3"))
    check(harness, lines)


def test_memory_is_reused(harness: Path) -> None:
    """Results lie where earlier ones lay, as llama.cpp's allocator places them: what overlaps must wait."""
    plan = random_plan(3, 3, 4, 2)
    lines = [
        layer_case(plan.layers[0], plan.types, block=2, used=used, tokens=tokens, norm=1, packed=1, fusion=fusion, schedules=FOUR)
        for used, tokens in ((2, 1), (4, 3), (2, 33))
        for fusion in (0, 1)
    ]
    check(harness, lines)


def test_the_fusions_of_stock_remain(harness: Path) -> None:
    """Routing and the weighted sum are one kernel each; decoding takes one launch per matrix, prefill sorts once per group of matrices."""
    plan = random_plan(4, 4, 4, 16)
    one, many = check(harness, [layer_case(plan.layers[0], plan.types, block=16, used=4, tokens=t, norm=1) for t in (1, 40)])
    kernels = [name for name, _ in one.runs[0].encoded if name != "barrier"]
    assert kernels == [
        "kernel_topk_moe_f32",
        "kernel_expert_remap_local_i32",
        "kernel_mul_mv_tiers_f32",
        "kernel_mul_mv_tiers_f32",
        "kernel_swiglu_f32",
        "kernel_mul_mv_tiers_f32",
        "kernel_moe_reduce_f32",
    ]
    assert many.runs[0].count("kernel_mul_mm_tiers_map0") == 2
    assert many.runs[0].count("kernel_mul_mm_id") == 3 * 4


def test_gate_and_up_run_at_the_same_time(harness: Path) -> None:
    """No barrier between them, and one before what reads them."""
    plan = random_plan(2, 2, 0, 16)
    (outcome,) = check(harness, [layer_case(plan.layers[0], plan.types, used=2, tokens=1)])
    names = [name for name, _ in outcome.runs[0].encoded]
    first = names.index("kernel_mul_mv_tiers_f32")
    assert names[first - 1 : first + 5] == [
        "barrier",
        "kernel_mul_mv_tiers_f32",
        "kernel_mul_mv_tiers_f32",
        "barrier",
        "kernel_swiglu_f32",
        "barrier",
    ]


@pytest.mark.parametrize("tokens", (1, 40))
def test_every_barrier_is_needed(harness: Path, tokens: int) -> None:
    """Without any one of them the result is wrong under some schedule: a missing one does not go unnoticed.

    But the one before the rows of `down` are sorted: sorting does not read what `down` multiplies, and the barrier behind it is enough.
    """
    plan = random_plan(3, 3, 4, 2)
    case = layer_case(plan.layers[0], plan.types, block=2, used=2, tokens=tokens, norm=1)
    (whole,) = check(harness, [case])
    names = [name for name, _ in whole.runs[0].encoded]
    followers = [b for a, b in zip(names, names[1:], strict=False) if a == "barrier"]
    assert len(followers) >= 5
    needed = [i for i, b in enumerate(followers) if b != "kernel_mul_mm_tiers_map0" or i == followers.index(b)]
    assert len(needed) == len(followers) - (tokens == 40)
    for outcome in run_cases(harness, [f"{case} skip_barrier={i} schedules={FOUR}" for i in needed]):
        assert outcome.failure(MOST_CPU, MOST_EXACT_PREFILL), outcome.line
