"""ggml's own quantizers through ctypes (libggml-base), so that every byte is what llama-quantize would write.

Calls release the GIL, so rows can be quantized in parallel by threads.
"""

import ctypes
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.types import QUANTIZABLE, block, number, row_bytes


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


class Ggml:
    """The quantization functions of one libggml-base. Safe to share between threads."""

    def __init__(self, path: Path | str) -> None:
        """path: the shared library. Raises UserError if it cannot be loaded or is of another ggml."""
        try:
            self._lib = ctypes.CDLL(str(path))
            self._chunk = self._lib.ggml_quantize_chunk
            self._init = self._lib.ggml_quantize_init
            self._requires_imatrix = self._lib.ggml_quantize_requires_imatrix
            self._validate = self._lib.ggml_validate_row_data
            self._get_traits = self._lib.ggml_get_type_traits
        except (OSError, AttributeError) as e:
            raise UserError(f"cannot use {path} as ggml's base library ({e}); run `rq-gguf runtime install`") from e
        self._chunk.restype = ctypes.c_size_t
        self._chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._init.restype = None
        self._init.argtypes = [ctypes.c_int]
        self._requires_imatrix.restype = ctypes.c_bool
        self._requires_imatrix.argtypes = [ctypes.c_int]
        self._validate.restype = ctypes.c_bool
        self._validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self._get_traits.restype = ctypes.POINTER(_TypeTraits)
        self._get_traits.argtypes = [ctypes.c_int]
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def _prepare(self, type_name: str) -> int:
        """The type's number in ggml, its tables built. Refuses what ggml cannot quantize, and a library whose blocks are others."""
        kind = number(type_name)
        if type_name not in QUANTIZABLE:
            raise UserError(f"'{type_name}' is not a ggml type that weights can be stored in; known are {', '.join(sorted(QUANTIZABLE))}")
        with self._lock:
            if type_name not in self._ready:
                traits = self._get_traits(kind).contents
                if (traits.blck_size, traits.type_size) != block(type_name):
                    raise UserError(f"ggml's base library stores {type_name} in other blocks; run `rq-gguf runtime install`")
                self._init(kind)
                self._ready.add(type_name)
        return kind

    def requires_imatrix(self, type_name: str) -> bool:
        """True for the types that ggml quantizes only with an importance row."""
        return bool(self._requires_imatrix(self._prepare(type_name)))

    def quantize(self, type_name: str, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """Quantize [n, cols] float32 rows to uint8 [n, row_bytes], as llama-quantize does.

        imatrix: float32 [cols], the importance of each column, or None.
        Raises UserError for an unsuitable type, rows that are no whole number of blocks, non-finite values, a missing importance row.
        """
        kind = self._prepare(type_name)
        n, cols = rows.shape
        out = np.empty((n, row_bytes(type_name, cols)), dtype=np.uint8)
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        # ggml aborts the process on these.
        if not np.isfinite(rows).all():
            raise UserError(f"weights to be quantized to {type_name} are not finite")
        if imatrix is not None:
            imatrix = np.ascontiguousarray(imatrix, dtype=np.float32)
            if imatrix.shape != (cols,) or not np.isfinite(imatrix).all():
                raise UserError(f"the importance row for {type_name} must be {cols} finite numbers, got shape {list(imatrix.shape)}")
        elif self._requires_imatrix(kind):
            raise UserError(f"{type_name} needs an importance matrix: choose another type or calibrate")
        if n:
            self._chunk(kind, rows.ctypes.data, out.ctypes.data, 0, n, cols, None if imatrix is None else imatrix.ctypes.data)
        return out

    def dequantize(self, type_name: str, data: NDArray[np.uint8], cols: int) -> NDArray[np.float32]:
        """The float32 [n, cols] weights that uint8 [n, row_bytes] stand for."""
        kind = self._prepare(type_name)
        if data.ndim != 2 or data.shape[1] != row_bytes(type_name, cols):
            raise ValueError(f"{type_name} data of shape {list(data.shape)} is not rows of {cols} weights")
        data = np.ascontiguousarray(data, dtype=np.uint8)
        if type_name == "f32":  # has no to_float
            return data.view(np.float32).copy()
        out = np.empty((data.shape[0], cols), dtype=np.float32)
        self._get_traits(kind).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def validate(self, type_name: str, data: NDArray[np.uint8]) -> bool:
        """True if every block's scales are finite (ggml prints what is wrong to stderr)."""
        data = np.ascontiguousarray(data)
        return bool(self._validate(self._prepare(type_name), data.ctypes.data, data.nbytes))
