"""What the main job must reach on a real model with 32 experts a layer, on held-out text. `rq-gguf eval` prints the same figures."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from rq_gguf.build import build, check_choices
from rq_gguf.evaluation.balance import COUNTS_VARIABLE, measure_balance, read_counts
from rq_gguf.evaluation.evaluate import Evaluation, evaluate
from rq_gguf.evaluation.quality import run_perplexity
from rq_gguf.evaluation.text import mix
from rq_gguf.runtime.tools import run_tool

CHUNKS = 48

pytestmark = [pytest.mark.e2e, pytest.mark.runtime, pytest.mark.slow]


@dataclass(frozen=True)
class Made:
    out: Path
    base: Path
    calibration: Path
    texts: list[Path]


def make(model: Path, out: Path, calibration: Path, policy: str) -> None:
    build(str(model), out, check_choices("q8_0", "q4_k,q8_0", "auto", policy), calibration=calibration, say=lambda line: None)


@pytest.fixture(scope="module")
def made(shared, runtime, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("lab")
    out = folder / "rq.gguf"
    make(shared / "models" / "lab", out, shared / "data" / "calibration.txt", "budget")
    job = folder / "rq.gguf.rq"
    return Made(out, job / "base.gguf", job / "calibration.gguf", sorted((shared / "data" / "heldout").glob("*.txt")))


@pytest.fixture(scope="module")
def found(made) -> Evaluation:
    return evaluate(made.out, made.base, made.texts, chunks=CHUNKS, file_chunks=1, progress=False)


def test_no_larger_than_the_stock_file(made, tmp_path):
    stock = tmp_path / "q8_0.gguf"
    run_tool(["llama-quantize", made.base, stock, "Q8_0", "2"])
    assert made.out.stat().st_size <= 1.001 * stock.stat().st_size


def test_load_is_flatter(found):
    assert found.balance.reduction >= 1.5


def test_quality(found):
    q = found.quality
    assert abs(q.ppl.value / q.ppl_base.value - 1) <= 0.003
    assert q.kld.value <= 0.002


def test_paper_policy(made, tmp_path):
    """One copy of the busiest expert, the same bytes."""
    out = tmp_path / "paper.gguf"
    make(made.base, out, made.calibration, "paper")
    assert out.stat().st_size <= made.out.stat().st_size * 1.001
    text, counts = tmp_path / "mix.txt", tmp_path / "counts.json"
    text.write_text(mix([t.read_text(encoding="utf-8") for t in made.texts]), encoding="utf-8")
    env = {COUNTS_VARIABLE: str(counts)}
    run_perplexity(out, ["-f", text], chunks=CHUNKS, what="paper", env=env, progress=False)
    assert measure_balance(read_counts(counts)).reduction >= 1.10
