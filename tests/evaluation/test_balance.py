"""LIS from counts, by hand."""

import json

import pytest

from rq_gguf.errors import UserError
from rq_gguf.evaluation.balance import measure_balance, parse_counts, read_counts


def layer(number: int, logical: list[int], physical: list[int] | None = None, **other: int) -> dict:
    return {
        "layer": number,
        "n_expert": len(logical),
        "n_expert_used": 1,
        "logical": logical,
        "physical": logical if physical is None else physical,
        **other,
    }


def counts(*layers: dict) -> str:
    return json.dumps({"n_tokens": 12, "layers": layers})


def test_a_copy_halves_the_busiest():
    # 4 experts, 12 selections: mean 3. Before: 6 / 3. After, expert 0 on two instances: 3 / 3, and over 5 instances 3 / 2.4.
    b = measure_balance(parse_counts(counts(layer(7, [6, 3, 2, 1], [3, 3, 2, 1, 3])), "c")).layers[0]
    assert (b.layer, b.n_expert, b.n_phys) == (7, 4, 5)
    assert (b.before, b.after, b.over_physical) == pytest.approx((2.0, 1.0, 1.25))


def test_figures_of_a_model():
    # Layer 0: 2 -> 1. Layer 1: 3 -> 2 (of 4 experts, 12 selections, the busiest 9, split 6 and 3).
    b = measure_balance(parse_counts(counts(layer(0, [6, 3, 2, 1], [3, 3, 2, 1, 3]), layer(1, [9, 1, 1, 1], [6, 1, 1, 1, 3])), "c"))
    assert (b.n_tokens, b.before, b.after) == (12, 2.5, 1.5)
    assert b.reduction == pytest.approx((2 / 1 + 3 / 2) / 2)
    assert b.reduction_of_means == pytest.approx(2.5 / 1.5)
    assert b.worst.layer == 1


def test_a_stock_file_gains_nothing():
    b = measure_balance(parse_counts(counts(layer(0, [6, 3, 2, 1])), "c"))
    assert (b.before, b.after, b.over_physical, b.reduction) == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a file of expert counts"),
        ('{"n_tokens": 3', "not a file of expert counts"),
        ("[1]", "not a file of expert counts"),
        ('{"n_tokens": 3}', "KeyError: 'layers'"),
        (counts(), "counts no experts"),
        (counts(layer(2, [1, 2], [1, 1])), "layer 2: logical experts were selected 3 times, physical ones served 2"),
        (counts(layer(2, [1, 2], n_expert=3)), "layer 2 has counts of 2 logical and 2 physical experts of 3"),
        (counts(layer(2, [1, 2], [3])), "layer 2 has counts of 2 logical and 1 physical experts of 2"),
        (counts(layer(2, [4, -1])), "layer 2"),
    ],
)
def test_bad_counts(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_counts(text, "counts.json")


def test_an_unpatched_llama_cpp_writes_no_counts(tmp_path):
    with pytest.raises(UserError, match="is unpatched"):
        read_counts(tmp_path / "counts.json")
