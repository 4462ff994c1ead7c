"""Tiered files on the patched llama.cpp against the reference: which instance serves each token, and what logits come of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden.conftest import compare
from golden.llama_lib import Job, run
from golden.reference import load
from golden.tolerance import REGRET, passes
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import write_calibration
from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.runtime.tools import library_path
from rq_gguf.writing.write import write_model

pytestmark = [pytest.mark.golden, pytest.mark.runtime]

N_LAYER, N_EXPERT = 4, 16  # of the demo model
TYPES = ("bf16", "q8_0", "q6_k", "q5_1", "q5_k", "q4_k", "iq4_xs", "iq4_nl", "q3_k", "q2_k")
"""All that multiply with activations of another kind, and some more."""
PLANS = [
    (tiers, copies, block) for tiers, copies, block in zip(range(1, 8), (16, 0, 1, 4, 16, 8, 16), (1, 16, 1, 2, 16, 1, 1), strict=True)
]
"""(tiers per matrix, most copies per layer, tokens per block)"""


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Importance that differs by expert and column; every expert was hit."""
    made = synthetic_calibration(N_LAYER, N_EXPERT, n_embd=256, n_ff=256)
    layers = tuple(replace(c, selections=np.maximum(c.selections, 1)) for c in made.layers)
    return replace(made, layers=layers, model_fingerprint="")


@pytest.fixture(scope="module")
def write(demo_base, work, calibration) -> Callable[[str, Plan], Path]:
    def make(name: str, plan: Plan) -> Path:
        path = work / f"{name}.gguf"
        write_model(demo_base, plan, calibration, path, ggml=Ggml(library_path()), progress=False)
        return path

    return make


def plan_of(layers: list[LayerPlan], block: int = 16) -> Plan:
    return Plan(
        policy="budget",
        budget="f16",
        budget_bytes=1 << 40,
        expert_bytes=0,
        types=TYPES,
        layers=tuple(layers),
        calibration_sha256="c" * 64,
        calibration_tokens=4096,
        model="demo",
        dispatch_block=block,
    )


def random_plan(seed: int, tiers: int, most_copies: int, block: int) -> Plan:
    """`tiers` types in each matrix of each layer, most_copies copies in the first layer and up to that in the others."""
    rng = np.random.default_rng(seed)
    layers = []
    for i in range(N_LAYER):
        n = most_copies if i == 0 else int(rng.integers(0, most_copies + 1))
        instances = 1 + np.bincount(rng.integers(0, N_EXPERT, n), minlength=N_EXPERT)
        groups = []
        for _ in range(2):
            types = rng.choice(TYPES, tiers, replace=False)
            each = np.concatenate([types, rng.choice(types, instances.sum() - tiers)])
            rows = np.split(rng.permutation(each), np.cumsum(instances)[:-1])
            groups.append(tuple(tuple(row.tolist()) for row in rows))
        layers.append(LayerPlan(i, *groups))
    return plan_of(layers, block)


@pytest.mark.parametrize(("tiers", "copies", "block"), PLANS)
def test_random_plans(write, compared, tiers, copies, block):
    """Decoding of 1, 2, 4 and 8 sequences and a prefill of 512 (see `steps`), in both dispatches."""
    path = write(f"random-{tiers}", random_plan(tiers, tiers, copies, block))
    for dispatch in ("balanced", "primary"):
        found = compared(path, overrides={"rq.dispatch": dispatch})
        assert found.physical_equal
        assert found.regret < REGRET
        assert passes(found.errors), [f"{e.max():.4f}" for e in found.errors]


@pytest.mark.parametrize(
    "types",
    [("tq1_0", "tq2_0", "mxfp4", "nvfp4", "q4_0", "q8_0", "f16"), ("iq1_m", "iq2_s", "iq3_xxs", "iq3_s", "q4_1", "q5_0", "q8_0")],
)
def test_types_of_every_kind(write, compared, types):
    """The rest of rq_gguf.types.TYPES, but those that the gguf package cannot read, and slow ones."""
    rng = np.random.default_rng(3)
    groups = [[tuple((str(t),) for t in rng.permutation([*types, *types, *types[:2]])) for _ in range(2)] for _ in range(N_LAYER)]
    found = compared(write(f"kinds-{types[0]}", plan_of([LayerPlan(i, *g) for i, g in enumerate(groups)])), overrides={})
    assert found.physical_equal
    assert found.regret < REGRET
    assert passes(found.errors), [f"{e.max():.4f}" for e in found.errors]


