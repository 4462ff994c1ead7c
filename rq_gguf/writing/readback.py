"""Weights as a tiered file holds them, in float32: what a reference computation starts from."""

from typing import cast

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from rq_gguf.writing.tiered import Tiered


def expert_weight(file: Tiered, layer: int, matrix: str, logical: int, copy: int = 0) -> NDArray[np.float32]:
    """One instance of a logical expert, float32 [rows, columns]; copy 0 is the primary. Raises IndexError where there is none."""
    tier, index = file.layer(layer).locate(matrix, logical, copy)
    rows = tier.ne[1]
    return _dequantize(file.read(tier, index * rows, rows), tier.type)


def weight(file: Tiered, name: str) -> NDArray[np.float32]:
    """Any other tensor, float32 in numpy's order (ggml's sizes reversed). Raises KeyError where the file has none of that name."""
    tensor = file.header.tensors[name]
    return _dequantize(file.read(tensor), tensor.type).reshape(tuple(reversed(tensor.ne)))


def _dequantize(rows: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    return cast(NDArray[np.float32], dequantize(rows, GGMLQuantizationType[type_name.upper()]))
