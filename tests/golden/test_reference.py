"""The reference itself: its rules by hand, its forward pass against transformers, and what stock files differ from it by."""

import numpy as np
import pytest
import torch
from golden.conftest import compare
from golden.llama_lib import Job, run
from golden.reference import Reference, load, nmse, physical_ids
from golden.tolerance import MEDIAN, REGRET, UPPER, passes

TABLE = np.array([[[2, 3, 0], [1, 1, -1], [1, 2, -1]], [[2, 0, 2], [1, 3, -1], [1, 1, -1]]], dtype=np.int32)
"""Three experts, the first with a copy, numbered differently in the two groups."""


def test_primary_dispatch():
    assert physical_ids(np.array([[0, 1], [2, 0]]), TABLE, "primary", 1).tolist() == [[[3, 1], [2, 3]], [[0, 3], [1, 0]]]


def test_balanced_dispatch_alternates_between_instances():
    ids = np.array([[0, 1], [0, 2], [1, 0]])
    assert physical_ids(ids, TABLE, "balanced", 1)[0].tolist() == [[3, 1], [0, 2], [1, 3]]


def test_balanced_dispatch_in_blocks():
    ids = np.zeros((5, 1), dtype=np.int64)
    assert physical_ids(ids, TABLE, "balanced", 2)[1, :, 0].tolist() == [0, 0, 2, 2, 0]


def test_nmse_ignores_a_shift_of_all_logits():
    x = np.array([[1.0, -1.0, 0.0], [2.0, 0.0, -2.0]], dtype=np.float32)
    y = x + np.float32(7)
    y[1, 0] += 3
    assert nmse(y, x)[0] < 1e-12
    assert nmse(y, x)[1] == pytest.approx((2**2 + 1 + 1) / 8)


@pytest.mark.golden
def test_reference_is_the_model_in_transformers(demo_base, demo_model, tokens):
    from transformers import AutoModelForCausalLM

    ids = np.array([1, *tokens[:63]])
    expected = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()(torch.as_tensor(ids)[None]).logits[0]
    logits = Reference(load(demo_base)).step(ids, np.arange(len(ids)), np.zeros_like(ids))
    assert nmse(logits.numpy(), expected.detach().numpy()).max() < 1e-9


@pytest.mark.golden
@pytest.mark.parametrize("type_name", ["bf16", "q8_0", "q6_k", "q5_1", "q4_k", "q2_k"])
def test_stock_files_are_within_half_the_tolerance(compared, stock_file, type_name):
    found = compared(stock_file(type_name))
    assert found.regret < REGRET
    for errors in found.errors:
        assert np.median(errors) < MEDIAN / 2
        assert errors.max() < UPPER / 2


@pytest.mark.golden
def test_a_wrong_expert_is_out_of_tolerance(runtime, stock_file, steps, work):
    """Negative control: the reference takes the next expert's weights for one of the 16 experts of one layer."""
    path = stock_file("q2_k")
    result = run(Job(runtime / "libllama.so", path, steps, capture=True), work)
    assert passes(compare(load(path), result, steps).errors)
    busiest = np.bincount(result.captured[-1]["ffn_moe_topk-2"].ravel()).argmax()
    wrong = load(path)
    for weights in wrong.experts[2].values():
        weights[busiest] = weights[(busiest + 1) % 16]
    assert not passes(compare(wrong, result, steps).errors)
