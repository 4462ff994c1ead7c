"""MUL_MAT_TIERS and MUL_MAT_ID through ggml-metal's own host code, against ggml-cpu and the exact product."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from metal.cases import Outcome, run_cases, spec

QUANTS = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q1_0", "q2_0", "mxfp4", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs", "tq2_0",
)  # fmt: skip
FLOATS = ("f32", "f16", "bf16")
TYPES = (*QUANTS, *FLOATS)
LADDER = ("q8_0", "q6_K", "q5_K", "q4_K", "q3_K", "q2_K", "iq4_xs")
BLOCK = {**dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "iq4_nl", *FLOATS), 32), "q2_0": 64, "q1_0": 128}
"""Columns must be a multiple of this; 256 for the other types."""

FOUR = "0,1,2,3"
MOST_CPU = 5e-4
"""As in test-backend-ops."""
MOST_EXACT_MV = 1e-11
"""Matrix times vector is computed in float. Measured: at most 5e-13, but for TQ2_0, whose stock kernel gives 2e-11 too."""
MOST_EXACT_MV_TQ2_0 = 5e-10
MOST_EXACT_MM = 5e-7
"""Matrix times matrix rounds weights and activations to half, bfloat for BF16."""
MOST_EXACT_MM_BF16 = 2e-5


def tiers(types: Sequence[str], counts: Sequence[int]) -> str:
    return "+".join(f"{t}:{n}" for t, n in zip(types, counts, strict=True))


def most_exact(outcome: Outcome) -> float:
    matrix = any(run.count("kernel_mul_mm_id") for run in outcome.runs)
    if not matrix:
        return MOST_EXACT_MV_TQ2_0 if "tq2_0" in outcome.line else MOST_EXACT_MV
    return MOST_EXACT_MM_BF16 if "bf16" in outcome.line else MOST_EXACT_MM


def check(harness: Path, lines: Sequence[str]) -> list[Outcome]:
    outcomes = run_cases(harness, lines)
    failures = [f for o in outcomes if (f := o.failure(MOST_CPU, most_exact(o)))]
    assert not failures, f"{len(failures)} of {len(lines)} fail:\n" + "\n".join(failures[:20])
    return outcomes


def type_lines(kind: str) -> list[str]:
    """As the first, a middle and the only tier that is selected from; with rows that no number of rows per threadgroup divides."""
    lines = []
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 31):
        lines.append(spec(op="tiers", types=tiers((kind, "q4_K"), (3, 2)), used=2, tokens=tokens, m=33, k=256, seed=tokens, schedules=FOUR))
    for tokens in (1, 8):
        middle, last = tiers(("q6_K", kind, "q8_0"), (1, 3, 2)), tiers(("q8_0", kind), (2, 3))
        lines.append(spec(op="tiers", types=middle, used=3, tokens=tokens, m=1, k=512, schedules=FOUR))
        lines.append(spec(op="tiers", types=last, used=2, tokens=tokens, m=40, k=1280, only=1, schedules="0,2"))
        least = BLOCK.get(kind, 256)
        lines.append(spec(op="tiers", types=tiers((kind, "f16"), (2, 3)), used=2, tokens=tokens, m=17, k=least, skip=1, schedules=FOUR))
    for tokens in (32, 45):
        lines.append(spec(op="tiers", types=tiers((kind, "q4_K"), (3, 2)), used=2, tokens=tokens, m=67, k=256, schedules="0,3"))
    lines.append(spec(op="tiers", types=tiers(("q6_K", kind), (2, 2)), used=1, tokens=70, m=7, k=512, skip=0, only=1, schedules=FOUR))
    # beyond the range of half; what the CPU makes of such activations for these types is beyond it too
    scale = 1 if kind in ("f16", "q4_1", "q5_1") else 200000
    lines.append(spec(op="tiers", types=tiers(("f32", kind), (2, 2)), used=2, tokens=40, m=64, k=256, prec=1, scale=scale, schedules="0,2"))
    return lines


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(harness: Path, kind: str) -> None:
    check(harness, type_lines(kind))


@pytest.mark.parametrize("kind", TYPES)
def test_as_stock(harness: Path, kind: str) -> None:
    """MUL_MAT_ID itself is as exact as ever, and one tier gives its bits: always of matrix times matrix, and of matrix times vector but for
    the types whose rows stock llama.cpp divides between more simdgroups."""
    pairs = []
    for tokens, m in ((1, 34), (5, 34), (33, 66), (48, 130)):
        common = {"types": f"{kind}:6", "used": 2, "tokens": tokens, "m": m, "k": 256, "bcast": tokens % 2, "schedules": "0,2"}
        pairs += [spec(op="id", **common), spec(op="tiers", **common)]
    outcomes = check(harness, pairs)
    for stock, ours in zip(outcomes[::2], outcomes[1::2], strict=True):
        matrix = stock.runs[0].count("kernel_mul_mm_id") > 0
        if matrix or kind not in ("q8_0", *FLOATS):
            assert stock.runs[0].hash == ours.runs[0].hash, ours.line


def test_floats_of_any_length(harness: Path) -> None:
    """Rows that are not made of groups of four; matrix times matrix checks bounds."""
    lines = [
        spec(op="tiers", types=tiers((a, b), (2, 2)), used=2, tokens=tokens, m=19, k=k, schedules="0,2")
        for a, b in (("f32", "f16"), ("bf16", "f32"), ("f16", "bf16"))
        for tokens in (1, 3, 40)
        for k in (1, 31, 67, 130)
    ]
    check(harness, lines)


LADDER_TOKENS = (1, 2, 8, 32, 64)


def ladder_lines(tokens: int) -> list[str]:
    """One tier to seven, with any number of ids held elsewhere, and each tier the only one that is selected from."""
    lines = []
    for n in range(1, 8):
        types = tiers(LADDER[:n], [3 + i % 2 for i in range(n)])
        schedules = FOUR if tokens <= 8 else "0,2"
        for skip in (0, 1, 3):
            lines.append(spec(op="tiers", types=types, used=3, tokens=tokens, m=36, k=256, skip=skip, seed=n, schedules=schedules))
        for only in range(n):
            lines.append(spec(op="tiers", types=types, used=2, tokens=tokens, m=20, k=256, only=only, schedules="3"))
    return lines


@pytest.mark.parametrize("tokens", LADDER_TOKENS)
def test_ladders(harness: Path, tokens: int) -> None:
    check(harness, ladder_lines(tokens))


def random_lines(seed: int, n: int, most_tokens: int, schedules: str) -> list[str]:
    """Cases of all sizes; k and m grow at the expense of each other."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        n_tiers = rng.randint(1, 7)
        types = [rng.choice(TYPES) for _ in range(n_tiers)]
        experts = rng.choice((n_tiers, 8, 16, 60) if most_tokens <= 8 else (n_tiers, 8, 24))
        cuts = sorted(rng.sample(range(1, max(experts, n_tiers)), n_tiers - 1)) if n_tiers > 1 else []
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, max(experts, n_tiers)], strict=True)]
        only = rng.randrange(n_tiers) if rng.random() < 0.2 else -1
        used = rng.randint(1, min(8, counts[only] if only >= 0 else sum(counts)))
        tokens = rng.randint(1, most_tokens) if most_tokens <= 31 else rng.randint(32, most_tokens)
        k = 256 * rng.choice((1, 1, 1, 2, 3))
        lines.append(
            spec(
                op="tiers",
                types=tiers(types, counts),
                used=used,
                tokens=tokens,
                m=rng.choice((1, 2, 5, 8, 15, 24, 33, 47)) if k > 256 or tokens > 8 else rng.randint(1, 80),
                k=k,
                bcast=int(rng.random() < 0.4),
                skip=rng.randint(0, used) if rng.random() < 0.3 else 0,
                only=only,
                view=int(rng.random() < 0.7),
                prec=int(rng.random() < 0.1),
                simdgroup_mm=int(rng.random() < 0.95),
                seed=rng.randint(1, 10**6),
                schedules=schedules,
            )
        )
    return lines


