"""Load imbalance and the placement of copies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rq_gguf.planning.load import AUTO_SHARE, choose_copies, lis, lis_curve, place_copies, split_load

loads = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 12)), elements=st.integers(0, 1000))


def test_lis_by_hand() -> None:
    assert lis(np.array([3, 3, 3, 3]), 4) == 1
    assert lis(np.array([12, 0, 0, 0]), 4) == 4  # m / k with k = 1: the worst
    assert lis(np.array([6, 2, 2, 2]), 4) == 2
    assert lis(np.array([0, 0]), 2) == 1


def test_lis_keeps_the_logical_count_with_copies() -> None:
    # One copy halves the busiest expert: the maximum is 3 of 12 and the mean stays 12 / 4.
    assert lis(np.array([3, 3, 2, 2, 2]), 4) == 1


def test_split_load_gives_every_instance_the_same() -> None:
    assert split_load(np.array([6, 2, 4]), np.array([2, 0, 1])).tolist() == [2, 2, 2, 2, 2, 2]


def test_the_next_copy_goes_to_the_highest_load_per_instance() -> None:
    selections = np.array([[10, 6, 1], [4, 4, 4]])
    assert place_copies(selections, np.array([1, 0])).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert place_copies(selections, np.array([2, 1])).tolist() == [[1, 1, 0], [1, 0, 0]]  # 10/2 < 6
    assert place_copies(selections, np.array([3, 4])).tolist() == [[2, 1, 0], [2, 1, 1]]  # 10/2 > 6/2


@given(loads, st.integers(0, 9))
def test_placing_more_never_raises_lis_and_agrees_with_the_curve(selections: np.ndarray, most: int) -> None:
    curve = lis_curve(selections, most)
    assert (np.diff(curve, axis=1) <= 1e-12).all()
    for n in range(most + 1):
        copies = place_copies(selections, np.full(len(selections), n))
        assert copies.min() >= 0 and (copies.sum(axis=1) == n).all()
        for i, row in enumerate(copies):
            assert curve[i, n] == pytest.approx(lis(split_load(selections[i], row), selections.shape[1]))


@given(loads, st.integers(0, 40))
def test_auto_stays_within_its_limits(selections: np.ndarray, most: int) -> None:
    chosen = choose_copies(selections, most)
    assert chosen.sum() <= most
    assert chosen.min() >= 0 and chosen.max() <= int(selections.shape[1] * AUTO_SHARE)


def test_auto_prefers_the_layer_where_a_copy_saves_most() -> None:
    skewed, mild, even = [80] + [8] * 15, [24] + [8] * 15, [8] * 16
    assert choose_copies(np.array([even, mild, skewed]), 1).tolist() == [0, 0, 1]
    assert choose_copies(np.array([even, mild, skewed]), 3).tolist()[0] == 0


def test_auto_spans_a_plateau() -> None:
    # Three experts share the maximum: one or two copies save nothing, three do.
    shared = np.array([[60, 60, 60] + [5] * 13])
    assert choose_copies(shared, 2).tolist() == [0]
    assert choose_copies(shared, 4).tolist() == [3]


def test_auto_leaves_a_balanced_layer_alone() -> None:
    assert choose_copies(np.full((2, 64), 100), 1000).tolist() == [0, 0]
    # A copy makes the layer 1.6 % larger and its LIS 0.5 % smaller, or 1 %.
    assert choose_copies(np.array([[1005] + [1000] * 63]), 1000).tolist() == [0]
    assert choose_copies(np.array([[1010] + [1000] * 63]), 1000).tolist() == [1]
