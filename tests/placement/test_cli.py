"""`rq-gguf simulate`, `export` and `trace` as a user calls them."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from placement.samples import sample_trace
from synthetic import synthetic_calibration

from rq_gguf.calibration.file import write_calibration
from rq_gguf.calibration.trace import write_trace
from rq_gguf.cli import main


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def refused(*words: object) -> str:
    done = call(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return str(done.output)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_trace(tmp_path / "t.npz", sample_trace(sequences=40))
    return tmp_path / "t.npz"


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    write_calibration(tmp_path / "c.gguf", synthetic_calibration())
    return tmp_path / "c.gguf"


def test_simulate(trace: Path, tmp_path: Path) -> None:
    done = call("simulate", trace, "--devices", "2,8", "--batch", "8..32", "--plot", tmp_path / "p.svg", f"--json={tmp_path / 'f.json'}")
    assert done.exit_code == 0, done.output
    assert "planned on one half of t.npz" in done.output and "tokens of the busiest device over the mean" in done.output
    data = json.loads((tmp_path / "f.json").read_text())
    assert [(p["devices"], p["batch"]) for p in data["points"]] == [(d, b) for d in (2, 8) for b in (8, 16, 32)]
    assert data["points"][0]["arrangements"]["copies"]["copies"] == 4
    svg = (tmp_path / "p.svg").read_text()
    assert svg.startswith("<?xml") and "8 devices" in svg
    # Slower memory, slower steps; the same tokens.
    slow = call("simulate", trace, "--devices", "2,8", "--batch", "8..32", "--bandwidth", "1", f"--json={tmp_path / 's.json'}")
    assert slow.exit_code == 0
    for a, b in zip(data["points"], json.loads((tmp_path / "s.json").read_text())["points"], strict=True):
        assert a["arrangements"]["stock"]["tokens"] == b["arrangements"]["stock"]["tokens"]
        assert a["arrangements"]["stock"]["seconds"] < b["arrangements"]["stock"]["seconds"]


def test_simulate_on_loads_and_other_text(calibration: Path, tmp_path: Path) -> None:
    done = call("simulate", calibration, "--devices", "4", "--batch", "64")
    assert done.exit_code == 0 and "drawn independently" in done.output
    write_trace(tmp_path / "held.npz", sample_trace(n_expert=8, layers=(0, 1, 2)))
    done = call("simulate", calibration, "--evaluate", tmp_path / "held.npz", "--devices", "4", "--batch", "64")
    assert done.exit_code == 0 and "batches drawn from held.npz (384 tokens)" in done.output and "Warning" not in done.output
    write_trace(tmp_path / "other.npz", sample_trace())
    assert "of another model" in refused("simulate", calibration, "--evaluate", tmp_path / "other.npz")
    assert "is no trace" in refused("simulate", calibration, "--evaluate", calibration)


def test_simulate_asks_for_what_a_file_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"logical_count": np.arange(32).reshape(2, 16).tolist()}))
    assert "--top-k 8" in refused("simulate", path)
    assert "--shape 2048x768" in refused("simulate", path, "--top-k", 2)
    assert "has 16 experts" in refused("simulate", path, "--top-k", 17, "--shape", "64x32")
    done = call("simulate", path, "--top-k", 2, "--shape", "64x32", "--devices", "4", "--batch", "8")
    assert done.exit_code == 0, done.output


def test_simulate_refuses(trace: Path, tmp_path: Path) -> None:
    assert "--devices x" in refused("simulate", trace, "--devices", "x")
    assert "name it .svg" in refused("simulate", trace, "--devices", "2", "--batch", "8", "--plot", tmp_path / "p.png")
    assert "--bandwidth" in refused("simulate", trace, "--bandwidth", "0")
    (tmp_path / "model.txt").write_text("text")
    assert "model.txt" in refused("simulate", tmp_path / "model.txt")
    assert not list(tmp_path.glob("p.*")) and not list(tmp_path.glob(".*partial"))


def test_export(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "location.json"
    done = call(
        "export", calibration, "--for", "sglang", "--devices", 4, "--copies", 1, "--layers", 5, "-o", out, f"--json={tmp_path / 'f.json'}"
    )
    assert done.exit_code == 0, done.output
    assert f"--ep-size 4 --ep-num-redundant-experts 4 --init-expert-location {out}" in done.output
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    assert [len(r) for r in rows] == [12] * 5
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["redundant_experts"] == 4 and len(figures["busiest_over_mean_after"]) == 3
    done = call("export", calibration, "--for", "vllm", "--devices", 4, "-o", tmp_path / "v.json")
    assert done.exit_code == 0 and "vLLM takes no placement" in done.output
    assert json.loads((tmp_path / "v.json").read_text()) == {"num_redundant_experts": 0}


def test_export_refuses(calibration: Path, tmp_path: Path) -> None:
    before = calibration.read_bytes()
    assert "name another" in refused("export", calibration, "--for", "vllm", "--devices", 2, "-o", calibration)
    assert calibration.read_bytes() == before
    assert "ends in .json" in refused("export", calibration, "--for", "sglang", "--devices", 2, "-o", tmp_path / "x.txt")
    assert "--layers 2" in refused("export", calibration, "--for", "sglang", "--devices", 2, "--layers", 2, "-o", tmp_path / "x.json")
    assert "more than one of each" in refused(
        "export", calibration, "--for", "sglang", "--devices", 2, "--copies", 9, "-o", tmp_path / "x.json"
    )
    assert "cannot write" in refused("export", calibration, "--for", "sglang", "--devices", 2, "-o", tmp_path / "absent" / "x.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.gguf"]


def test_plan_takes_no_recorded_distribution(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"logical_count": [[1, 2], [3, 4]]}')
    assert "not what types do to them" in refused("plan", tmp_path / "r.json", "-o", tmp_path / "plan.json")


def test_trace_refuses(tmp_path: Path) -> None:
    assert "does not exist" in refused("trace", tmp_path / "absent.gguf", "-o", tmp_path / "t.npz")
    assert "directory does not exist" in refused("trace", "demo", "-o", tmp_path / "absent" / "t.npz")