DECODE = [random_lines(seed, 180, 8, FOUR if seed < 3 else "3") for seed in range(6)]
PREFILL = [random_lines(100 + seed, 90, 64, f"0,{2 + seed}") for seed in range(3)]


@pytest.mark.parametrize("part", range(len(DECODE)))
def test_random_decode(harness: Path, part: int) -> None:
    check(harness, DECODE[part])


@pytest.mark.parametrize("part", range(len(PREFILL)))
def test_random_prefill(harness: Path, part: int) -> None:
    check(harness, PREFILL[part])


def large_lines(n: int) -> list[str]:
    """Up to 512 tokens, 512 experts and 22 selected ones, of small matrices."""
    rng = random.Random(500)
    lines = []
    for _ in range(n):
        n_tiers = rng.randint(2, 7)
        experts = rng.choice((16, 64, 128, 256, 512))
        cuts = sorted(rng.sample(range(1, experts), n_tiers - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, experts], strict=True)]
        used = rng.choice((1, 2, 4, 8, 16 if experts > 16 else 8))
        lines.append(
            spec(
                op="tiers",
                types=tiers([rng.choice(TYPES) for _ in range(n_tiers)], counts),
                used=used,
                tokens=rng.choice((1, 8, 31, 32, 100, 256, 512)) if used * experts <= 512 else rng.choice((2, 8, 33, 64)),
                m=rng.choice((1, 3, 9)),
                k=256,
                skip=rng.choice((0, 0, 1)),
                seed=rng.randint(1, 10**6),
                schedules=rng.choice("0123"),
            )
        )
    return lines


