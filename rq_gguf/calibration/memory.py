"""How much memory a calibration takes, and what of it can be done without: hidden states go to disk, fewer sequences pass at a time."""

import contextlib
import ctypes
import gc
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from rq_gguf.calibration.families import MoeBlock
from rq_gguf.errors import UserError

BATCH = 8
"""Most sequences that pass at a time."""
_GPU_BATCH = 32
"""The same on a GPU with the memory for it, which has little to do with fewer."""
PROCESS = 500_000_000
"""Python and torch, as measured."""
LOADING = 1.35
"""Memory while a layer is stacked from the checkpoint's tensors and converted, or while its down matrices are kept beside changed ones,
over what the layer takes: measured 1.2."""
_IN_MEMORY, _AT_ONCE = 1 << 26, 3 << 27  # for hidden states that wait, and for the sequences that pass at a time


@dataclass(frozen=True)
class Room:
    """What fits."""

    batch: int
    """Sequences at a time."""
    spool: int
    """Bytes of hidden states that may wait in memory."""
    on_device: int = 0
    """Bytes of them that may wait on the device."""


def room(
    layers: Iterable[nn.Module],
    front: int,
    blocks: Iterable[MoeBlock],
    *,
    length: int,
    sampled: int,
    device: torch.device,
    limit: int | None,
) -> Room:
    """What fits in `limit` bytes of memory, everything counted; without one, 0.4 GB for sequences and little for hidden states.

    layers: decoder layers, perhaps without values. front: weights that are in memory beside a layer. blocks: their experts.
    length: tokens of a sequence. sampled: tokens of a layer that are kept to measure on. device: a CPU computes in memory, in float32;
    otherwise layers are stacked in memory in a type of 16 bits, and what is computed lies on the device: a quarter of what is free there
    may be sequences, another one hidden states.
    Raises UserError where not even one sequence at a time fits.
    """
    shapes = [(b.n_expert, b.top_k, *b.expert(0)[0].shape) for b in blocks]
    n_embd = max(columns for *_, columns in shapes)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    on_host = device.type == "cpu"
    size = 4 if on_host else 2
    fixed = PROCESS + round(LOADING * size * largest) + 4 * sampled * n_embd + 48 * n_embd**2
    fixed += size * front if on_host else 0
    # Of each token, an expert's inputs, both halves of its inner outputs, what comes out; attention and the residual stream.
    computing = length * size * (12 * n_embd + max(top_k * (2 * n_embd + 3 * n_ff) for _, top_k, n_ff, _ in shapes))
    per_sequence = computing if on_host else 2 * length * n_embd
    share = _free(device) // 4
    most = BATCH if on_host else max(BATCH, min(_GPU_BATCH, share // computing))
    if limit is None:
        return Room(max(1, min(most, _AT_ONCE // per_sequence)), _IN_MEMORY, share)
    if fixed + per_sequence > limit:
        raise UserError(
            f"calibrating this model takes about {(fixed + per_sequence) / 1e9:.2f} GB, one layer at a time, and --max-memory allows "
            f"{limit / 1e9:.2f}"
        )
    batch = max(1, min(most, _AT_ONCE // per_sequence, (limit - fixed) // per_sequence))
    return Room(batch, min(_IN_MEMORY, limit - fixed - batch * per_sequence), share)


def _free(device: torch.device) -> int:
    """Bytes that are free on a GPU, 0 where torch does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def release() -> None:
    """Give back to the system what is free: modules refer to each other, and glibc keeps what threads have freed for them."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
