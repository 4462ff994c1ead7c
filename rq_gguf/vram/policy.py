"""Which experts VRAM holds: the rules that the runtime follows (docs/vram.md), as pure functions. Every layer decides by itself.

An expert's score is what the calibration expects of it and what the text shows:

    score = PRIOR x k x (its share of the calibration's selections) + (its selections, each worth half after HALF_LIFE further tokens)

with k the experts per token, so that the calibration counts like PRIOR tokens that are never forgotten. Without a calibration it counts
for nothing. At a prompt's end the layer's slots go to the highest scores; from then on, every INTERVAL tokens, the highest score outside
takes the place of the lowest inside if it is at least GAIN times that. Of equal scores, those inside go before those outside, and then
lower numbers before higher ones.

Slots of a layer whose experts have one type. Where types differ an expert can only take the place of one of its own types.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]

HALF_LIFE = 128.0
"""Tokens after which a selection counts for half."""
PRIOR = 32.0
"""Tokens that the calibration is worth."""
INTERVAL = 64
"""Tokens between two looks for an exchange."""
GAIN = 1.25


@dataclass(frozen=True)
class State:
    """Of a layer, or of many: arrays [..., n_expert]."""

    counts: Floats
    """Selections, the older the less."""
    held: Flags
    """The experts in VRAM."""
    waited: int = 0
    """Tokens since the last look for an exchange."""


@dataclass(frozen=True)
class Exchange:
    """What a layer does at one look; arrays have the shape of the scores without their last axis."""

    taken: Ints
    """The expert that comes in."""
    left: Ints
    """The expert that makes room."""
    worth: Flags
    """Whether it is done."""


def decayed(counts: Floats, ids: NDArray[np.integer]) -> Floats:
    """Counts [..., n_expert] after tokens of one sequence, in order. ids: [..., tokens, n_used] the experts that they picked."""
    n = ids.shape[-2]
    worth = 0.5 ** (np.arange(n - 1, -1, -1) / HALF_LIFE)
    flat = ids.reshape(-1, n, ids.shape[-1])
    found = np.zeros((len(flat), counts.shape[-1]))
    np.add.at(found, (np.arange(len(flat))[:, None, None], flat), worth[:, None])
    return counts * 0.5 ** (n / HALF_LIFE) + found.reshape(counts.shape)


def scores(shares: Floats, n_used: int, counts: Floats) -> Floats:
    """[..., n_expert]. shares: of the calibration, their sum 1, or all 0 where there is none. n_used: experts per token."""
    return PRIOR * n_used * shares + counts


def fill(score: Floats, slots: int, held: Flags | None = None) -> Flags:
    """[..., n_expert] which experts hold the slots after an exchange of the whole set. held: before it."""
    found = np.zeros(score.shape, dtype=np.bool_)
    first = np.argsort(np.zeros(score.shape) if held is None else ~held, axis=-1, kind="stable")
    order = np.argsort(-np.take_along_axis(score, first, axis=-1), axis=-1, kind="stable")
    np.put_along_axis(found, np.take_along_axis(first, order, axis=-1)[..., :slots], True, axis=-1)
    return found


def exchange(score: Floats, held: Flags) -> Exchange:
    """The one exchange that a layer looks at. score, held: [..., n_expert]."""
    outside, inside = np.where(held, -np.inf, score), np.where(held, score, np.inf)
    most, least = outside.max(axis=-1), inside.min(axis=-1)
    return Exchange(outside.argmax(axis=-1), inside.argmin(axis=-1), (most >= GAIN * least) & (most > least))


def exchanged(held: Flags, made: Exchange) -> Flags:
    """The set after the exchanges that are worth it."""
    expert, worth = np.arange(held.shape[-1]), np.asarray(made.worth)[..., None]
    goes, comes = (worth & (np.asarray(who)[..., None] == expert) for who in (made.left, made.taken))
    return np.asarray((held & ~goes) | comes)


def start(shares: Floats, slots: int) -> State:
    """Before any text: the calibration's busiest. shares: [..., n_expert]."""
    return State(np.zeros_like(shares), fill(shares, slots))


def step(state: State, shares: Floats, n_used: int, ids: NDArray[np.integer], phase: Literal["prompt", "end", "text"]) -> State:
    """After a batch. ids: [..., tokens, n_used] as for `decayed`. phase: a part of a prompt, a prompt's last part, or generated text."""
    counts = decayed(state.counts, ids)
    if phase == "prompt":
        return replace(state, counts=counts)
    score = scores(shares, n_used, counts)
    if phase == "end":
        slots = int(state.held[(0,) * (state.held.ndim - 1)].sum())
        return State(counts, fill(score, slots, state.held))
    waited = state.waited + ids.shape[-2]
    if waited < INTERVAL:
        return State(counts, state.held, waited)
    return State(counts, exchanged(state.held, exchange(score, state.held)))
