"""A sample of each block's inputs, kept while the tokens pass and measured on afterwards.

Every token has a random priority, drawn once; each expert keeps the `size` tokens of lowest priority among those that picked it
(bottom-k sampling). So each expert's tokens are a uniform sample of its own, whatever the batches were, the experts share most of what is
stored (about size * n_expert / top_k tokens a layer, never more than size * n_expert), and one that is picked rarely keeps all it got.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Tokens kept for one layer, in no order."""

    x: Tensor  # [n, n_embd] block inputs
    ids: NDArray[np.int64]  # [n, top_k]
    weights: NDArray[np.float32]  # [n, top_k]
    priority: NDArray[np.float64]  # [n]


def bottom_k(ids: NDArray[np.int64], priority: NDArray[np.float64], n_expert: int, size: int) -> NDArray[np.bool_]:
    """[n] which tokens to keep: those among the `size` lowest priorities of at least one of their experts. ids: [n, top_k]."""
    by_priority = np.argsort(priority, kind="stable")
    flat = ids[by_priority].reshape(-1)
    by_expert = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=n_expert)
    rank = np.empty(flat.size, dtype=np.int64)
    rank[by_expert] = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = np.zeros(len(ids), dtype=bool)
    keep[by_priority] = (rank.reshape(ids.shape) < size).any(axis=1)
    return keep


def merge(old: Sample | None, new: Sample, n_expert: int, size: int, *, fetch: bool = True) -> Sample:
    """The sample of all tokens seen so far. `new.x` may lie on the device: only what is kept is fetched, or with fetch=False nothing."""
    n = 0 if old is None else len(old.ids)
    ids = new.ids if old is None else np.concatenate([old.ids, new.ids])
    weights = new.weights if old is None else np.concatenate([old.weights, new.weights])
    priority = new.priority if old is None else np.concatenate([old.priority, new.priority])
    keep = bottom_k(ids, priority, n_expert, size)
    fresh = new.x[torch.from_numpy(np.flatnonzero(keep[n:])).to(new.x.device)]
    fresh = fresh.cpu() if fetch else fresh
    x = fresh if old is None else torch.cat([old.x[torch.from_numpy(keep[:n]).to(old.x.device)], fresh])
    return Sample(x, ids[keep], weights[keep], priority[keep])


def tokens_of(sample: Sample, e: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(rows of the sample, their gate weights) for the at most `size` tokens that stand for expert e."""
    rows, slots = np.nonzero(sample.ids == e)
    first = np.argsort(sample.priority[rows], kind="stable")[:size]
    return rows[first], sample.weights[rows[first], slots[first]]


def tokens_elsewhere(sample: Sample, e: int, n: int) -> NDArray[np.int64]:
    """Rows of at most n tokens, of lowest priority first, that did not pick expert e."""
    rows = np.flatnonzero((sample.ids != e).all(axis=1))
    return rows[np.argsort(sample.priority[rows], kind="stable")[:n]]
