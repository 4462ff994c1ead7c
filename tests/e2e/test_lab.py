"""What the main job must reach on a real model with 32 experts a layer, on held-out text. `rq-gguf eval` prints the same figures."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from rq_gguf.build import build
from rq_gguf.choices import check_choices
from rq_gguf.evaluation.balance import COUNTS_VARIABLE, measure_balance, read_counts
from rq_gguf.evaluation.evaluate import Evaluation, evaluate
from rq_gguf.evaluation.quality import compare, run_perplexity, save_logits
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


def make(model: Path, out: Path, calibration: Path, policy: str = "budget", budget: str = "q8_0", replicas: str = "auto") -> None:
    build(str(model), out, check_choices(budget, None, replicas, policy), calibration=calibration, say=lambda line: None)


@pytest.fixture(scope="module")
def made(shared, runtime, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("lab")
    out = folder / "rq.gguf"
    make(shared / "models" / "lab", out, shared / "data" / "calibration.txt")
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
    assert q.kld.value <= 0.0015


def test_fewer_bytes_for_the_same_error(made, shared, tmp_path):
    """A ladder of types per expert against llama-quantize's file of one type with its own imatrix, in the same bytes."""
    imatrix, stock, out = tmp_path / "imatrix.gguf", tmp_path / "q4_k.gguf", tmp_path / "ladder.gguf"
    text, logits = tmp_path / "mix.txt", tmp_path / "logits.bin"
    run_tool(["llama-imatrix", "-m", made.base, "-f", shared / "data" / "calibration.txt", "-o", imatrix, "-c", "512", "--chunks", "128"])
    run_tool(["llama-quantize", "--imatrix", imatrix, "--tensor-type", "_exps=q4_k", made.base, stock, "Q8_0", "2"])
    make(made.base, out, made.calibration, budget=f"like:{stock}", replicas="0")
    assert out.stat().st_size <= stock.stat().st_size
    text.write_text(mix([t.read_text(encoding="utf-8") for t in made.texts]), encoding="utf-8")
    save_logits(made.base, text, logits, chunks=CHUNKS, progress=False)
    theirs, ours = (compare(file, text, logits, chunks=CHUNKS, progress=False) for file in (stock, out))
    assert ours.kld.value <= 0.65 * theirs.kld.value  # 0.6 on five times the text
    assert ours.same_top.value > theirs.same_top.value


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