def test_random_large(harness: Path) -> None:
    check(harness, large_lines(48))


def test_large(harness: Path) -> None:
    """The most of each."""
    lines = [
        spec(op="tiers", types="q8_0:2+q4_K:3", used=2, tokens=512, m=33, k=256, schedules="2"),
        spec(op="tiers", types="q6_K:5+iq4_xs:3", used=1, tokens=300, m=64, k=256, skip=1, schedules="3"),
        spec(op="tiers", types="q8_0:300+q4_K:212", used=8, tokens=32, m=8, k=256, schedules="2"),
        spec(op="tiers", types="q8_0:300+q4_K:212", used=8, tokens=4, m=8, k=256, schedules="2"),
        spec(op="tiers", types="q5_K:100+q3_K:100+q2_K:312", used=22, tokens=33, m=5, k=256, schedules="0"),
        spec(op="tiers", types="q5_K:100+q3_K:100+q2_K:312", used=22, tokens=2, m=5, k=256, schedules="0"),
        spec(op="tiers", types="iq2_s:700+q4_K:700", used=4, tokens=32, m=4, k=256, schedules="0"),
    ]
    check(harness, lines)


def test_gate_and_up(harness: Path) -> None:
    """Two multiplications of the same rows: in prefill these are sorted once, also where biases come between them in the graph."""
    lines = []
    for tokens in (1, 4, 33):
        for bias in (0, 1):
            for types in ("q8_0:3+q4_K:3", "iq3_s:2+q6_K:2+f16:2"):
                common = {"used": 3, "tokens": tokens, "m": 48, "k": 256, "schedules": FOUR}
                lines.append(spec(op="pair", types=types, bcast=1, bias=bias, skip=1 - bias, prec=int(tokens > 8), **common))
    for outcome in check(harness, lines):
        sorts = {run.count("kernel_mul_mm_tiers_map0") for run in outcome.runs}
        assert sorts == {int("tokens=33" in outcome.line)}, outcome.line
    check(harness, [spec(op="pair", types="q8_0:3+q4_K:3", used=3, tokens=33, m=48, k=256, simdgroup_mm=0)])
    check(harness, [spec(op="pair", types="q8_0:3+q4_K:3", used=3, tokens=33, m=48, k=256, concurrency=0)])
    unfused = check(harness, [spec(op="pair", types="q8_0:3+q4_K:3", used=3, tokens=33, m=48, k=256, fusion=0, schedules=FOUR)])
    assert unfused[0].runs[0].count("kernel_mul_mm_tiers_map0") == 2


def test_one_launch_decodes_all_tiers(harness: Path) -> None:
    """And as many launches as tiers multiply many tokens."""
    few, many = check(harness, [spec(op="tiers", types="q8_0:2+q6_K:2+q4_K:2", used=2, tokens=t, m=8, k=256) for t in (1, 32)])
    assert [name for name, _ in few.runs[0].encoded] == ["kernel_mul_mv_tiers_f32"]
    assert [name for name, _ in many.runs[0].encoded] == [
        "kernel_mul_mm_tiers_map0",
        "barrier",
        "kernel_mul_mm_id_q8_0_f32",
        "kernel_mul_mm_id_q6_K_f32",
        "kernel_mul_mm_id_q4_K_f32",
    ]


def test_types_that_metal_has_not(harness: Path) -> None:
    """supports_op says no, as it does for MUL_MAT_ID."""
    for kind in ("tq1_0", "nvfp4"):
        (outcome,) = run_cases(harness, [spec(op="tiers", types=f"{kind}:2+q8_0:2", used=2, tokens=1, m=8, k=256)])
        assert "MUL_MAT_TIERS is not supported" in outcome.error


def test_there_are_2000_cases() -> None:
    """Of MUL_MAT_TIERS alone, all different."""
    lines = [line for kind in TYPES for line in type_lines(kind)]
    lines += [line for tokens in LADDER_TOKENS for line in ladder_lines(tokens)]
    lines += [line for part in (*DECODE, *PREFILL, large_lines(48)) for line in part]
    assert len(set(lines)) == len(lines) >= 2000
