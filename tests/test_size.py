"""Bytes and weights of files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from writing.samples import base_model

from rq_gguf.gguf_file import Tensor
from rq_gguf.size import count_weights, model_size


def test_a_stock_file(tmp_path):
    path = base_model(tmp_path / "base.gguf", stored="bf16")
    size = model_size(path)
    assert size.file_bytes == path.stat().st_size
    assert 15.9 < size.bpw < 17  # norms and routers are F32
    assert size.bpw == 8 * size.tensor_bytes / size.weights


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 3))
def test_copies_and_maps_are_no_weights(instances, tiers):
    """However many instances of the experts there are, in however many tiers."""
    n, total = len(instances), sum(instances)
    parts = [total // tiers + (i < total % tiers) for i in range(tiers)]
    stored = [
        Tensor(f"blk.0.ffn_{m}_exps.{t}.weight", "q8_0", (32, 4, k)) for m in ("gate", "up", "down") for t, k in enumerate(parts) if k
    ]
    rest = [Tensor("output.weight", "f16", (32, 10)), Tensor("output_norm.weight", "f32", (32,))]
    table = Tensor("blk.0.ffn_log2phy", "i32", (1 + max(instances), n, 2))
    assert count_weights([*stored, table, *rest]) == 3 * 32 * 4 * n + 320 + 32


@pytest.mark.parametrize("tier", [".0", ""])
def test_without_a_map_all_that_is_stored_counts(tier):
    assert count_weights([Tensor(f"blk.3.ffn_down_exps{tier}.weight", "q4_k", (256, 4, 6))]) == 256 * 24
