"""Load imbalance and the placement of copies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rq_gguf.planning.load import copy_order, lis, lis_curve, place_copies, split_load

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


def place(selections: np.ndarray, n: list[int]) -> list[list[int]]:
    return place_copies(copy_order(selections, max(n)), np.array(n), selections.shape[1]).tolist()


def test_the_next_copy_goes_to_the_highest_load_per_instance() -> None:
    selections = np.array([[10, 6, 1], [4, 4, 4]])
    assert copy_order(selections, 4).tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]  # 10/2 < 6, 10/2 > 6/2, 10/3 > 6/2; ties to the lowest
    assert place(selections, [1, 0]) == [[1, 0, 0], [0, 0, 0]]
    assert place(selections, [2, 1]) == [[1, 1, 0], [1, 0, 0]]
    assert place(selections, [3, 4]) == [[2, 1, 0], [2, 1, 1]]


@given(loads, st.integers(0, 9))
def test_placing_more_never_raises_lis_and_agrees_with_the_curve(selections: np.ndarray, most: int) -> None:
    order = copy_order(selections, most)
    curve = lis_curve(selections, order)
    assert curve.shape == (len(selections), most + 1) and (np.diff(curve, axis=1) <= 1e-12).all()
    for n in range(most + 1):
        copies = place_copies(order, np.full(len(selections), n), selections.shape[1])
        assert copies.min() >= 0 and (copies.sum(axis=1) == n).all()
        for i, row in enumerate(copies):
            assert curve[i, n] == pytest.approx(lis(split_load(selections[i], row), selections.shape[1]))
