"""From stored rows to stored rows of another type: the unit of work of a write."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.feedback import Feedback
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import Tensor
from rq_gguf.types import QUANTIZABLE
from rq_gguf.writing.source import Source, to_float32

PIECE_WEIGHTS = 1 << 18
"""Weights that one step of a thread works on: long enough to make Python's share small, short enough for caches and for Ctrl-C."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor (of one expert, where it stacks experts), and where their bytes go."""

    tensor: Tensor
    first_row: int
    n_rows: int
    type: str
    offsets: tuple[int, ...]
    """In the new file: one, and more where an expert's copies have the same type."""
    file: int = 0
    """Number of that file in a split model."""
    imatrix: NDArray[np.float32] | None = None
    """[columns]"""
    expert: int | None = None
    """Logical expert, for messages."""
    feedback: Feedback | None = None
    """Quantize with error feedback."""


def convert(piece: Piece, source: Source, ggml: Ggml) -> NDArray[np.uint8]:
    """The piece's rows in its type, uint8 [n_rows, row_bytes], as llama-quantize would write them, or with error feedback.

    Raises UserError that names tensor and expert for weights that are not finite and for types that need a missing imatrix.
    """
    tensor = piece.tensor
    raw = source.read(tensor, piece.first_row, piece.n_rows)
    if piece.type == tensor.type:
        if tensor.type in QUANTIZABLE and not ggml.validate(tensor.type, raw):
            raise UserError(f"{_where(piece, source)} holds NaN or infinite values; get the model again")
        return raw
    weights = to_float32(tensor, raw, ggml)
    try:
        if piece.feedback is None:
            rows = ggml.quantize(piece.type, weights, piece.imatrix)
        else:
            rows = piece.feedback.quantize(ggml, piece.type, weights, piece.imatrix)
    except UserError as e:
        if not np.isfinite(weights).all():
            raise UserError(f"{_where(piece, source)} holds NaN or infinite values; get the model again") from e
        raise UserError(f"{_where(piece, source)}: {e}") from e
    if not ggml.validate(piece.type, rows):
        raise UserError(f"{_where(piece, source)} holds weights too large for {piece.type}; choose another type")
    return rows


def _where(piece: Piece, source: Source) -> str:
    return f"{source.path}: " + (piece.tensor.name if piece.expert is None else f"expert {piece.expert} of {piece.tensor.name}")
