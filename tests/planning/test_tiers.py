"""The best few types against brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.planning import tiers
from rq_gguf.planning.tiers import best_subsets


def total(costs: np.ndarray) -> np.ndarray:
    """Two states: all items, and all but the last."""
    return np.stack([costs.sum(axis=1), costs[:, :-1].sum(axis=1)], axis=1)


def brute_force(values: np.ndarray, most: int) -> np.ndarray:
    return np.min([total(values[list(subset)].min(axis=0)) for subset in combinations(range(len(values)), most)], axis=0)


def check(values: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
    """The totals found are those of the subsets found."""
    best, allowed, exact = best_subsets(values, most, total)
    assert allowed.shape == (len(values), *best.shape)
    assert (allowed.sum(axis=0) == most).all()
    for row in range(best.shape[0]):
        for state in range(best.shape[1]):
            costs = values[allowed[:, row, state], row].min(axis=0)
            assert total(costs[None])[0, state] == pytest.approx(best[row, state])
    return best, exact


def test_by_hand() -> None:
    # One item wants the first type, one the last; alone, the one in between serves both best.
    values = np.array([[[0.0, 9]], [[4, 4]], [[9, 0]]])
    assert check(values, 1)[0].tolist() == [[8, 0]]
    assert check(values, 2)[0].tolist() == [[0, 0]]


@given(st.integers(2, 6), st.integers(1, 3), st.integers(2, 5), st.data())
def test_all_subsets(types: int, rows: int, items: int, data: st.DataObject) -> None:
    most = data.draw(st.integers(1, types))
    values = np.random.default_rng(data.draw(st.integers(0, 1000))).uniform(0, 9, (types, rows, items))
    best, exact = check(values, most)
    assert exact
    assert best == pytest.approx(brute_force(values, most))


def test_of_very_many_types_the_hardest_to_drop_are_tried() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 9, (14, 3, 40))
    values[[3, 5, 11]] -= 1  # better than the others
    best, exact = check(values, 7)
    assert not exact and tiers.MOST_SUBSETS < 3432
    optimum = brute_force(values, 7)
    assert (best >= optimum - 1e-9).all() and (best <= 1.02 * optimum).all()
