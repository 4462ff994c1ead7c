"""The command: what it writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf.constants import GGUFValueType
from report.samples import four_experts, planned, stored
from synthetic import synthetic_calibration

from rq_gguf import gguf_file as gg
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import write_calibration
from rq_gguf.cli import main
from rq_gguf.gguf_file import Tensor
from rq_gguf.job import file_hash
from rq_gguf.planning.file import write_plan
from rq_gguf.report import make

FIGURES = ("load", "lis", "importance", "map", "bytes", "frontier", "coverage")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["report", *(str(a) for a in args)])


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    write_calibration(tmp_path / "calibration.gguf", synthetic_calibration(2, 8))
    return tmp_path / "calibration.gguf"


def embedded(page: Path) -> object:
    text = page.read_text(encoding="utf-8").split('<script type="application/json" id="figures">')[1].split("</script>")[0]
    return json.loads(text)


def test_report_of_a_calibration(calibration: Path, tmp_path: Path) -> None:
    out, data, figures = tmp_path / "report.html", tmp_path / "report.json", tmp_path / "figures"
    result = run(calibration, "-o", out, "--budget", "5.5bpw", "--vram", "100kB", "--figures", figures, "--json", data)
    assert result.exit_code == 0, result.output
    assert f"report    {out}" in result.stdout and "100 kB hold not even one expert per layer" in result.stdout
    assert embedded(out) == json.loads(data.read_text())
    assert {p.name for p in figures.glob("*.svg")} == {f"{name}.svg" for name in (*FIGURES, "speed")}
    if make.available():
        assert {p.name for p in figures.glob("*.png")} == {f"{name}.png" for name in (*FIGURES, "speed")}
    assert not list(tmp_path.rglob("*.partial"))


def test_without_matplotlib_there_are_svgs(calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "available", lambda: False)
    result = run(calibration, "-o", tmp_path / "report.html", "--figures", tmp_path)
    assert result.exit_code == 0 and "pip install 'rq-gguf[report]'" in result.stderr
    assert len(list(tmp_path.glob("*.svg"))) == 7 and not list(tmp_path.glob("*.png"))


def test_report_of_a_plan(calibration: Path, tmp_path: Path) -> None:
    c = synthetic_calibration(2, 8)
    write_plan(tmp_path / "plan.json", planned(c, "6.5bpw", 2), c)
    result = run(calibration, "-o", tmp_path / "r.html", "--plan", tmp_path / "plan.json", "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)["copies"] == 4


def file_with(tmp_path: Path, beside: Calibration | None) -> Path:
    """A file, and its calibration where build leaves it."""
    c, plan = four_experts()
    out = tmp_path / "out.gguf"
    sha256 = "c" * 64
    if beside is not None:
        (tmp_path / "out.gguf.rq").mkdir()
        write_calibration(tmp_path / "out.gguf.rq" / "calibration.gguf", beside)
        sha256 = file_hash(tmp_path / "out.gguf.rq" / "calibration.gguf")
    return stored(out, plan, c, rq__calibration__sha256=gg.string(sha256))


def test_report_of_a_file_finds_its_calibration(tmp_path: Path) -> None:
    result = run(file_with(tmp_path, four_experts()[0]), "-o", tmp_path / "r.html", "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["written"] and data["kld"] > 0 and data["notes"] == [] and data["layers"][0]["lis_after"] == pytest.approx(1.2)


def test_report_of_a_file_alone(tmp_path: Path) -> None:
    result = run(file_with(tmp_path, None), "-o", tmp_path / "r.html", "--json", "-")
    data = json.loads(result.stdout)
    assert data["kld"] is None and "(--calibration)" in data["notes"][0]


def test_a_calibration_that_the_file_was_not_made_with(tmp_path: Path) -> None:
    write_calibration(tmp_path / "other.gguf", synthetic_calibration(1, 4, seed=7))
    result = run(file_with(tmp_path, None), "-o", tmp_path / "r.html", "--calibration", tmp_path / "other.gguf", "--json", "-")
    data = json.loads(result.stdout)
    assert data["kld"] > 0 and data["notes"] == [
        "out.gguf was not made with other.gguf: what it predicts is predicted from other measurements"
    ]


def gguf(path: Path, *tensors: Tensor) -> Path:
    header, placed = gg.build_header({"general.architecture": gg.string("llama")}, tensors)
    path.write_bytes(header + bytes(sum(gg.pad(t.n_bytes, 32) for t in placed)))
    return path


def refused(result: Result, message: str, tmp_path: Path) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output and not (tmp_path / "r.html").exists()


def test_files_that_say_nothing_are_refused(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    dense = gguf(tmp_path / "dense.gguf", Tensor("blk.0.ffn_up.weight", "f32", (32, 32)))
    refused(run(dense, "-o", out), "dense.gguf holds no routed experts (a dense model, perhaps)", tmp_path)
    stock = gguf(tmp_path / "stock.gguf", Tensor("blk.0.ffn_up_exps.weight", "f32", (32, 32, 4)))
    refused(run(stock, "-o", out), "stock.gguf is a stock file, which says nothing about its experts; give a file that", tmp_path)
    for whole in (calibration, file_with(tmp_path, None)):
        cut = tmp_path / "cut.gguf"
        for size in (100, whole.stat().st_size // 2):
            cut.write_bytes(whole.read_bytes()[:size])
            refused(run(cut, "-o", out), "cut.gguf is truncated", tmp_path)
    (tmp_path / "text.gguf").write_text("words, many of them")
    refused(run(tmp_path / "text.gguf", "-o", out), "text.gguf is not a GGUF file", tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(run(tmp_path / "empty.gguf", "-o", out), "empty.gguf", tmp_path)


def test_a_type_that_does_not_exist(tmp_path: Path) -> None:
    write_calibration(tmp_path / "odd.gguf", replace(synthetic_calibration(1, 4), types=("q4_k", "q9_k")))
    refused(run(tmp_path / "odd.gguf", "-o", tmp_path / "r.html"), "odd.gguf: unknown type 'q9_k'", tmp_path)


def test_options_that_do_not_fit_are_refused(calibration: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "r.html", file_with(tmp_path, None)
    refused(run(file, "-o", out, "--budget", "q4_k"), "--budget goes with a calibration", tmp_path)
    refused(run(file, "-o", out, "--calibration", calibration), "the calibration is of synthetic, with 2 layers of 8", tmp_path)
    refused(run(calibration, "-o", out, "--calibration", calibration), "--calibration goes with a file that rq-gguf build wrote", tmp_path)
    refused(run(calibration, "-o", out, "--budget", "16GiB"), "bounds a whole file", tmp_path)
    refused(run(calibration, "-o", out, "--budget", "2bpw"), "--budget 2bpw cannot be met", tmp_path)
    for text in ("q4_k", "much", "5bpw", "like:x.gguf (5 bytes)"):
        refused(run(calibration, "-o", out, "--vram", text), f"--vram {text} is not understood", tmp_path)
    before = calibration.read_bytes()
    refused(run(calibration, "-o", calibration), "is the file to report on; name another for the page", tmp_path)
    assert calibration.read_bytes() == before
    (tmp_path / "taken").write_text("")
    result = run(calibration, "-o", tmp_path / "other.html", "--figures", tmp_path / "taken")
    assert result.exit_code == 2 and "is a file" in result.stderr
    refused(run(calibration, "-o", tmp_path / "none" / "r.html"), "cannot write in", tmp_path)


def test_a_bad_value_in_a_file_is_a_sentence(tmp_path: Path) -> None:
    c, plan = four_experts()
    bad = stored(tmp_path / "bad.gguf", plan, c, llama__expert_used_count=gg.string("two"))
    refused(run(bad, "-o", tmp_path / "r.html"), "llama.expert_used_count is no whole number", tmp_path)
    newer = stored(tmp_path / "newer.gguf", plan, c, rq__format_version=gg.scalar(GGUFValueType.UINT32, 9))
    refused(run(newer, "-o", tmp_path / "r.html"), "this rq-gguf reads 1", tmp_path)
