"""EXPERT_REMAP: the ids must equal the CPU's."""

import random
from pathlib import Path

import pytest
from metal.cases import run_cases, spec


def lines(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        experts = rng.choice((2, 8, 31, 32, 33, 60, 128, 300, 512))
        result.append(
            spec(
                op="remap",
                experts=experts,
                used=rng.randint(1, min(experts, rng.choice((2, 8, 22)))),
                tokens=rng.choice((1, 2, 7, 15, 16, 17, 31, 33, 64, 150)),
                slots=rng.choice((1, 2, 3, 8)),
                block=rng.choice((0, 1, 2, 16)),
                view=rng.randint(0, 1),
                seed=rng.randint(1, 10**6),
                schedules="0,1,2,3",
            )
        )
    return result


@pytest.mark.parametrize("seed", range(2))
def test_random(harness: Path, seed: int) -> None:
    outcomes = run_cases(harness, lines(seed, 70))
    assert [f for o in outcomes if (f := o.failure(1.0, 1.0))] == []


def test_few_tokens_need_no_ranks(harness: Path) -> None:
    """A token selects an expert once, so a block is not filled by as many tokens as it has."""
    few, many, primary = run_cases(harness, [spec(op="remap", tokens=t, block=b, slots=3) for t, b in ((16, 16), (17, 16), (40, 0))])
    for outcome, kernel in (
        (few, "kernel_expert_remap_local_i32"),
        (many, "kernel_expert_remap_i32"),
        (primary, "kernel_expert_remap_local_i32"),
    ):
        assert not outcome.failure(1.0, 1.0)
        assert [name for name, _ in outcome.runs[0].encoded] == [kernel]
