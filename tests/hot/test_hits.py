"""What the experts in fast memory catch on real text, counted by the runtime: a prompt of 256 tokens, then its continuation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from gguf import GGUFValueType
from hot.conftest import Hits, Reader, hits, reading

from rq_gguf import gguf_file as gg
from rq_gguf.calibration.record import record
from rq_gguf.format import KEY_LOAD
from rq_gguf.runtime.tools import run_tool
from rq_gguf.writing.convert import convert_base

N_PROMPT, N_MORE = 256, 256
CALIBRATED = 65536
"""Tokens, `rq-gguf trace`'s default."""

Domains = Callable[[], list[list[int]]]


@pytest.fixture(scope="session")
def stock_lab(shared: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    convert_base(shared / "models" / "lab", folder / "base.gguf", progress=False)
    run_tool(["llama-quantize", "--tensor-type", "_exps=q4_K", folder / "base.gguf", folder / "stock.gguf", "Q8_0", "2"])
    return folder / "stock.gguf"


@pytest.fixture(scope="session")
def lab_with_loads(stock_lab: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock file with the shares of the calibration text stored in it."""
    folder = tmp_path_factory.mktemp("loads")
    text = (shared / "data" / "calibration.txt").read_text(encoding="utf-8")
    trace = record(shared / "models" / "lab", text, tokens=CALIBRATED, device="cpu", work=folder, max_memory=None)
    chosen = zip(trace.layers, trace.selections() / (trace.n_tokens * trace.n_expert_used), strict=True)
    loads = {KEY_LOAD.format(layer=layer): gg.numbers(GGUFValueType.FLOAT32, share.tolist()) for layer, share in chosen}
    stock = gg.read_header(stock_lab)
    head, placed = gg.build_header(stock.values | loads, stock.tensors.values())
    data = stock_lab.read_bytes()
    with (folder / "loads.gguf").open("wb") as file:
        file.write(head)
        for before, after in zip(stock.tensors.values(), placed, strict=True):
            file.seek(after.offset)
            file.write(data[before.offset : before.offset + before.n_bytes])
    return folder / "loads.gguf"


@pytest.fixture(scope="session")
def domains(shared: Path) -> Domains:
    """The first tokens of the held-out texts, one subject each."""

    def read() -> list[list[int]]:
        vocabulary = sentencepiece.SentencePieceProcessor(str(shared / "models" / "lab" / "tokenizer.model"))
        texts = sorted((shared / "data" / "heldout").glob("*.txt"))
        assert len(texts) == 8
        return [[1, *vocabulary.encode(t.read_text(encoding="utf-8")[:40000])][: N_PROMPT + N_MORE] for t in texts]

    return read


def caught(read: Reader, model: Path, domains: Domains, settings: dict[str, str | int | bool]) -> list[Hits]:
    """By subject."""
    found = [hits(read(model, reading(tokens, N_PROMPT), settings)) for tokens in domains()]
    shares = [hit.decoding for hit in found]
    print(f"{settings}: {np.mean(shares):.1f} % of the selections in decoding; by subject {shares}")
    return found


@pytest.mark.slow
@pytest.mark.runtime
@pytest.mark.parametrize(("part", "least"), [("25%", 58), ("50%", 81)])
def test_a_stock_file_follows_the_text(part: str, least: float, stock_lab: Path, domains: Domains, read: Reader) -> None:
    found = caught(read, stock_lab, domains, {"rq.vram": part})
    assert np.mean([hit.decoding for hit in found]) >= least


@pytest.mark.slow
@pytest.mark.runtime
@pytest.mark.parametrize(("part", "least"), [("25%", 48), ("50%", 72)])
def test_the_busiest_by_stored_shares(part: str, least: float, lab_with_loads: Path, domains: Domains, read: Reader) -> None:
    """A set that stays as it is."""
    found = caught(read, lab_with_loads, domains, {"rq.vram": part, "rq.vram_adapt": False})
    assert np.mean([hit.decoding for hit in found]) >= least and not any(hit.exchanged for hit in found)
