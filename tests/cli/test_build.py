"""`build` as a whole on a small GGUF and its calibration: no torch. What calibrates is in tests/calibration and the end-to-end tests."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from writing.samples import base_model, calibration_of

from rq_gguf.calibration.file import write_calibration
from rq_gguf.cli import main
from rq_gguf.inputs import read_text
from rq_gguf.writing.inspect import inspect
from rq_gguf.writing.source import Source

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def inputs(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.gguf and its calibration.gguf."""
    directory = tmp_path_factory.mktemp("inputs")
    base_model(directory / "base.gguf", n_expert=16)
    with Source(directory / "base.gguf") as source:
        write_calibration(directory / "calibration.gguf", calibration_of(source))
    return directory


def build(inputs: Path, out: Path, *args: object, calibration: str = "calibration.gguf") -> Result:
    given = ["build", str(inputs / "base.gguf"), str(out), "--calibration", str(inputs / calibration), *map(str, args)]
    return CliRunner().invoke(main, given, env={"RQ_GGUF_DEBUG": ""})


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("Error: ") and message in result.stderr.splitlines()[-1], result.stderr


def test_build_then_skip_then_change(inputs: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out.gguf", tmp_path / "report.json"
    first = build(inputs, out, "--json", report)
    assert first.exit_code == 0, first.output
    data = json.loads(report.read_text())
    found = inspect(out)
    assert data["file_bytes"] == out.stat().st_size == found.file_bytes
    assert data["expert_bytes"] == found.expert_bytes <= data["budget_bytes"]
    assert data["copies"] == sum(sum(layer.copies) for layer in found.layers) > 0
    assert data["lis_after"] == pytest.approx(np.mean([layer.lis_after for layer in found.layers]), rel=1e-5)
    assert first.stdout.startswith("file ") and f"llama-cli -m {out}" in first.stdout and data["command"] in first.stdout
    assert set(data["seconds"]) == {"plan", "write", "total"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "out.gguf.rq", "report.json"]

    written = out.stat().st_mtime_ns
    again = build(inputs, out)
    assert again.exit_code == 0, again.output
    assert "plan: done before" in again.stderr and f"write: done before, {out}" in again.stderr
    assert out.stat().st_mtime_ns == written
    assert again.stdout.splitlines()[:4] == first.stdout.splitlines()[:4]

    changed = build(inputs, out, "--replicas", "1")
    assert changed.exit_code == 0, changed.output
    assert "done before" not in changed.stderr
    assert [sum(layer.copies) for layer in inspect(out).layers] == [1, 1]

    forced = build(inputs, out, "--replicas", "1", "--force")
    assert forced.exit_code == 0 and "done before" not in forced.stderr


def test_dry_run_writes_no_model(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = build(inputs, out, "--dry-run", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file"] is None
    assert not out.exists() and (tmp_path / "out.gguf.rq" / "plan.json").is_file()
    build(inputs, out)
    assert out.stat().st_size <= json.loads(result.stdout)["file_bytes"]  # an upper bound


@pytest.mark.parametrize("share", [0.75, 0.9, 1.0])
def test_a_size_bounds_the_whole_file(inputs: Path, tmp_path: Path, share: float) -> None:
    out = tmp_path / "out.gguf"
    build(inputs, out, "--replicas", "0")
    size = int(out.stat().st_size * share)
    result = build(inputs, out, "--replicas", "0", "--budget", size)
    assert result.exit_code == 0, result.output
    assert size - 200_000 < out.stat().st_size <= size


def test_budget_below_the_least(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    refused(build(inputs, out, "--budget", "100kB"), "the least possible is")
    assert not out.exists()
    least = build(inputs, out, "--budget", "100kB").stderr.split("the least possible is ")[1].split(" ")[0]
    assert build(inputs, out, "--budget", least).exit_code == 0
    assert out.stat().st_size <= int(least)


def test_an_edited_plan(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    build(inputs, out, "--dry-run")
    plan = tmp_path / "out.gguf.rq" / "plan.json"
    data = json.loads(plan.read_text())
    for expert in data["layers"][0]["experts"]:
        expert["gate_up"] = expert["down"] = "q4_k"
    data["dispatch_block"] = 4
    plan.write_text(json.dumps(data))
    refused(build(inputs, out), "was edited; use it with --plan")
    result = build(inputs, out, "--plan", plan)
    assert result.exit_code == 0, result.output
    found = inspect(out)
    assert found.layers[0].tiers == {"gate_up": (("q4_k", 16),), "down": (("q4_k", 16),)}
    assert found.dispatch_block == 4
    data["layers"][1]["experts"][3]["down"] = "q4_k+q4_k+q4_k+q4_k+q4_k+q4_k"
    (tmp_path / "broken.json").write_text(json.dumps(data))
    refused(build(inputs, out, "--plan", tmp_path / "broken.json"), "layer 1, expert 3:")


def test_paper(inputs: Path, tmp_path: Path) -> None:
    result = build(inputs, tmp_path / "out.gguf", "--policy", "paper")
    assert result.exit_code == 0, result.output
    found = inspect(tmp_path / "out.gguf")
    assert [sum(layer.copies) for layer in found.layers] == [1, 1]
    assert found.budget_bytes is not None and found.expert_bytes <= found.budget_bytes


def test_a_plain_imatrix_is_measured(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    with Source(inputs / "base.gguf") as source:
        c = calibration_of(source)
    writer = gguf.GGUFWriter(inputs / "imatrix.gguf", "llama")
    writer.add_string("general.type", "imatrix")
    writer.add_uint32("imatrix.chunk_count", c.n_tokens // 512)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_array("imatrix.datasets", ["text"])
    for layer in c.layers:
        for matrix, sums in layer.in_sum2.items():
            writer.add_tensor(f"blk.{layer.layer}.ffn_{matrix}_exps.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer.layer}.ffn_{matrix}_exps.weight.counts", layer.selections.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out.gguf"
    result = build(inputs, out, calibration="imatrix.gguf")
    assert result.exit_code == 0, result.output
    assert inspect(out).provenance["rq.source.model"] == "base"
    assert "calibrate: done before" in build(inputs, out, calibration="imatrix.gguf").stderr


def test_a_merged_base(tmp_path: Path, runtime: Path) -> None:
    """The calibration knows gate and up apart; the bytes are those of the base's merged tensors."""
    base_model(tmp_path / "base.gguf", merged=True, n_expert=16, n_embd=256, n_ff=32)
    with Source(tmp_path / "base.gguf") as source:
        made = calibration_of(source)
    layers = tuple(
        replace(layer, in_sum2={"gate": layer.in_sum2["gate_up"], "up": layer.in_sum2["gate_up"], "down": layer.in_sum2["down"]})
        for layer in made.layers
    )
    write_calibration(tmp_path / "calibration.gguf", replace(made, layers=layers, merged_gate_up=False))
    result = build(tmp_path, tmp_path / "out.gguf")
    assert result.exit_code == 0, result.output
    assert inspect(tmp_path / "out.gguf").expert_bytes <= (inspect(tmp_path / "out.gguf").budget_bytes or 0)


def test_refusals(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    refused(build(inputs, tmp_path / "none" / "out.gguf"), "does not exist")
    refused(build(inputs, tmp_path), "is a directory")
    out.write_text("precious")
    refused(build(inputs, out), "use --force")
    assert out.read_text() == "precious"
    assert build(inputs, out, "--force").exit_code == 0

    base_model(tmp_path / "other.gguf", n_expert=16, seed=1)
    other = CliRunner().invoke(
        main, ["build", str(tmp_path / "other.gguf"), str(tmp_path / "o.gguf"), "--calibration", str(inputs / "calibration.gguf")]
    )
    refused(other, "was made for another model")
    base_model(tmp_path / "deep.gguf", n_expert=16, layers=(0, 1, 2))
    deep = CliRunner().invoke(
        main, ["build", str(tmp_path / "deep.gguf"), str(tmp_path / "o.gguf"), "--calibration", str(inputs / "calibration.gguf")]
    )
    refused(deep, "is a calibration of another model: it has blocks [0, 1]")
    monkeypatch.setattr("rq_gguf.inputs.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(build(inputs, tmp_path / "full.gguf"), "0.00 GB free; free some or choose another disk")
    assert not (tmp_path / "full.gguf").exists()


def test_interrupted_write_leaves_nothing(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rq_gguf.writing.write._write", interrupt)
    result = build(inputs, out)
    assert result.exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.rq"]
    monkeypatch.undo()
    again = build(inputs, out)
    assert again.exit_code == 0 and "plan: done before" in again.stderr


def test_the_default_text_comes_with_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    import logging

    logging.getLogger("rq_gguf").propagate = True
    text = read_text(None)
    assert len(text) > 100_000
    assert "a text of your own kind is better" in caplog.text
    (tmp_path / "mine.txt").write_text("mine")
    caplog.clear()
    assert read_text(tmp_path / "mine.txt") == "mine" and not caplog.text
