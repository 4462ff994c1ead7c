"""`rq-gguf plan --vram`, `report --vram` and what `trace` prints, as a user calls them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from placement.samples import sample_trace
from synthetic import synthetic_calibration

from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.calibration.trace import write_trace
from rq_gguf.cli import main
from rq_gguf.planning.file import read_plan
from rq_gguf.types import LADDER
from rq_gguf.vram.hits import study_halves
from rq_gguf.vram.table import hits_json, hits_lines


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def refused(*words: object) -> str:
    done = call(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output and "Error: " in done.output
    return str(done.output)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    made = synthetic_calibration(4, 16, LADDER, n_embd=2048, n_ff=1024, n_tokens=65536)
    write_calibration(tmp_path / "c.gguf", made)
    return tmp_path / "c.gguf"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_trace(tmp_path / "t.npz", sample_trace(layers=(0, 1, 2, 3), length=128))
    return tmp_path / "t.npz"


def test_plan(calibration: Path, trace: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "p.json", tmp_path / "f.json"
    done = call("plan", calibration, "-o", out, "--budget", "q4_k", "--vram", "50%", "--machine", "8gb", f"--json={figures}")
    assert done.exit_code == 0, done.output
    assert "machine   8gb: RAM 63 GB/s" in done.output and "best in the budget" in done.output and "without the model" in done.output
    data = json.loads(figures.read_text())["speed"]
    assert data["machine"]["name"] == "8gb" and sum(c["written"] for c in data["choices"]) == 1
    written = next(c for c in data["choices"] if c["written"])
    plan = read_plan(out, read_any(calibration))  # `build --plan` takes it
    assert plan.expert_bytes == written["expert_bytes"] and not any(sum(layer.copies) for layer in plan.layers)
    assert written["predicted_kld"] <= data["choices"][0]["predicted_kld"] * (1 + 1e-6)
    assert all(c["vram_bytes"] <= data["vram_bytes"] and c["decode"] >= c["stock_decode"] for c in data["choices"])
    # Bytes instead of a part, and a text's own hit shares.
    size = data["vram_bytes"]
    again = call(
        "plan", calibration, "-o", out, "--budget", "q4_k", "--vram", size, "--machine", "8gb", "--trace", trace, f"--json={figures}"
    )
    assert again.exit_code == 0, again.output
    other = json.loads(figures.read_text())["speed"]
    assert other["vram_bytes"] == size and other["missed_power"] != data["missed_power"]
    assert "--target-kld" not in done.output
    aimed = call("plan", calibration, "-o", out, "--target-kld", "0.01", "--vram", "0")
    assert aimed.exit_code == 0 and "| none |" in " ".join(aimed.output.split()), aimed.output


def test_plan_refuses(calibration: Path, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    plan = ("plan", calibration, "-o", out)
    assert "--vram much is not understood" in refused(*plan, "--vram", "much")
    assert "--vram 120% is not understood" in refused(*plan, "--vram", "120%")
    assert "--ram much is not understood" in refused(*plan, "--vram", "1GB", "--ram", "much")
    assert "the RAM has 1000 for them" in refused(*plan, "--vram", "1GB", "--ram", "1kB")
    assert "--machine fast is neither" in refused(*plan, "--vram", "1GB", "--machine", "fast")
    assert "--policy paper exclude" in refused(*plan, "--vram", "1GB", "--policy", "paper", "--types", "q4_k,q8_0")
    assert "--replicas 2 exclude" in refused(*plan, "--vram", "1GB", "--replicas", "2")
    assert "give --vram too" in refused(*plan, "--machine", "8gb")
    assert "give --vram too" in refused(*plan, "--ram", "1GB")
    assert "is no trace" in refused(*plan, "--vram", "1GB", "--trace", calibration)
    write_trace(tmp_path / "other.npz", sample_trace())
    assert "of another model" in refused(*plan, "--vram", "1GB", "--trace", tmp_path / "other.npz")
    write_trace(tmp_path / "short.npz", sample_trace(layers=(0, 1, 2, 3), length=1))
    assert "no sequence of two tokens" in refused(*plan, "--vram", "1GB", "--trace", tmp_path / "short.npz")
    silent = tmp_path / "s.gguf"
    write_calibration(silent, replace(read_any(calibration), n_expert_used=0))
    assert "how many experts a token takes" in refused("plan", silent, "-o", out, "--vram", "1GB")
    assert not out.exists()


def test_report(calibration: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "r.html", tmp_path / "f.json"
    words = ("report", calibration, "-o", page, "--budget", "q4_k", "--vram", "20MB")
    done = call(*words, "--machine", "16gb", f"--json={figures}", "--figures", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    data = json.loads(figures.read_text())
    assert data["machine"] == "16gb" and len(data["rates"]) == len(data["frontier"]) and len(data["uniform_rates"]) == len(data["uniform"])
    assert all(r["decode"] >= r["stock"] > 0 for r in (data["rate"], *data["rates"], *data["uniform_rates"]))
    # Fewer bits, more speed.
    assert data["rates"][0]["decode"] > data["rates"][-1]["decode"]
    text = page.read_text()
    assert 'id="speed"' in text and "tokens per second" in text and "a calibration knows only the experts" in text
    assert (tmp_path / "figures" / "speed.svg").exists()
    plain = call("report", calibration, "-o", page, "--budget", "q4_k")
    assert plain.exit_code == 0 and 'id="speed"' not in page.read_text()
    assert "--vram 6GB" in refused("report", calibration, "-o", page, "--machine", "8gb")
    assert "--machine fast is neither" in refused(*words, "--machine", "fast")


def test_hits_for_people_and_programs() -> None:
    found = study_halves(sample_trace(sequences=8, length=64))
    lines, data = hits_lines(found, 16), hits_json(found)
    assert "experts in VRAM" in lines[1] and len(lines) == 3 + len(found) and "| 4 of 16 |" in " ".join(lines[4].split())
    assert [d["slots"] for d in data] == [2, 4, 8, 12] and all(0 < d["static_worst_layer"] <= d["static"] <= 1 for d in data)
