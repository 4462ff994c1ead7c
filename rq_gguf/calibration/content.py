"""A GGUF of statistics (a calibration or an imatrix) in memory, with what both kinds need to check."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, read_header

SUMS, COUNTS = ".in_sum2", ".counts"
LARGE = ".rq.input_correlation"  # tensors of such a name are read when somebody asks for them
_DTYPES = {"f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "<i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}
EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")


class Content:
    """Keys and tensors of a GGUF whose general.type is imatrix."""

    def __init__(self, path: Path) -> None:
        """Raises UserError naming the file if it is no such GGUF, or damaged."""
        self.path = path
        try:
            with path.open("rb") as f:
                head = f.read(4)
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from e
        if head != b"GGUF":
            raise UserError(f"{path} is neither a calibration file nor an imatrix")
        try:
            header = read_header(path)
        except UserError as e:
            raise UserError(f"{path} is damaged or truncated: it cannot be read as a GGUF") from e
        self.keys: dict[str, Any] = {}
        for name in header.values:
            value = header.get(name)
            self.keys[name] = value.tolist() if isinstance(value, np.ndarray) else value
        self._infos = {name: t for name, t in header.tensors.items() if t.type in _DTYPES}
        self.tensors: dict[str, NDArray[Any]] = {name: self.read(name) for name in self._infos if not name.endswith(LARGE)}
        kind = self.keys.get("general.type")
        if kind != "imatrix":
            raise UserError(f"{path} is a GGUF of type '{kind}', not a calibration or imatrix")

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str) -> NDArray[Any]:
        """A tensor in numpy's order of sizes, from the file. Raises UserError where the file has changed since."""
        info: Tensor = self._infos[name]
        dtype = np.dtype(_DTYPES[info.type])
        try:
            data = np.fromfile(self.path, dtype, info.n_bytes // dtype.itemsize, offset=info.offset)
            return data.reshape(tuple(reversed(info.ne)))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} was changed or removed while it was used") from e

    def bad(self, why: str) -> UserError:
        return unusable(self.path, why)

    def tensor(self, name: str, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of finite, non-negative numbers. A -1 in `shape` stands for any size."""
        t = self.tensors.get(name)
        if t is None:
            raise self.bad(f"tensor {name} is missing")
        if t.dtype != dtype or t.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, t.shape, strict=True)):
            raise self.bad(f"tensor {name} is {t.dtype} {list(t.shape)}, expected {np.dtype(dtype)} {list(shape)}")
        if not np.isfinite(t).all() or (t < 0).any():
            raise self.bad(f"tensor {name} holds negative or non-finite values")
        return t

    def sums(self) -> dict[str, NDArray[np.float32]]:
        """Name of a matrix -> [matrices, columns] sums of squared inputs, as they are stored."""
        found = {}
        for name, t in self.tensors.items():
            if name.endswith(SUMS):
                # llama-imatrix leaves out a last dimension of 1.
                found[name.removesuffix(SUMS)] = np.atleast_2d(self.tensor(name, np.float32, (-1,) * min(t.ndim, 2)))
        return found


def unusable(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a usable calibration: {why}")


def check_matrices(path: Path, layer: int, sums: dict[str, NDArray[np.float32]], n_embd: int, n_ff: int) -> None:
    """Raise UserError unless a block has one layout of matrices and they fit the model. sums: matrix -> [n_expert, columns]."""
    if set(sums) not in ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"}):
        raise unusable(path, f"block {layer} has sums for {', '.join(sorted(sums))}, expected gate, up, down or gate_up, down")
    n_expert = len(sums["down"])
    for matrix, s in sums.items():
        if s.shape != (n_expert, n_ff if matrix == "down" else n_embd):
            raise unusable(path, f"sums of {matrix} in block {layer} have shape {list(s.shape)}")
