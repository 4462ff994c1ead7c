"""Sizes, order and fallbacks of types."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf import ggml
from rq_gguf.errors import UserError
from rq_gguf.planning import types


def test_sizes_by_hand() -> None:
    assert types.row_bytes("q8_0", 512) == 512 // 32 * 34
    assert types.row_bytes("q4_k", 512) == 2 * 144
    assert types.bits_per_weight("q4_k") == 4.5
    assert types.bits_per_weight("q8_0") == 8.5
    with pytest.raises(ValueError, match="no multiple of q4_k's block of 256"):
        types.row_bytes("q4_k", 128)


def test_every_type_can_be_quantized_and_they_ascend() -> None:
    assert set(types.TYPES) <= ggml.QUANTIZABLE
    bits = [types.bits_per_weight(t) for t in types.TYPES]
    assert bits == sorted(bits)
    assert [types.rank(t) for t in types.TYPES] == list(range(len(bits)))


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
