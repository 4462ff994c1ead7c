"""With experts on two devices of one kind the logits are those of one device, bit for bit, whatever is held where."""

from pathlib import Path

import pytest
from families.cases import CASES
from families.check import steps as family_steps
from families.check import stock_file
from families.vocabulary import SIZES
from golden.llama_lib import Step, prompt, same_bits
from hot.conftest import Reader, hits, reading

pytestmark = pytest.mark.runtime

PRIMARY: dict[str, str | int | bool] = {"rq.dispatch": "primary"}


@pytest.mark.parametrize("share", ["25%", "50%", "80%"])
@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_prompt_exchange_and_decoding(kind: str, share: str, read: Reader, tokens: list[int], request: pytest.FixtureRequest) -> None:
    model, steps = request.getfixturevalue(kind), reading(tokens[:232], 128)
    whole = read(model, steps, PRIMARY)
    split = read(model, steps, {"rq.vram": share})
    assert same_bits(whole, split)
    found = hits(split)
    assert 0 < found.decoding < 100 and 0 < found.prompts < 100
    assert found.exchanged > 0


def test_without_mapping(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    steps = reading(tokens[:80], 64)
    whole = read(stock_demo, steps)
    split = read(stock_demo, steps, {"rq.vram": "50%"}, mmap=False)
    assert same_bits(whole, split)


def test_several_sequences_at_once(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    """Prompts of different subjects, then 2, 4 and 8 sequences decode together."""
    steps = [prompt(tokens[40 * s : 40 * s + 40], s) for s in range(8)]
    for i, n in enumerate((2, 4, 8, 8, 3)):
        taken = tokens[400 + 10 * i : 400 + 10 * i + n]
        at = tuple(40 + sum(s < m for m in (2, 4, 8, 8, 3)[:i]) for s in range(n))
        steps.append(Step(tuple(taken), at, tuple(range(n))))
    whole = read(stock_demo, steps)
    split = read(stock_demo, steps, {"rq.vram": "40%"})
    assert same_bits(whole, split)


@pytest.mark.parametrize("share", ["0%", "100%"])
def test_nothing_to_split(share: str, stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    steps = reading(tokens[:80], 64)
    whole, placed = read(stock_demo, steps), read(stock_demo, steps, {"rq.vram": share})
    assert same_bits(whole, placed)
    assert ("fast memory: none" if share == "0%" else "fast memory: all, nothing is left") in placed.log


def test_exchanges_are_reproducible(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    steps = reading(tokens[:300], 64)
    first, second = (read(stock_demo, steps, {"rq.vram": "25%"}) for _ in range(2))
    assert hits(first) == hits(second)
    assert same_bits(first, second)


def test_a_fixed_set_stays(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    fixed = read(stock_demo, reading(tokens[:100], 64), {"rq.vram": "25%", "rq.vram_adapt": False})
    assert hits(fixed).exchanged == 0


def test_stored_shares_choose_the_first_set(tiered_demo: Path, stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    steps = reading(tokens[:64], 63)
    known, unknown = (read(m, steps, {"rq.vram": "50%"}) for m in (tiered_demo, stock_demo))
    assert "by the shares stored in the file" in known.log
    assert "the first prompt decides" in unknown.log


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "deepseek_v3", "mixtral", "lfm2_moe", "olmoe"])
def test_families(family: str, tmp_path: Path, read: Reader) -> None:
    """Biases, merged or scaled gates, weights that come first, groups, dense layers, eight experts per token."""
    case = next(c for c in CASES if c.model_type == family)
    model, steps = stock_file(case, tmp_path, "Q8_0"), family_steps(SIZES[case.vocabulary], 5)
    whole = read(model, steps)
    split = read(model, steps, {"rq.vram": "50%"})
    assert same_bits(whole, split)
    assert hits(split).exchanged > 0
