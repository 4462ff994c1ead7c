"""Bottom-k sampling: the same sample however the tokens were batched."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_gguf.calibration.sample import Sample, bottom_k, merge, tokens_elsewhere, tokens_of

N_EXPERT = 5


def tokens(n: int, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, N_EXPERT)) * [1, 1, 1, 2, 8], axis=1)[:, :2].astype(np.int64)  # expert 4 is rare
    return Sample(torch.arange(n, dtype=torch.float32)[:, None], ids, rng.random((n, 2), dtype=np.float32), rng.random(n))


def part(s: Sample, a: int, b: int) -> Sample:
    return Sample(s.x[a:b], s.ids[a:b], s.weights[a:b], s.priority[a:b])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), size=st.integers(1, 8), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_batches_do_not_matter(n: int, size: int, seed: int, cuts: list[int]) -> None:
    everything = tokens(n, seed)
    merged: Sample | None = None
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    for a, b in zip(edges, edges[1:], strict=False):
        merged = merge(merged, part(everything, a, b), N_EXPERT, size)
    assert merged is not None
    assert len(merged.ids) <= size * N_EXPERT
    for e in range(N_EXPERT):
        mine = np.flatnonzero((everything.ids == e).any(axis=1))
        lowest = mine[np.argsort(everything.priority[mine])][:size]
        rows, weights = tokens_of(merged, e, size)
        assert merged.x[rows, 0].int().tolist() == lowest.tolist()
        assert np.array_equal(weights, [everything.weights[t, everything.ids[t].tolist().index(e)] for t in lowest])


def test_by_hand() -> None:
    ids = np.array([[0, 1], [0, 2], [0, 1], [1, 2]])
    assert bottom_k(ids, np.array([0.4, 0.3, 0.2, 0.1]), 3, 1).tolist() == [False, False, True, True]
    sample = Sample(torch.zeros(4, 1), ids, np.zeros((4, 2), dtype=np.float32), np.array([0.4, 0.3, 0.2, 0.1]))
    assert tokens_elsewhere(sample, 1, 5).tolist() == [1]
    assert tokens_elsewhere(sample, 2, 1).tolist() == [2]
