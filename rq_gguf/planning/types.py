"""The ggml types an expert may take: their sizes, their order, and what llama-quantize takes where a row does not fit."""

import math

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from rq_gguf.errors import UserError

TYPES = (
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "mxfp4", "iq4_xs",
    "q4_0", "iq4_nl", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0", "f16", "bf16",
)  # fmt: skip
"""Every type that experts can take (what ggml_quantize_chunk writes), from few bits to many."""

_RANK = {name: rank for rank, name in enumerate(TYPES)}
_SIZES = {name: GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] for name in TYPES}

_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}  # llama-quant.cpp, tensor_type_fallback: blocks of 256 -> blocks of 32

# Error of the layers' output with all experts in a type, over the residual energy, on a 32-expert model (relative figures matter).
_MEASURED_ERROR = {
    "iq2_s": 0.0357, "iq3_xxs": 0.0179, "iq3_s": 0.0123, "q3_k": 0.0128, "iq4_xs": 0.0034, "q4_k": 0.0029, "q5_k": 0.00074,
    "q6_k": 0.00018, "q8_0": 0.00002,
}  # fmt: skip


def rank(type_name: str) -> int:
    """Position of a type in the order from few bits to many."""
    return _RANK[type_name]


def block_size(type_name: str) -> int:
    """Values per block; a row must be a multiple of it."""
    return _SIZES[type_name][0]


def bits_per_weight(type_name: str) -> float:
    block, size = _SIZES[type_name]
    return 8.0 * size / block


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns` values. The row must be a multiple of the block: see `fallback`."""
    block, size = _SIZES[type_name]
    if columns % block:
        raise ValueError(f"a row of {columns} values is no multiple of {type_name}'s block of {block}")
    return columns // block * size


def fallback(type_name: str, columns: int) -> str:
    """The type that rows of `columns` values really take when `type_name` is asked for, as llama-quantize chooses it."""
    if columns % block_size(type_name) == 0:
        return type_name
    other = _FALLBACK.get(type_name, "f16")
    return other if columns % block_size(other) == 0 else "f16"


def check_type(name: str, what: str) -> str:
    """`name` in lower case. UserError if experts cannot take it; `what` says where it was found."""
    lower = name.strip().lower()
    if lower not in _RANK:
        raise UserError(f"{what}: unknown type '{name.strip()}'; allowed are {', '.join(TYPES)}")
    return lower


def parse_types(text: str) -> tuple[str, ...]:
    """A user's list such as `q4_k,q8_0`, without repeats, from few bits to many. UserError names an unknown type."""
    names = {check_type(name, "--types") for name in text.split(",") if name.strip()}
    if not names:
        raise UserError(f"--types is empty; name one or more of {', '.join(TYPES)}")
    return tuple(sorted(names, key=rank))


def typical_error(type_name: str) -> float:
    """Error to expect of a type where none was measured: a table, and in between log-linear in the bits per weight."""
    if type_name in _MEASURED_ERROR:
        return _MEASURED_ERROR[type_name]
    low, high = math.log(_MEASURED_ERROR["iq2_s"]), math.log(_MEASURED_ERROR["q8_0"])
    first, last = bits_per_weight("iq2_s"), bits_per_weight("q8_0")
    return math.exp(low + (high - low) * (bits_per_weight(type_name) - first) / (last - first))
