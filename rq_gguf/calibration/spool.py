"""Where hidden states wait for their next layer, and what is large in a result for its reader: in files without a name."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = tuple[Any, ...]


class Spool:
    """Tensors by key. Use it in a `with`: what is on disk is gone afterwards, however the program ends."""

    def __init__(self, directory: Path | None, in_memory: int, on_device: int = 0) -> None:
        """directory: for the file, the system's temporary one if None. in_memory: bytes that may be held in memory. on_device: bytes of
        tensors that lie on another device than the CPU and may stay there."""
        self._directory, self._room, self._room_there = directory, in_memory, on_device
        self._held: dict[Key, Tensor] = {}
        self._stored: dict[Key, tuple[int, torch.Size, torch.dtype]] = {}
        self._free: dict[int, list[int]] = {}  # size -> places of that size in the file that nobody uses
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor, instead of what the key had. Raises OSError where the disk is full."""
        self.drop(key)
        tensor = tensor.detach().contiguous()
        if tensor.device.type != "cpu" and tensor.nbytes <= self._room_there:
            self._room_there -= tensor.nbytes
            self._held[key] = _own(tensor)
            return
        tensor = tensor.cpu()
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._held[key] = _own(tensor)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (__exit__ closes it)
        places = self._free.get(tensor.nbytes)
        at = places.pop() if places else self._end
        self._end = max(self._end, at + tensor.nbytes)
        _write(self._file, _bytes(tensor), at)
        self._stored[key] = (at, tensor.shape, tensor.dtype)

    def get(self, key: Key) -> Tensor:
        """What was put there. Raises KeyError where there is nothing."""
        if key in self._held:
            return self._held[key]
        at, shape, dtype = self._stored[key]
        assert self._file is not None
        tensor = torch.empty(shape, dtype=dtype)
        _read(self._file, _bytes(tensor), at)
        return tensor

    def drop(self, key: Key) -> None:
        """Forget a key, known or not."""
        if key in self._held:
            tensor = self._held.pop(key)
            if tensor.device.type == "cpu":
                self._room += tensor.nbytes
            else:
                self._room_there += tensor.nbytes
        elif key in self._stored:
            at, shape, dtype = self._stored.pop(key)
            self._free.setdefault(shape.numel() * dtype.itemsize, []).append(at)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, in memory of its own: a view would keep all of its base alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host. numpy knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(file: IO[bytes], view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(file.fileno(), view[done:], at + done)


def _read(file: IO[bytes], view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):
        n = os.preadv(file.fileno(), [view[done:]], at + done)
        if n == 0:
            raise OSError("a temporary file was truncated while it was used")
        done += n


class Shelf:
    """Matrices of a result, in a file that is there as long as one of them can be asked for."""

    def __init__(self, directory: Path | None) -> None:
        """directory: the system's temporary one if None."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (nobody knows when the last matrix is read)

    def keep(self, matrix: NDArray[np.float32]) -> Callable[[], NDArray[np.float32]]:
        """What gives a copy of the matrix. Raises OSError where the disk is full."""
        at, shape = self._file.seek(0, os.SEEK_END), matrix.shape
        _write(self._file, np.ascontiguousarray(matrix).data.cast("B"), at)

        def read() -> NDArray[np.float32]:
            out = np.empty(shape, dtype=np.float32)
            _read(self._file, out.data.cast("B"), at)
            return out

        return read
