"""Medians, ratios, and a bench as a table and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.bench.measure import Bench, Options, Variant, names_of_tests
from rq_gguf.bench.spread import Spread, ratio, spread
from rq_gguf.bench.table import describe, table, to_json

SPEEDS = st.floats(0.1, 1e6)


def test_spread():
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0)
    assert spread([1.0, 5.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_ratios_are_of_the_same_round():
    """The machine was half as fast in the second round, for both."""
    assert ratio([2.0, 1.0, 2.0], [1.0, 0.5, 1.0]) == Spread(2.0, 2.0, 2.0)
    assert ratio([2.0], [1.0, 9.0]) == Spread(2.0, 2.0, 2.0)  # interrupted
    assert ratio([], [1.0]) is None


@given(st.lists(st.tuples(SPEEDS, SPEEDS), min_size=1, max_size=9))
def test_a_file_against_itself_and_the_other_way_round(pairs):
    ours, theirs = zip(*pairs, strict=True)
    assert ratio(ours, ours) == Spread(1.0, 1.0, 1.0)
    there, back = ratio(ours, theirs), ratio(theirs, ours)
    assert there.low <= there.median <= there.high
    if len(pairs) % 2:  # the median is one of the pairs
        assert there.median * back.median == pytest.approx(1)


def test_columns_are_aligned():
    assert table(["file", "t/s"], [["a", "5"], ["longer", "1,000"]]) == [
        "| file   |   t/s |",
        "| :----- | ----: |",
        "| a      |     5 |",
        "| longer | 1,000 |",
    ]


@pytest.fixture
def bench() -> Bench:
    a, b = (Variant(name, Path("x") / name, n, tiered) for name, n, tiered in (("a.gguf", 1000, False), ("b.gguf", 900, True)))
    options = Options(prompt=(8,), generate=(), sequences=(2,), rounds=2, threads=1, extra=("-ngl", "99"))
    samples = {
        ("a.gguf", "pp8"): (1000.0, 500.0),
        ("b.gguf", "pp8"): (1100.0, 600.0),
        ("a.gguf", "2 sequences"): (50.0, 51.0),
        ("b.gguf", "2 sequences"): (100.0,),
    }
    return Bench(options, (a, b), samples, names_of_tests(options), None, "a processor", interrupted=True)


def test_describe(bench):
    assert describe(bench) == [
        "| test        | file   | bytes |  t/s |    quartiles | ratio |    quartiles |",
        "| :---------- | :----- | ----: | ---: | -----------: | ----: | -----------: |",
        "| pp8         | a.gguf | 1,000 |  750 |   625 to 875 |       |              |",
        "| pp8         | b.gguf |   900 |  850 |   725 to 975 | 1.150 | 1.12 to 1.17 |",
        "| 2 sequences | a.gguf | 1,000 | 50.5 | 50.2 to 50.8 |       |              |",
        "| 2 sequences | b.gguf |   900 |  100 |   100 to 100 | 2.000 | 2.00 to 2.00 |",
        "",
        "Medians over 1 of 2 rounds (interrupted) in random order, tokens per second with -t 1 -ngl 99. Ratios: to a.gguf in the same "
        "round.",
        "On random tokens, whose routing is not the model's: pp (prompt) and tg (generation): llama-bench; sequences decoded together, 48 "
        "tokens each behind 16, speed of all: llama-batched-bench.",
        "Machine: a processor.",
    ]


def test_what_was_not_measured_is_no_number(bench):
    none = replace(bench, samples={key: v for key, v in bench.samples.items() if key != ("b.gguf", "2 sequences")})
    assert describe(none)[5] == "| 2 sequences | b.gguf |   900 |    - |            - |       |              |"
    assert none.rounds == 0
    assert "2 sequences" not in to_json(none)["files"][1]["tests"]


def test_json(bench):
    data = json.loads(json.dumps(to_json(bench)))
    assert data["rounds"] == 1 and data["interrupted"] is True and data["arguments"] == ["-ngl", "99"]
    assert (data["prompt"], data["generate"], data["sequences"]) == ([8], [], [2])
    second = data["files"][1]
    assert (second["name"], second["file_bytes"], second["tiered"], second["unpatched"]) == ("b.gguf", 900, True, False)
    assert second["tests"]["pp8"]["samples"] == [1100.0, 600.0]
    assert second["tests"]["pp8"]["median"] == 850.0
    assert second["tests"]["pp8"]["ratio"]["median"] == pytest.approx(1.15)
