"""Batches as a server would decode them, out of recorded routing, or out of loads alone. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.trace import Trace

STRETCH = 8
"""Sequences that go to planning, and then to evaluation, at a time: neighbours in the text are alike, so that they must not be parted."""
_AT_ONCE = 1 << 20  # selections
_ORDERS = 32


@dataclass(frozen=True)
class Part:
    """Sequences of a trace."""

    trace: Trace
    sequences: NDArray[np.int64]
    """Their numbers."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Numbers of all their tokens."""
        starts = self.trace.starts
        return np.concatenate([np.arange(starts[s], starts[s + 1]) for s in self.sequences])

    @property
    def selections(self) -> NDArray[np.float64]:
        """[layers, n_expert]"""
        return self.trace.selections(self.tokens).astype(np.float64)


def whole(trace: Trace) -> Part:
    """All of a trace."""
    return Part(trace, np.arange(len(trace.starts) - 1))


def halves(trace: Trace) -> tuple[Part, Part]:
    """(what to plan on, what to evaluate on): stretches of sequences in turn, so that both see all of the text and none of it twice.

    A trace of one sequence is in both.
    """
    n = len(trace.starts) - 1
    if n == 1:
        return whole(trace), whole(trace)
    stretch = min(STRETCH, -(-n // 4))
    first = np.arange(n) // stretch % 2 == 0
    return Part(trace, np.flatnonzero(first)), Part(trace, np.flatnonzero(~first))


def draw(part: Part, batch: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[n, batch] tokens of n batches: each sequence gives one, at a random place, and a second where there are fewer than the batch has."""
    starts = part.trace.starts
    begin, length = starts[part.sequences], np.diff(starts)[part.sequences]
    rounds = -(-batch // len(begin))
    order = np.concatenate([np.argsort(rng.random((n, len(begin))), axis=1) for _ in range(rounds)], axis=1)[:, :batch]
    return begin[order] + (rng.random(order.shape) * length[order]).astype(np.int64)


def counts_of(part: Part, tokens: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
    """[n, n_expert] how many tokens of each batch picked each expert. tokens: [n, batch]. layer: index into the trace's layers."""
    ids, n_expert = part.trace.ids[layer], part.trace.n_expert
    step = max(1, _AT_ONCE // (tokens.shape[1] * ids.shape[1]))
    found = []
    for at in range(0, len(tokens), step):
        chosen = ids[tokens[at : at + step]].reshape(len(tokens[at : at + step]), -1).astype(np.int64)
        flat = (chosen + n_expert * np.arange(len(chosen))[:, None]).reshape(-1)
        found.append(np.bincount(flat, minlength=n_expert * len(chosen)).reshape(len(chosen), n_expert))
    return np.concatenate(found)


def counts_from_shares(shares: NDArray[np.float64], n_used: int, batch: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[n, n_expert] as `counts_of`, of tokens that each pick n_used different experts, independently of each other.

    An expert is in a token's choice with probability n_used x share exactly (systematic sampling in random order; W. G. Madow, 1949).
    A batch has at most _ORDERS orders, which tokens take in turn: sorting is what takes the time.
    shares: [n_expert], at most 1 / n_used each, as those of real routing are; what is above is cut.
    """
    chance = np.minimum(shares / shares.sum() * n_used, 1.0)
    n_expert, orders = len(chance), min(batch, _ORDERS)
    # Each order has a stretch of its own on one long line, so that one search serves all. Rounding may leave a stretch's last end a hair
    # below the last point; after a cut, points beyond it pick nobody.
    place = np.arange(orders) * (n_used + 1.0)
    token = np.arange(batch) % orders
    found = np.empty((n, n_expert), dtype=np.int64)
    for i in range(n):
        order = np.argsort(rng.random((orders, n_expert)), axis=1)
        ends = np.cumsum(chance[order], axis=1)
        ends[:, -1] += 1e-9
        points = rng.random((batch, 1)) * (1 - 1e-9) + np.arange(n_used) + place[token, None]
        at = np.searchsorted((ends + place[:, None]).reshape(-1), points, side="right") - n_expert * token[:, None]
        hit = at < n_expert
        found[i] = np.bincount(order[np.broadcast_to(token[:, None], at.shape)[hit], at[hit]], minlength=n_expert)
    return found


def batches_for(batch: int, n_used: int) -> int:
    """How many batches of a size are enough: many small ones, few large ones."""
    return int(np.clip((1 << 17) // (batch * n_used), 8, 128))
