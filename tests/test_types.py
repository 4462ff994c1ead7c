"""Sizes, order and fallbacks of types."""

from itertools import pairwise

import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf import types
from rq_gguf.errors import UserError


def test_sizes_by_hand() -> None:
    assert types.row_bytes("q8_0", 512) == 512 // 32 * 34
    assert types.row_bytes("q4_k", 512) == 2 * 144
    assert types.bits_per_weight("q4_k") == 4.5
    assert types.bits_per_weight("q8_0") == 8.5
    assert types.row_bytes("f32", 3) == 12
    with pytest.raises(UserError, match="rows of 128 weights cannot be stored as q4_k, whose blocks hold 256"):
        types.row_bytes("q4_k", 128)
    with pytest.raises(UserError, match="'q9_k' is not a ggml type"):
        types.row_bytes("q9_k", 128)


def test_types_ascend() -> None:
    bits = [types.bits_per_weight(t) for t in types.TYPES]
    assert bits == sorted(bits)
    assert [types.rank(t) for t in types.TYPES] == list(range(len(bits)))
    assert list(types.LADDER) == sorted(types.LADDER, key=types.rank)


def test_numbers_and_sizes_are_those_of_the_gguf_package() -> None:
    """But q8_1, which it has wrong (no file holds it)."""
    for kind, blocks in GGML_QUANT_SIZES.items():
        name = kind.name.lower()
        assert (types.number(name), types.name_of(kind)) == (kind, name)
        assert types.block(name) == (blocks if name != "q8_1" else (32, 36))
    assert types.name_of(4) is None


def test_by_stored_type() -> None:
    assert types.by_stored_type(("q2_k", "q3_k", "q4_0", "q8_0"), 256) == {"q2_k": [0], "q3_k": [1], "q4_0": [2], "q8_0": [3]}
    assert types.by_stored_type(("q2_k", "q3_k", "q4_0", "q6_k", "q8_0"), 96) == {"q4_0": [0, 1, 2], "q8_0": [3, 4]}


def test_fallback_note() -> None:
    note = "rows of 320 weights in down cannot be q4_k, q6_k: q5_0, q8_0 instead"
    assert types.fallback_note(("q4_k", "q6_k", "q8_0"), 320, "down") == note
    assert types.fallback_note(("q4_k", "q8_0"), 512, "down") is None


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 96, "q5_0"),
        ("q5_k", 96, "q5_1"),
        ("q6_k", 96, "q8_0"),
        ("q2_k", 96, "q4_0"),
        ("q3_k", 96, "q4_0"),
        ("iq4_xs", 96, "iq4_nl"),
        ("iq1_s", 96, "iq4_nl"),
        ("q8_0", 96, "q8_0"),
        ("q8_0", 48, "f16"),
        ("q4_k", 48, "f16"),
        ("bf16", 7, "bf16"),
        ("tq2_0", 96, "q4_0"),
        ("q2_0", 96, "q4_0"),
        ("nvfp4", 96, "mxfp4"),
    ],
)
def test_fallback_is_llama_quantizes(name: str, columns: int, expected: str) -> None:
    assert types.fallback(name, columns) == expected


@given(st.sampled_from(types.TYPES), st.integers(1, 5000))
def test_fallback_always_fits(name: str, columns: int) -> None:
    assert types.row_bytes(types.fallback(name, columns), columns) > 0


def test_parse_types() -> None:
    assert types.parse_types("Q8_0, q4_k,q8_0") == ("q4_k", "q8_0")
    with pytest.raises(UserError, match=r"unknown type 'q9_k'; allowed are .*q4_k.*q8_0"):
        types.parse_types("q4_k,q9_k")
    with pytest.raises(UserError, match="--types is empty"):
        types.parse_types(" , ")


def test_typical_error_falls_with_the_bits_of_k_quants() -> None:
    ladder = [types.typical_error(t) for t in ("iq1_s", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16")]
    assert ladder == sorted(ladder, reverse=True)
    assert types.typical_error("q4_k") == 0.0029
    assert all(types.typical_error(t) > 0 for t in types.TYPES)
    for a, b in pairwise(types.TYPES):
        if types.bits_per_weight(a) == types.bits_per_weight(b) < 16:
            assert types.typical_error(a) >= types.typical_error(b), (a, b)
