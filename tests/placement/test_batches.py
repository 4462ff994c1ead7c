"""Batches out of traces and out of loads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.samples import sample_trace

from rq_gguf.calibration.trace import Trace
from rq_gguf.placement.batches import counts_from_shares, counts_of, draw, halves, whole


@pytest.mark.parametrize("sequences", [1, 2, 3, 12, 100])
def test_halves_share_no_token(sequences: int) -> None:
    trace = sample_trace(sequences=sequences)
    first, second = halves(trace)
    if sequences == 1:
        assert first.tokens.tolist() == second.tokens.tolist() == list(range(32))
        return
    assert not set(first.tokens) & set(second.tokens)
    assert len(first.tokens) + len(second.tokens) == trace.n_tokens
    assert min(len(first.sequences), len(second.sequences)) >= sequences // 3


def test_a_batch_takes_one_token_of_a_sequence() -> None:
    trace = sample_trace(sequences=12, length=32)
    tokens = draw(whole(trace), 12, 50, np.random.default_rng(0))
    assert (np.sort(tokens // 32, axis=1) == np.arange(12)).all()
    more = draw(whole(trace), 30, 5, np.random.default_rng(0))
    counts = np.stack([np.bincount(row // 32, minlength=12) for row in more])
    assert counts.min() == 2 and counts.max() == 3
    assert len(np.unique(tokens % 32)) == 32


def test_counts_by_hand() -> None:
    ids = np.array([[0, 2], [1, 2], [3, 0], [2, 3]], dtype=np.uint8)
    trace = Trace("m", 4, 8, 8, np.array([0, 4]), (0,), (ids,))
    tokens = np.array([[0, 1], [2, 2], [3, 0]])
    assert counts_of(whole(trace), tokens, 0).tolist() == [[1, 1, 2, 0], [2, 0, 0, 2], [1, 0, 2, 1]]
    assert trace.selections().tolist() == [[2, 1, 3, 2]]
    assert trace.selections(np.array([1, 3])).tolist() == [[0, 1, 2, 1]]


def test_counts_do_not_depend_on_how_they_are_cut(monkeypatch) -> None:
    trace = sample_trace()
    tokens = draw(whole(trace), 9, 20, np.random.default_rng(1))
    expected = counts_of(whole(trace), tokens, 1)
    monkeypatch.setattr("rq_gguf.placement.batches._AT_ONCE", 40)
    assert (counts_of(whole(trace), tokens, 1) == expected).all()


@given(st.lists(st.integers(1, 50), min_size=4, max_size=12), st.integers(1, 4))
def test_tokens_from_shares_pick_different_experts(load: list[int], n_used: int) -> None:
    counts = counts_from_shares(np.array(load, dtype=float), n_used, 1, 40, np.random.default_rng(0))
    chance = np.array(load) / sum(load) * n_used
    assert counts.max() <= 1
    if chance.max() <= 1:
        assert (counts.sum(axis=1) == n_used).all()


def test_tokens_from_shares_keep_the_shares() -> None:
    share = np.array([0.4, 0.3, 0.2, 0.05, 0.05])
    counts = counts_from_shares(share, 2, 1000, 100, np.random.default_rng(0))
    assert counts.sum(axis=1).tolist() == [2000] * 100
    # 100,000 tokens: the standard error of a share is below 0.0008.
    assert counts.sum(axis=0) / counts.sum() == pytest.approx(share, abs=0.004)
