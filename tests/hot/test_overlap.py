"""The CPU computes its experts while the device computes its own: the same bits as one after the other (order: test_async_device.py)."""

from pathlib import Path

import pytest
from golden.llama_lib import Step, prompt, same_bits
from hot.conftest import Reader, hits, reading

pytestmark = pytest.mark.runtime

APART: dict[str, str | int | bool] = {"rq.vram": "50%", "rq.vram_overlap": False}


@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_the_same_bits_without(kind: str, read: Reader, tokens: list[int], request: pytest.FixtureRequest) -> None:
    model, steps = request.getfixturevalue(kind), reading(tokens[:232], 128)
    both, apart = read(model, steps, {**APART, "rq.vram_overlap": True}), read(model, steps, APART)
    assert same_bits(both, apart)
    assert hits(both) == hits(apart) and hits(both).exchanged > 0


def test_batches_of_every_small_size(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    steps, at = [prompt(tokens[40 * s : 40 * s + 40], s) for s in range(8)], [40] * 8
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 8, 1):
        steps.append(Step(tuple(tokens[400 + n : 400 + 2 * n]), tuple(at[:n]), tuple(range(n))))
        at[:n] = [a + 1 for a in at[:n]]
    assert same_bits(read(stock_demo, steps, {"rq.vram": "40%"}), read(stock_demo, steps, {**APART, "rq.vram": "40%"}))


def test_not_a_boolean(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"rq\.vram_overlap must be a boolean, for example rq\.vram_overlap=bool:false"):
        read(stock_demo, reading(tokens[:4], 3), {**APART, "rq.vram_overlap": "no"})
