"""Recorded routing: which experts every token picked, in the text's order. Small: a byte per token, layer and chosen expert.

A trace is a file of its own (a .npz), so that calibrations stay small; 65,536 tokens of 16 layers with 8 of 256 experts take 8 MB, less
when packed.
"""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.atomic import reason, replacing
from rq_gguf.errors import UserError

Ids = NDArray[np.uint8] | NDArray[np.uint16]
_VERSION = 1
_NUMBERS = ("rq_trace_version", "n_expert", "n_embd", "n_ff")
_MOST = {np.dtype(np.uint8): 256, np.dtype(np.uint16): 65536}


@dataclass(frozen=True)
class Trace:
    """What the routers of a model chose for a text."""

    model: str
    """Name of the source, for people."""
    n_expert: int
    n_embd: int
    n_ff: int
    """Rows of an expert's gate and up."""
    starts: NDArray[np.int64]
    """[sequences + 1] where each sequence of the text begins among the tokens, and where the last one ends."""
    layers: tuple[int, ...]
    """Blocks with routed experts."""
    ids: tuple[Ids, ...]
    """Per layer [n_tokens, n_expert_used] chosen experts, logical."""

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def n_expert_used(self) -> int:
        return int(self.ids[0].shape[1])

    def selections(self, tokens: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """[layers, n_expert] how many tokens picked each expert, of all or of some."""
        chosen = (ids if tokens is None else ids[tokens] for ids in self.ids)
        return np.stack([np.bincount(ids.reshape(-1), minlength=self.n_expert) for ids in chosen])


class Recorder:
    """Gathers a trace while a text passes a model."""

    def __init__(self) -> None:
        self._starts: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._ids: dict[int, list[NDArray[Any]]] = {}

    def begin(self, lengths: Iterable[int]) -> None:
        """Sequences of these lengths are about to pass, in this order."""
        self._starts = np.concatenate([[0], np.cumsum(list(lengths))]).astype(np.int64)

    def add(self, layer: int, ids: NDArray[np.integer]) -> None:
        """The layer chose ids [n, n_expert_used] for the next n tokens."""
        self._ids.setdefault(layer, []).append(ids.astype(np.uint16))

    def trace(self, model: str, n_expert: int, n_embd: int, n_ff: int) -> Trace:
        """All of it."""
        layers = tuple(sorted(self._ids))
        small = n_expert <= _MOST[np.dtype(np.uint8)]
        found = (np.concatenate(self._ids[layer]) for layer in layers)
        ids: tuple[Ids, ...] = tuple(x.astype(np.uint8) if small else x.astype(np.uint16) for x in found)
        return Trace(model, n_expert, n_embd, n_ff, self._starts, layers, ids)


def write_trace(path: Path, trace: Trace) -> None:
    """Write the file; it appears under its name only when complete. Raises UserError where it cannot be written."""
    data: dict[str, Any] = {"model": np.array(trace.model), "starts": trace.starts}
    data |= dict(zip(_NUMBERS, (_VERSION, trace.n_expert, trace.n_embd, trace.n_ff), strict=True))
    data |= {f"layer_{layer}": ids for layer, ids in zip(trace.layers, trace.ids, strict=True)}
    with replacing(path) as temporary, temporary.open("wb") as f:  # a file, not a name: numpy would append .npz to that
        np.savez_compressed(f, **data)


def is_zip(path: Path) -> bool:
    """True for what begins like a trace, or like a file of torch.save. Raises UserError for a file that cannot be read."""
    return _head(path).startswith(b"PK\x03\x04")


def is_json(path: Path) -> bool:
    """True for what begins like a JSON object. Raises UserError for a file that cannot be read."""
    return _head(path).lstrip().startswith(b"{")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(64)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from e


def is_trace(path: Path) -> bool:
    """True for a file of `write_trace`, damaged or not."""
    try:
        with zipfile.ZipFile(path) as f:
            return f"{_NUMBERS[0]}.npy" in f.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def read_trace(path: Path) -> Trace:
    """A file of `write_trace`. Raises UserError naming the file if it is another, truncated, or inconsistent."""
    try:
        with np.load(path, allow_pickle=False) as f:
            held = {name: f[name] for name in f.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError, zipfile.LargeZipFile) as e:
        raise UserError(f"{path} cannot be read as a trace of rq-gguf; make it again (rq-gguf trace)") from e
    for name in _NUMBERS:
        value = held.get(name)
        if value is None or value.ndim or value.dtype.kind not in "iu" or not 0 < int(value) < 1 << 31:
            raise _bad(path, f"{name} is missing or no number")
    version, n_expert, n_embd, n_ff = (int(held[name]) for name in _NUMBERS)
    if version != _VERSION:
        raise UserError(f"{path} is a trace of version {version}, this program knows {_VERSION}: record it again (rq-gguf trace)")
    starts = held.get("starts")
    if starts is None or starts.dtype != np.int64 or starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 1).any():
        raise _bad(path, "its sequences do not follow each other")
    named = {name.removeprefix("layer_"): ids for name, ids in held.items() if name.startswith("layer_")}
    if not named or not all(name.isdecimal() for name in named):
        raise _bad(path, "it holds no layers")
    layers = tuple(sorted(int(name) for name in named))
    ids = tuple(named[str(layer)] for layer in layers)
    for layer, chosen in zip(layers, ids, strict=True):
        if chosen.dtype not in _MOST or chosen.shape != (int(starts[-1]), ids[0].shape[-1]) or not chosen.shape[1]:
            raise _bad(path, f"layer {layer} has {chosen.dtype} {list(chosen.shape)} for {int(starts[-1])} tokens")
        if chosen.max() >= n_expert:
            raise _bad(path, f"layer {layer} names expert {int(chosen.max())} of {n_expert}")
    model = held.get("model")
    return Trace("" if model is None else str(model), n_expert, n_embd, n_ff, starts, layers, ids)


def _bad(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a usable trace: {why}; record it again (rq-gguf trace)")
