"""Whole evaluations: on the demo model where the patched llama.cpp is installed, and as text and JSON."""

import json
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.evaluation.balance import COUNTS_VARIABLE, Balance, LayerBalance
from rq_gguf.evaluation.evaluate import Evaluation, TextBalance, describe, evaluate, to_json
from rq_gguf.evaluation.quality import Figure, Quality
from rq_gguf.runtime.tools import run_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two texts of about 4000 tokens."""
    text = (ROOT / "rq_gguf" / "data" / "heldout.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "first.txt", folder / "second.txt"]
    for path, start in zip(paths, (0, 16000), strict=True):
        path.write_text(text[start : start + 16000], encoding="utf-8")
    return paths


@pytest.mark.runtime
@pytest.mark.e2e
def test_a_stock_file(demo_base, texts, tmp_path, monkeypatch):
    out, counts = tmp_path / "q4.gguf", tmp_path / "counts.json"
    run_tool(["llama-quantize", demo_base, out, "Q4_K", "2"])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = evaluate(out, demo_base, texts, chunks=4, file_chunks=2, threads=2, progress=False)
    q = found.quality
    assert q.chunks == 4
    assert 0.001 < q.kld.value < 0.1 and 0 < q.kld.error < 0.01 < q.kld_999.value
    assert 80 < q.same_top.value < 100
    assert q.ppl.value == pytest.approx(q.ppl_base.value, rel=0.1)
    # 4 chunks of 512 tokens, of which the last layer computes the scored half; copies there are none.
    assert found.balance.n_tokens == 2048
    assert [(x.layer, x.n_expert, x.n_phys) for x in found.balance.layers] == [(i, 16, 16) for i in range(4)]
    assert found.balance.before == found.balance.after > 1
    assert [(t.text, t.balance.n_tokens) for t in found.by_text] == [("first.txt", 1024), ("second.txt", 1024)]
    # The same counts as in a run of its own on one of the texts.
    run_tool(["llama-perplexity", "-m", out, "-f", texts[1], "-c", "512", "--chunks", "2"], env={COUNTS_VARIABLE: str(counts)})
    served = [layer["logical"] for layer in json.loads(counts.read_text())["layers"]]
    assert [max(row) * 16 / sum(row) for row in served] == pytest.approx([x.before for x in found.by_text[1].balance.layers])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["counts.json", "q4.gguf"]


@pytest.mark.runtime
def test_a_text_that_is_too_short(demo_base, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.")
    with pytest.raises(UserError, match="scored nothing of short.txt: give a text of at least 1024 tokens"):
        evaluate(demo_base, demo_base, [text], chunks=2, threads=2, progress=False)


def test_bad_arguments(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.")
    none = tmp_path / "none.gguf"
    for texts, options, reason in [
        ([], {}, "at least one --text"),
        ([text], {"chunks": 0}, "--chunks 0"),
        ([text], {"threads": 0}, "--threads 0"),
        ([tmp_path / "none.txt"], {}, "none.txt cannot be read: no such file"),
        ([text], {}, r"cannot read .*none.gguf: no such file"),
    ]:
        with pytest.raises(UserError, match=reason):
            evaluate(none, none, texts, **options)


@pytest.fixture
def evaluation() -> Evaluation:
    layers = (LayerBalance(0, 4, 5, 2.0, 1.0, 1.25), LayerBalance(1, 4, 5, 3.0, 2.0, 2.5))
    quality = Quality(
        80, Figure(13.9, 0.3), Figure(13.8, 0.3), Figure(0.00123, 0.00002), Figure(0.05, None), Figure(1.5, 0.02), Figure(97.1, 0.1)
    )
    balance = Balance(40960, layers)
    by_text = tuple(TextBalance(name, balance, Figure(13.9, 0.3)) for name in ("a.txt", "b.txt"))
    paths = (Path("a.txt"), Path("b.txt"))
    return Evaluation(Path("out.gguf"), Path("base.gguf"), 1000000, 2000000, paths, quality, balance, by_text)


def test_table(evaluation):
    assert describe(evaluation).splitlines() == [
        "out.gguf (1,000,000 bytes) against base.gguf (2,000,000 bytes)",
        "",
        "quality   2 texts mixed, 80 chunks of 512 tokens",
        "  Mean PPL(Q)     13.9000 ± 0.3000",
        "  Mean PPL(base)  13.8000 ± 0.3000",
        "  Mean KLD        0.001230 ± 0.000020",
        "  99.9% KLD       0.050000",
        "  RMS Δp          1.500 ± 0.020 %",
        "  Same top p      97.100 ± 0.100 %",
        "  PPL change      +0.72 %",
        "",
        "balance   LIS as llama.cpp counted it, mean over layers (1 is even); reduction: mean over layers of before / after",
        "  text           tokens  before  after  reduction  per physical expert",
        "  2 texts mixed  40,960    2.50   1.50      1.75x                 1.88",
        "  a.txt          40,960    2.50   1.50      1.75x                 1.88",
        "  b.txt          40,960    2.50   1.50      1.75x                 1.88",
        "  worst layer 1: LIS 3.00 -> 2.00; ratio of the means 1.67x",
        "  mean reduction over the 2 texts, each by itself: 1.75x",
    ]


def test_json(evaluation):
    data = json.loads(json.dumps(to_json(evaluation)))
    assert data["quality"]["Mean KLD"] == {"value": 0.00123, "error": 0.00002}
    assert data["quality"]["chunks"] == 80
    assert data["balance"]["reduction"] == 1.75
    assert data["balance"]["layers"][1]["after"] == 2.0
    assert [t["text"] for t in data["by_text"]] == ["a.txt", "b.txt"]
