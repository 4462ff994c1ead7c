"""What the experts in fast memory catch on real text, counted by the runtime: a prompt of 256 tokens, then its continuation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hot.conftest import Reader, hits, reading

from rq_gguf.runtime.tools import run_tool
from rq_gguf.writing.convert import convert_base

N_PROMPT, N_MORE = 256, 256


@pytest.fixture(scope="session")
def stock_lab(shared: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    convert_base(shared / "models" / "lab", folder / "base.gguf", progress=False)
    run_tool(["llama-quantize", "--tensor-type", "_exps=q4_K", folder / "base.gguf", folder / "stock.gguf", "Q8_0", "2"])
    return folder / "stock.gguf"


@pytest.fixture(scope="session")
def domains(shared: Path) -> Callable[[], list[list[int]]]:
    """The first tokens of the held-out texts, one subject each."""

    def read() -> list[list[int]]:
        vocabulary = sentencepiece.SentencePieceProcessor(str(shared / "models" / "lab" / "tokenizer.model"))
        texts = sorted((shared / "data" / "heldout").glob("*.txt"))
        assert len(texts) == 8
        return [[1, *vocabulary.encode(t.read_text(encoding="utf-8")[:40000])][: N_PROMPT + N_MORE] for t in texts]

    return read


@pytest.mark.slow
@pytest.mark.runtime
@pytest.mark.parametrize(("part", "least"), [("25%", 58), ("50%", 81)])
def test_a_stock_file_follows_the_text(
    part: str, least: float, stock_lab: Path, domains: Callable[[], list[list[int]]], read: Reader
) -> None:
    found = [hits(read(stock_lab, reading(tokens, N_PROMPT), {"rq.vram": part})).decoding for tokens in domains()]
    print(f"{part}: {np.mean(found):.1f} % of the selections in decoding; by subject {found}")
    assert np.mean(found) >= least
