"""Which experts VRAM holds: cases counted by hand, and the vectors that the runtime is tested with too."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram import vectors

from rq_gguf.vram import policy


def test_a_selection_is_worth_half_after_the_half_life() -> None:
    counts = policy.decayed(np.zeros(2), np.array([[0]]))
    assert counts.tolist() == [1, 0]
    for _ in range(128):
        counts = policy.decayed(counts, np.array([[1]]))
    assert counts[0] == pytest.approx(0.5)


def test_a_batch_counts_as_its_tokens_do() -> None:
    """Tokens pick 0 and 1, then 0 and 2: what came first is worth a little less."""
    one = 0.5 ** (1 / 128)
    assert policy.decayed(np.array([4.0, 0, 0]), np.array([[0, 1], [0, 2]])).tolist() == pytest.approx([4 * one**2 + one + 1, one, 1])
    ids = np.random.default_rng(0).integers(0, 5, (2, 9, 3))
    whole, parts = policy.decayed(np.zeros((2, 5)), ids), np.zeros((2, 5))
    for t in range(9):
        parts = policy.decayed(parts, ids[:, t : t + 1])
    assert parts == pytest.approx(whole)


def test_scores_and_sets() -> None:
    """32 tokens of 2 selections: a share of a quarter counts 16."""
    score = policy.scores(np.array([0.25, 0.75, 0.0]), 2, np.array([1.0, 0.0, 17.0]))
    assert score.tolist() == [17.0, 48.0, 17.0]
    assert policy.fill(score, 2).tolist() == [True, True, False]  # 0 before 2: the lower number
    assert policy.fill(score, 2, np.array([False, False, True])).tolist() == [False, True, True]  # who is inside stays
    assert policy.fill(score, 0).sum() == 0 and policy.fill(score, 3).all()


@pytest.mark.parametrize(("outside", "done"), [(1.2499, False), (1.25, True)])
def test_an_exchange_gains_a_quarter(outside: float, done: bool) -> None:
    score, held = np.array([1.0, outside, 3.0, 0.5]), np.array([True, False, True, False])
    made = policy.exchange(score, held)
    assert (int(made.taken), int(made.left), bool(made.worth)) == (1, 0, done)
    assert policy.exchanged(held, made).tolist() == ([False, True, True, False] if done else held.tolist())


def test_a_look_every_64_tokens() -> None:
    shares = np.array([0.8, 0.2])
    state = policy.start(shares, 1)
    for i in range(1, 65):
        assert state.held.tolist() == [True, False]
        state = policy.step(state, shares, 1, np.array([[1]]), "text")
        assert state.waited == i % 64
    # 32 x 0.8 = 25.6 for the first; 32 x 0.2 and about 54 of the 64 for the second.
    assert state.held.tolist() == [False, True]


def test_a_part_of_a_prompt_moves_nothing() -> None:
    shares = np.array([0.9, 0.1])
    state = policy.step(policy.start(shares, 1), shares, 1, np.ones((100, 1), dtype=int), "prompt")
    assert state.held.tolist() == [True, False] and state.waited == 0
    assert policy.step(state, shares, 1, np.array([[0]]), "end").held.tolist() == [False, True]


def test_nothing_known_and_nothing_seen_moves_nothing() -> None:
    state = policy.State(np.zeros(3), np.array([False, True, False]))
    assert not bool(policy.exchange(state.counts, state.held).worth)


@given(seed=st.integers(0, 1000), n_expert=st.integers(1, 12), slots=st.integers(0, 12), phase=st.sampled_from(["prompt", "end", "text"]))
def test_the_number_of_slots_stays_and_one_expert_moves(seed: int, n_expert: int, slots: int, phase: str) -> None:
    rng = np.random.default_rng(seed)
    shares, slots = rng.dirichlet(np.ones(n_expert), size=3), min(slots, n_expert)
    state = policy.start(shares, slots)
    for _ in range(4):
        after = policy.step(state, shares, 2, rng.integers(0, n_expert, (3, 64, 2)), phase)  # type: ignore[arg-type]
        assert (after.held.sum(axis=1) == slots).all()
        assert phase == "end" or ((after.held & ~state.held).sum(axis=1) <= 1).all()
        state = after


def test_vectors() -> None:
    """The file is what the code says; a change of the policy needs `python tests/vram/vectors.py`, and the runtime's tests too."""
    stored = json.loads(vectors.FILE.read_text(encoding="utf-8"))
    assert {key: value for key, value in stored.items() if key != "cases"} == {
        "half_life": policy.HALF_LIFE,
        "prior": policy.PRIOR,
        "interval": policy.INTERVAL,
        "gain": policy.GAIN,
    }
    assert len(stored["cases"]) == 6
    for case in stored["cases"]:
        assert vectors.replay(case) == case["held"], case["name"]