def test_default_dispatch_and_overridden_block(write, compared):
    """What the file says is used as it is, and the block can be overridden; one thread and no mmap give the same."""
    path = write("blocks", random_plan(50, 3, 16, 2))
    for overrides in ({}, {"rq.dispatch_block": 1}, {"rq.dispatch_block": 7}):
        found = compared(path, overrides=overrides, threads=1, mmap=False)
        assert found.physical_equal
        assert passes(found.errors)


def test_a_wrong_map_is_out_of_tolerance(write, runtime, steps, work):
    """Negative controls: the reference with two experts' rows of a map exchanged, and with the other dispatch."""
    groups = tuple(tuple("q2_k" if copy == e % 2 else "q8_0" for copy in range(2)) for e in range(N_EXPERT))
    path = write("wrong", plan_of([LayerPlan(i, groups, groups) for i in range(N_LAYER)], block=1))
    result = run(Job(runtime / "libllama.so", path, steps, capture=True), work)
    model = load(path)
    assert passes(compare(model, result, steps).errors)

    found = compare(replace(model, dispatch="primary"), result, steps)
    assert not found.physical_equal
    assert not passes(found.errors)

    a, b = np.bincount(result.captured[-1]["ffn_moe_topk-3"].ravel(), minlength=N_EXPERT).argsort()[-2:]
    for group in range(2):
        wrong = model.maps[3].copy()
        wrong[group, [a, b]] = wrong[group, [b, a]]
        found = compare(replace(model, maps=[*model.maps[:3], wrong]), result, steps)
        assert not found.physical_equal
        assert not passes(found.errors)


@pytest.mark.parametrize("type_name", ["q8_0", "q4_k"])
def test_one_type_without_copies_is_bit_identical_to_stock(write, stock_file, calibration, runtime, steps, work, type_name):
    imatrix = work / "imatrix.gguf"
    write_calibration(imatrix, calibration)
    rows = ((type_name,),) * N_EXPERT
    ours = write(f"uniform-{type_name}", plan_of([LayerPlan(i, rows, rows) for i in range(N_LAYER)]))
    for repack, threads in ((True, 2), (False, 1)):
        files = (ours, stock_file(type_name, imatrix))
        tiered, stock = (run(Job(runtime / "libllama.so", path, steps, repack=repack, threads=threads), work) for path in files)
        assert all(np.array_equal(a, b) for a, b in zip(tiered.logits, stock.logits, strict=True))


@pytest.mark.parametrize("type_name", ["bf16", "q8_0", "q4_k"])
def test_patched_and_unpatched_run_stock_files_bit_identically(stock_file, runtime, stock_runtime, steps, work, type_name):
    path = stock_file(type_name)
    ours, theirs = (run(Job(build / "libllama.so", path, steps), work) for build in (runtime, stock_runtime))
    assert all(np.array_equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_unpatched_llama_cpp_refuses_tiered_files(write, stock_runtime, steps, work):
    rows = (("q8_0",),) * N_EXPERT
    plain = write("refused-plain", plan_of([LayerPlan(i, rows, rows) for i in range(N_LAYER)]))
    for path in (plain, write("refused", random_plan(60, 3, 4, 16))):
        with pytest.raises(RuntimeError, match="error loading model: check_tensor_dims: tensor 'blk.0.ffn_down_exps.weight' not found"):
            run(Job(stock_runtime / "libllama.so", path, steps), work)


def test_counts_are_what_the_experts_served(write, runtime, steps, work):
    path = write("counted", random_plan(70, 3, 8, 1))
    counts = work / "counts.json"
    result = run(Job(runtime / "libllama.so", path, steps, capture=True), work, env={"LLAMA_EXPERT_COUNTS": str(counts)})
    found = json.loads(counts.read_text())
    assert found["n_tokens"] == sum(len(step.tokens) for step in steps)
    for i, (layer, table) in enumerate(zip(found["layers"], load(path).maps, strict=True)):
        logical = np.concatenate([c[f"ffn_moe_topk-{i}"].ravel() for c in result.captured])
        assert (layer["layer"], layer["n_expert"], layer["n_expert_used"]) == (i, N_EXPERT, 2)
        assert layer["logical"] == np.bincount(logical, minlength=N_EXPERT).tolist()
        physical = [c[f"ffn_moe_phys-{i}"][0].ravel() for c in result.captured]
        assert layer["physical"] == np.bincount(np.concatenate(physical), minlength=table[0, :, 0].sum()).tolist()
