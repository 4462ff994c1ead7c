"""The knapsack against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_gguf.planning.knapsack import hull_steps, least_error


@st.composite
def items(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cost = draw(st.lists(st.integers(1, 20), min_size=options, max_size=options))
    error = draw(st.lists(st.lists(st.integers(0, 100), min_size=options, max_size=options), min_size=n, max_size=n))
    return np.tile(np.array(cost, dtype=float), (n, 1)), np.array(error, dtype=float)


def total(table: np.ndarray, choice: np.ndarray) -> float:
    return float(table[np.arange(len(table)), choice].sum())


def brute_force(cost: np.ndarray, error: np.ndarray, capacity: float) -> float:
    choices = (np.array(c) for c in product(range(cost.shape[1]), repeat=len(cost)))
    return min((total(error, c) for c in choices if total(cost, c) <= capacity), default=np.inf)


def test_steps_by_hand() -> None:
    # The middle option of the second item lies above its hull: the item goes from the first to the last in one step.
    cost = np.array([[1.0, 2, 4], [1, 2, 4]])
    error = np.array([[9.0, 4, 1], [9, 8, 1]])
    steps = hull_steps(cost, error)
    assert list(zip(steps.item, steps.target, steps.cost, steps.gain, strict=True)) == [(0, 1, 1, 5), (1, 2, 3, 8), (0, 2, 2, 3)]


def test_what_does_not_fit_is_skipped_and_the_rest_filled() -> None:
    cost = np.array([[1.0, 11, 11], [1, 3, 3]])
    error = np.array([[100.0, 0, 0], [10, 5, 5]])
    assert least_error(cost, error, hull_steps(cost, error), 8).tolist() == [0, 1]
    assert least_error(cost, error, hull_steps(cost, error), 1.5) is None


def test_an_item_that_skips_a_step_keeps_its_earlier_ones() -> None:
    cost = np.array([[1.0, 2, 100], [1, 2, 3]])
    error = np.array([[9.0, 5, 0], [3, 2, 1.5]])
    assert least_error(cost, error, hull_steps(cost, error), 5).tolist() == [1, 2]


def test_spare_bytes_go_to_items_without_error() -> None:
    cost, error = np.array([[1.0, 2.0]]), np.zeros((1, 2))
    assert least_error(cost, error, hull_steps(cost, error), 2).tolist() == [1]


def test_a_forbidden_option_is_never_taken() -> None:
    cost, error = np.array([[1.0, 2, 3]]), np.array([[np.inf, 5, np.inf]])
    assert least_error(cost, error, hull_steps(cost, error), 9).tolist() == [1]
    assert least_error(cost, error, hull_steps(cost, error), 1) is None


@given(items(), st.integers(0, 100))
def test_near_the_optimum(tables: tuple[np.ndarray, np.ndarray], capacity: int) -> None:
    cost, error = tables
    steps = hull_steps(cost, error)
    choice = least_error(cost, error, steps, capacity)
    optimum = brute_force(cost, error, capacity)
    if choice is None:
        assert optimum == np.inf
        return
    assert total(cost, choice) <= capacity
    # What greedy can lose is less than the one step that did not fit.
    assert optimum - 1e-9 <= total(error, choice) <= optimum + max(steps.gain, default=0) + 1e-9


@given(items(), st.integers(0, 300))
def test_the_parts_can_be_exchanged(tables: tuple[np.ndarray, np.ndarray], most: int) -> None:
    """The least cost with at most so much error."""
    cost, error = tables
    steps = hull_steps(error, cost)
    choice = least_error(error, cost, steps, most)
    optimum = brute_force(error, cost, most)
    if choice is None:
        assert optimum == np.inf
        return
    assert total(error, choice) <= most
    assert optimum - 1e-9 <= total(cost, choice) <= optimum + max(steps.gain, default=0) + 1e-9


@settings(max_examples=50)
@given(items())
def test_more_capacity_never_gives_more_error(tables: tuple[np.ndarray, np.ndarray]) -> None:
    cost, error = tables
    steps = hull_steps(cost, error)
    found = [least_error(cost, error, steps, capacity) for capacity in range(101)]
    errors = [total(error, c) for c in found if c is not None]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(total(error, error.argmin(axis=1)))
