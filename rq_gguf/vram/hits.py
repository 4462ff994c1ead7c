"""What fast memory catches: the share of selections that fall on experts it holds, out of recorded routing. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.trace import Trace
from rq_gguf.placement.batches import halves
from rq_gguf.vram.policy import Floats, fill, start, step
from rq_gguf.vram.speed import Missed

PROMPT = 256
"""Tokens of every sequence that stand for a prompt; the others are counted, as if they were generated."""
PARTS = (0.125, 0.25, 0.5, 0.75)
"""Of the experts, in VRAM."""


@dataclass(frozen=True)
class Hits:
    """Of one number of slots per layer."""

    slots: int
    static: Floats
    """[layers] share that the calibration's busiest experts catch."""
    adapted: Floats
    """[layers] share that the set catches which follows the text (see policy)."""
    exchanges: float
    """Per 1000 tokens and layer, after the prompt's."""


def shares_of(selections: NDArray[np.integer] | Floats) -> Floats:
    """[..., n_expert] each expert's part of its layer's selections; all alike where nothing was selected."""
    selections = np.asarray(selections, dtype=np.float64)
    total = selections.sum(axis=-1, keepdims=True)
    return np.where(total > 0, selections / np.where(total > 0, total, 1.0), 1 / selections.shape[-1])


def caught(shares: Floats, slots: int) -> Floats:
    """[layers] share of the selections on each layer's busiest `slots` experts. shares: [layers, n_expert]."""
    return np.asarray(np.sort(shares, axis=-1)[..., ::-1][..., :slots].sum(axis=-1))


def replay(shares: Floats, trace: Trace, slots: int, prompt: int = PROMPT, sequences: NDArray[np.int64] | None = None) -> Hits:
    """What sets of `slots` experts per layer catch of a trace's sequences behind their first `prompt` tokens.

    shares: [layers, n_expert] of the calibration, where the sets start. sequences: which to count; those with no token behind the prompt
    are left out. ValueError where none is left.
    """
    lengths = np.diff(trace.starts)
    chosen = np.arange(len(lengths)) if sequences is None else sequences
    chosen = chosen[lengths[chosen] > prompt]
    if not len(chosen):
        raise ValueError(f"no sequence has more than {prompt} tokens")
    static_set = fill(shares, slots)
    static, adapted = np.zeros(len(trace.layers)), np.zeros(len(trace.layers))
    n_used, tokens, changes = trace.n_expert_used, 0, 0
    for group in _alike(chosen, lengths):
        length = int(lengths[group[0]])
        # [sequences, layers, tokens, n_used]
        ids = np.stack([np.stack([ids[trace.starts[s] : trace.starts[s] + length] for ids in trace.ids]) for s in group]).astype(np.int64)
        state = start(np.broadcast_to(shares, (*ids.shape[:2], trace.n_expert)), slots)
        state = step(state, shares, n_used, ids[:, :, :prompt], "end")
        for t in range(prompt, length):
            now = ids[:, :, t]
            static += np.take_along_axis(np.broadcast_to(static_set, state.held.shape), now, axis=-1).sum(axis=(0, 2))
            adapted += np.take_along_axis(state.held, now, axis=-1).sum(axis=(0, 2))
            before = state.held
            state = step(state, shares, n_used, now[:, :, None], "text")
            changes += int((state.held & ~before).sum())
        tokens += (length - prompt) * len(group)
    return Hits(slots, static / (tokens * n_used), adapted / (tokens * n_used), 1000 * changes / (tokens * len(trace.layers)))


def _alike(chosen: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Sequences of equal length, which can be looked at together."""
    return [chosen[lengths[chosen] == n] for n in np.unique(lengths[chosen])]


def study(
    shares: Floats, trace: Trace, sequences: NDArray[np.int64] | None = None, tick: Callable[[], object] = lambda: None
) -> list[Hits]:
    """`replay` with each of PARTS of the experts, where that is a number of its own. A text of short sequences has shorter prompts.

    tick: called after each. ValueError where no sequence has two tokens.
    """
    n = trace.n_expert
    prompt = min(PROMPT, int(np.diff(trace.starts).max()) // 2)
    slots = sorted({round(part * n) for part in PARTS} - {0, n})
    found = []
    for m in slots:
        found.append(replay(shares, trace, m, prompt, sequences))
        tick()
    return found


def study_halves(trace: Trace, tick: Callable[[], object] = lambda: None) -> list[Hits]:
    """The same without another text: the sets start from one half of the trace, the other is counted. tick, ValueError: as `study`."""
    planned, counted = halves(trace)
    return study(shares_of(planned.selections), trace, counted.sequences, tick)


def fitted(shares: Floats, found: list[Hits]) -> Missed:
    """The powers of `speed.Missed` that a study comes to, those of all numbers of slots weighted alike."""
    powers = np.zeros(2)
    for h in found:
        own = np.log(np.clip(1 - caught(shares, h.slots).mean(), 1e-6, 1 - 1e-6))
        powers += [np.log(np.clip(1 - v.mean(), 1e-6, 1 - 1e-6)) / own for v in (h.static, h.adapted)]
    static, adapted = powers / len(found)
    return Missed(float(static), float(adapted))
