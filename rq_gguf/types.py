"""ggml's types: numbers, sizes and order, which of them weights can take, and what llama-quantize takes where a row does not fit.

The only module that knows this. It imports nothing but the standard library, so that the command line can name its defaults at once.
"""

from rq_gguf.errors import UserError

# name: (number in a GGUF, values per block, bytes per block), from enum ggml_type and ggml-common.h. From few bits to many, and of
# equally many the one with more error first.
_WEIGHTS = {
    "q1_0":    (41, 128,  18),
    "iq1_s":   (19, 256,  50),
    "tq1_0":   (34, 256,  54),
    "iq1_m":   (29, 256,  56),
    "tq2_0":   (35, 256,  66),
    "iq2_xxs": (16, 256,  66),
    "q2_0":    (42,  64,  18),
    "iq2_xs":  (17, 256,  74),
    "iq2_s":   (22, 256,  82),
    "q2_k":    (10, 256,  84),
    "iq3_xxs": (18, 256,  98),
    "q3_k":    (11, 256, 110),
    "iq3_s":   (21, 256, 110),
    "mxfp4":   (39,  32,  17),
    "iq4_xs":  (23, 256, 136),
    "nvfp4":   (40,  64,  36),
    "q4_0":    ( 2,  32,  18),
    "iq4_nl":  (20,  32,  18),
    "q4_k":    (12, 256, 144),
    "q4_1":    ( 3,  32,  20),
    "q5_0":    ( 6,  32,  22),
    "q5_k":    (13, 256, 176),
    "q5_1":    ( 7,  32,  24),
    "q6_k":    (14, 256, 210),
    "q8_0":    ( 8,  32,  34),
    "f16":     ( 1,   1,   2),
    "bf16":    (30,   1,   2),
}  # fmt: skip
_OTHERS = {
    "f32":  ( 0,   1,   4),
    "q8_1": ( 9,  32,  36),
    "q8_k": (15, 256, 292),
    "i8":   (24,   1,   1),
    "i16":  (25,   1,   2),
    "i32":  (26,   1,   4),
    "i64":  (27,   1,   8),
    "f64":  (28,   1,   8),
}  # fmt: skip
_ALL = _WEIGHTS | _OTHERS
_NAMES = {number: name for name, (number, _, _) in _ALL.items()}

TYPES = tuple(_WEIGHTS)
"""Every type that experts can take (ggml_quantize_chunk writes it, MUL_MAT_ID multiplies with it on a CPU), from few bits to many."""

QUANTIZABLE = frozenset((*TYPES, "f32"))
"""What ggml_quantize_chunk accepts: it aborts the process on any other."""

LADDER = ("q2_k", "iq3_xxs", "q3_k", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
"""The types that experts may take where the user names none."""

PAPER_TYPES = ("q4_k", "q8_0")
"""The same for `--policy paper`, which knows a high and a low precision."""

NEEDS_IMATRIX = frozenset(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"))
"""Types that llama-quantize refuses to write without an importance row (llama-quant.cpp, tensor_requires_imatrix)."""

_RANK = {name: rank for rank, name in enumerate(TYPES)}

# llama-quant.cpp, tensor_type_fallback: blocks of 256 (of 64 for q2_0) -> blocks of 32. It has none for q1_0 and nvfp4: the nearest here.
_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q1_0", "tq1_0", "tq2_0", "q2_0", "q2_k", "q3_k"), "q4_0"),
    "nvfp4": "mxfp4",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

# Error of the layers' output with all experts in a type, over the residual energy, on a 32-expert model with its imatrix rows (relative
# figures matter); f16 and bf16 by their rounding.
_TYPICAL_ERROR = {
    "q1_0": 0.24, "iq1_s": 0.136, "tq1_0": 0.41, "iq1_m": 0.114, "tq2_0": 0.41, "iq2_xxs": 0.067, "q2_0": 0.33, "iq2_xs": 0.051,
    "iq2_s": 0.0357, "q2_k": 0.041, "iq3_xxs": 0.0179, "q3_k": 0.0128, "iq3_s": 0.0107, "mxfp4": 0.0086, "iq4_xs": 0.0034,
    "nvfp4": 0.0057, "q4_0": 0.0040, "iq4_nl": 0.0033, "q4_k": 0.0029, "q4_1": 0.0028, "q5_0": 0.0010, "q5_k": 0.00074, "q5_1": 0.00066,
    "q6_k": 0.00018, "q8_0": 0.00002, "f16": 1e-8, "bf16": 5e-7,
}  # fmt: skip


def rank(type_name: str) -> int:
    """Position of a type that experts can take in the order from few bits to many."""
    return _RANK[type_name]


def number(type_name: str) -> int:
    """The type's number in a GGUF and in ggml. UserError for a name that ggml does not have."""
    return _entry(type_name)[0]


def name_of(type_number: int) -> str | None:
    """The name of the type of that number, None where it is unknown."""
    return _NAMES.get(type_number)


def block(type_name: str) -> tuple[int, int]:
    """(values, bytes) of a block. UserError for a name that ggml does not have."""
    return _entry(type_name)[1:]


def bits_per_weight(type_name: str) -> float:
    values, size = block(type_name)
    return 8.0 * size / values


def activation_block(type_name: str) -> int | None:
    """Values that share a scale in the 8-bit form in which ggml's CPU kernels take the other factor (vec_dot_type of ggml-cpu.c: Q8_K for
    types with blocks of 256, Q8_0 or Q8_1 for the other quantized ones); None where it is not rounded to 8 bits."""
    values = block(type_name)[0]
    return None if values == 1 else 256 if values == 256 else 32


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns` values. UserError where that is no whole number of blocks: see `fallback`."""
    values, size = block(type_name)
    if columns % values:
        raise UserError(f"rows of {columns} weights cannot be stored as {type_name}, whose blocks hold {values}")
    return columns // values * size


def fallback(type_name: str, columns: int) -> str:
    """The type that rows of `columns` values really take when `type_name` is asked for, as llama-quantize chooses it."""
    if columns % block(type_name)[0] == 0:
        return type_name
    other = _FALLBACK.get(type_name, "f16")
    return other if columns % block(other)[0] == 0 else "f16"


def by_stored_type(types: tuple[str, ...], columns: int) -> dict[str, list[int]]:
    """Stored type -> which of `types` (their indices) rows of `columns` values store as it. Of several, all are the same bytes."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(types):
        kind = fallback(name, columns)
        found.setdefault(kind, []).append(i)
    return found


def fallback_note(types: tuple[str, ...], columns: int, where: str) -> str | None:
    """What becomes of types that rows of `columns` values cannot hold, in one line; None where all fit. where: the matrices, for people."""
    pairs = [(name, fallback(name, columns)) for name in types]
    changed = [(name, kind) for name, kind in pairs if name != kind]
    if not changed:
        return None
    names, kinds = (", ".join(pair[i] for pair in changed) for i in (0, 1))
    return f"rows of {columns} weights in {where} cannot be {names}: {kinds} instead"


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
    """Error to expect of a type where none was measured (on weights that were not made for it, as ternary ones are for tq1_0)."""
    return _TYPICAL_ERROR[type_name]


def _entry(type_name: str) -> tuple[int, int, int]:
    if type_name not in _ALL:
        raise UserError(f"'{type_name}' is not a ggml type that rq-gguf knows; known are {', '.join(_ALL)}")
    return _ALL[type_name]
