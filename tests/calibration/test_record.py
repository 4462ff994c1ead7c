"""Traces of what routers choose: the same from calibration, from a pass of their own, and nearly so from llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration.test_switch import TEXT as SWITCH_TEXT
from calibration.test_switch import directory as switch_directory  # noqa: F401 (a fixture)
from tiny_models import save_tokenizer, tiny_model

from rq_gguf.calibration import record as record_module
from rq_gguf.calibration import run
from rq_gguf.calibration.record import record
from rq_gguf.calibration.trace import Recorder, Trace, read_trace
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.inputs import read_text
from rq_gguf.record import record_routing, to_json

TEXT = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 96, 700))


def model(path: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(path)
    save_tokenizer(path)
    return path


def same(a: Trace, b: Trace) -> bool:
    return a.layers == b.layers and (a.starts == b.starts).all() and all((x == y).all() for x, y in zip(a.ids, b.ids, strict=True))


# A dense first layer; top-1; an own class; a plain one.
@pytest.mark.parametrize("family", ["deepseek_v2", "llama4_text", "deepseek", "mixtral"])
def test_a_trace_is_what_calibration_counts(tmp_path: Path, ggml: Ggml, family: str) -> None:
    directory, recorder = model(tmp_path, family), Recorder()
    c = run.calibrate(directory, TEXT, types=("q8_0",), ggml=ggml, device="cpu", threads=1, progress=False, recorder=recorder)
    by_calibration = recorder.trace(c.model, c.layers[0].n_expert, c.n_embd, c.n_ff)
    alone = record(directory, TEXT, device="cpu", progress=False)
    assert same(by_calibration, alone)
    assert (alone.n_expert, alone.n_embd, alone.n_ff, alone.n_expert_used) == (8, c.n_embd, c.n_ff, c.n_expert_used)
    assert alone.layers == tuple(layer.layer for layer in c.layers) and alone.n_tokens == c.n_tokens
    assert alone.selections().tolist() == [layer.selections.tolist() for layer in c.layers]
    # Whole sequences first, the short rest last.
    assert np.diff(alone.starts).tolist() == [128] * 5 + [60]


def test_how_many_pass_at_a_time_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model(tmp_path, "mixtral")
    expected = record(directory, TEXT, device="cpu", progress=False)
    with monkeypatch.context() as m:
        batches = record_module.batches
        m.setattr(record_module, "batches", lambda sequences, _: batches(sequences, 2))
        assert same(record(directory, TEXT, device="cpu", progress=False, work=tmp_path), expected)
    with pytest.raises(UserError, match="--max-memory"):
        record(directory, TEXT, device="cpu", progress=False, max_memory=1000)


def test_switch_is_recorded_by_calibration(switch_directory: Path, ggml: Ggml) -> None:  # noqa: F811
    recorder = Recorder()
    options: dict[str, Any] = {"types": ("q8_0",), "ggml": ggml, "device": "cpu", "threads": 1, "progress": False}
    c = run.calibrate(switch_directory, SWITCH_TEXT, recorder=recorder, **options)
    trace = recorder.trace("m", 8, c.n_embd, c.n_ff)
    assert trace.selections().tolist() == [layer.selections.tolist() for layer in c.layers]
    with pytest.raises(UserError, match="calibrate --trace"):
        record(switch_directory, SWITCH_TEXT, device="cpu", progress=False)


@pytest.mark.runtime
def test_llama_cpp_chooses_the_same(demo_base: Path, demo_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": None, "tokens": 2048, "device": "auto", "max_memory": None}
    theirs = record_routing(str(demo_base), tmp_path / "g.npz", **options)
    ours = record(demo_model, read_text(None), tokens=2048, progress=False)
    assert same(read_trace(tmp_path / "g.npz"), theirs)
    assert (theirs.layers, theirs.n_expert, theirs.n_embd, theirs.n_ff) == (ours.layers, ours.n_expert, ours.n_embd, ours.n_ff)
    assert (theirs.starts == ours.starts).all()
    # bf16 weights against float32 arithmetic: near ties fall either way.
    agreement = [(np.sort(a, axis=1) == np.sort(b, axis=1)).mean() for a, b in zip(theirs.ids, ours.ids, strict=True)]
    assert min(agreement) > 0.99
    assert to_json(theirs, tmp_path / "g.npz")["tokens"] == 2048


@pytest.mark.runtime
def test_gguf_errors(demo_base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": None, "tokens": 2048, "device": "auto", "max_memory": None}
    with pytest.raises(UserError, match="--device and --max-memory"):
        record_routing(str(demo_base), tmp_path / "t.npz", **{**options, "max_memory": 10**9})
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(UserError, match="only .* tokens"):
        record_routing(str(demo_base), tmp_path / "t.npz", **{**options, "text": short})
    (tmp_path / "broken.gguf").write_bytes(demo_base.read_bytes()[:5000])
    with pytest.raises(UserError, match="broken.gguf"):
        record_routing(str(tmp_path / "broken.gguf"), tmp_path / "t.npz", **options)
    with pytest.raises(UserError, match="directory does not exist"):
        record_routing(str(demo_base), tmp_path / "absent" / "t.npz", **options)
    assert not list(tmp_path.glob("*.npz"))
