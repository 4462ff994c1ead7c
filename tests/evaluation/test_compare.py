"""Files side by side: on the demo model, and as a table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rq_gguf.bench.measure import Bench, Options, Variant
from rq_gguf.cli import main
from rq_gguf.evaluation.balance import Balance, LayerBalance
from rq_gguf.evaluation.compare import Comparison, describe, to_json
from rq_gguf.evaluation.evaluate import Evaluation, evaluate
from rq_gguf.evaluation.items import Item, Task
from rq_gguf.evaluation.quality import Figure, Quality
from rq_gguf.evaluation.tasks import Scores, TaskResult, pair
from rq_gguf.size import Size


@pytest.fixture
def comparison() -> Comparison:
    """A base, a stock file and a file with copies."""
    variants = tuple(Variant(name, Path(name), 0, name == "rq.gguf") for name in ("base.gguf", "q4.gguf", "rq.gguf"))
    sizes = (Size(2_000_000, 1_600_000, 800_000), Size(500_000, 450_000, 800_000), Size(510_000, 460_000, 800_000))
    even, copied = (Balance(1024, (LayerBalance(0, 4, n, 2.0, after, after),)) for n, after in ((4, 2.0), (5, 1.25)))
    task = Task(Path("arc.jsonl"), (Item(1, "a", ("b", "c"), 0),) * 2, 2)
    evaluations = []
    for path, kld, balance, right in (("q4.gguf", 0.012, even, [False, True]), ("rq.gguf", 0.004, copied, [True, True])):
        quality = Quality(
            4, Figure(13.5, 0.25), Figure(13.25, 0.25), Figure(kld, 0.0005), Figure(0.25, None), Figure(1.5, 0.02), Figure(95.5, 0.5)
        )
        accuracy = pair("acc", np.array([False, True]), np.array(right))
        none = Scores((), (), 0)
        result = TaskResult(task, none, none, (accuracy,))
        evaluations.append(
            Evaluation(Path(path), Path("base.gguf"), 500_000, 2_000_000, (Path("t.txt"),), quality, balance, (), (result,), even)
        )
    samples = {("base.gguf", "pp8"): (1000.0,), ("q4.gguf", "pp8"): (2000.0,), ("rq.gguf", "pp8"): (1500.0,)}
    bench = Bench(Options(prompt=(8,), generate=(), sequences=(), rounds=1), variants, samples, ("pp8",), None, "", interrupted=False)
    return Comparison(variants, sizes, tuple(evaluations), bench)


def test_table(comparison):
    lines = describe(comparison)
    assert lines[: lines.index("")] == [
        "|                 | base.gguf (base) |              q4.gguf |                 rq.gguf |",
        "| :-------------- | ---------------: | -------------------: | ----------------------: |",
        "| bytes           |        2,000,000 |              500,000 |                 510,000 |",
        "| bits per weight |            16.00 |                 4.50 |                    4.60 |",
        "| PPL             |   13.250 ± 0.250 |       13.500 ± 0.250 |          13.500 ± 0.250 |",
        "| Mean KLD        |                0 |    0.01200 ± 0.00050 |       0.00400 ± 0.00050 |",
        "| 99.9% KLD       |                0 |               0.2500 |                  0.2500 |",
        "| Same top p      |            100 % |       95.50 ± 0.50 % |          95.50 ± 0.50 % |",
        "| LIS             |             2.00 |                 2.00 |            2.00 -> 1.25 |",
        "| arc acc         |            50.00 | 50.00 (+0.00 ± 0.00) | 100.00 (+50.00 ± 50.00) |",
        "| pp8, t/s        |            1,000 |        2,000 (2.00x) |           1,500 (1.50x) |",
    ]
    assert "Tasks: accuracy in points (2 of arc); in brackets the difference from the base, paired over items." in lines


def test_what_was_not_measured_has_no_row(comparison):
    bare = replace(
        comparison,
        bench=None,
        evaluations=tuple(replace(e, quality=None, balance=None, balance_base=None) for e in comparison.evaluations),
    )
    lines = describe(bare)
    assert [line.split("|")[1].strip() for line in lines[2 : lines.index("")]] == ["bytes", "bits per weight", "arc acc"]
    assert to_json(bare)["bench"] is None


def test_json(comparison):
    data = json.loads(json.dumps(to_json(comparison)))
    assert data["base"] == {
        "name": "base.gguf", "file": "base.gguf", "file_bytes": 2_000_000, "bpw": 16.0, "weights": 800_000, "tiered": False
    }  # fmt: skip
    assert [f["evaluation"]["quality"]["Mean KLD"]["value"] for f in data["files"]] == [0.012, 0.004]
    assert data["bench"]["files"][2]["tests"]["pp8"]["ratio"]["median"] == 1.5


@pytest.mark.runtime
@pytest.mark.e2e
def test_the_command(demo_base, tiered_demo, tmp_path):
    """The figures of a file are those that `eval` gives for it alone; the base beside itself differs in nothing."""
    text, out = tmp_path / "text.txt", tmp_path / "compare.json"
    held_out = Path(__file__).resolve().parents[2] / "rq_gguf" / "data" / "heldout.txt"
    text.write_text(held_out.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    again = tmp_path / "again.gguf"
    again.symlink_to(demo_base)
    arguments = ["compare", tiered_demo, again, "--base", demo_base, "--text", text, "--chunks", "2", "--rounds", "0", "--threads", "2"]
    done = CliRunner().invoke(main, [*map(str, arguments), "--json", str(out)])
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    alone = evaluate(tiered_demo, demo_base, [text], chunks=2, threads=2, progress=False)
    ours, same = (f["evaluation"] for f in data["files"])
    assert ours["quality"]["Mean KLD"]["value"] == pytest.approx(alone.quality.kld.value, rel=1e-3)
    assert ours["balance"]["lis_before"] == pytest.approx(alone.balance.before)
    assert ours["balance"]["lis_before"] > ours["balance"]["lis_after"]
    assert same["quality"]["Mean KLD"]["value"] == pytest.approx(0, abs=1e-5)
    assert same["quality"]["Same top p"]["value"] == 100
    assert data["files"][0]["tiered"] and not data["files"][1]["tiered"]
    assert data["files"][0]["bpw"] < 10 and data["base"]["bpw"] == pytest.approx(16, abs=0.1)
    assert data["files"][0]["weights"] == data["base"]["weights"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| LIS"))
    assert "->" in row.split("|")[3] and "->" not in row.split("|")[2] + row.split("|")[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["README.md", "--base", "README.md"], "name at least one .gguf file"),
        (["none.gguf", "--base", "README.md"], "'none.gguf' does not exist"),
    ],
)
def test_refused(arguments, message):
    done = CliRunner().invoke(main, ["compare", *arguments])
    assert done.exit_code == 2 and message in done.stderr
