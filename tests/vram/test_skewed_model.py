"""tools/skewed_model.py on a small shape: every layer prefers its first experts as much as wanted, and uses nearly all of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tool_modules import load_tool

from rq_gguf.evaluation.balance import COUNTS_VARIABLE, read_counts

pytestmark = pytest.mark.runtime


def test_every_layer_is_skewed_alike(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("skewed_model")
    small = replace(tool.SHAPES["olmoe"], n_embd=256, n_head=4, n_ff=256, n_expert=32, n_used=4)
    monkeypatch.setitem(tool.SHAPES, "small", small)
    model = tmp_path / "m.gguf"
    words = [model, "--programs", runtime, "--shape", "small", "--layers", "5", "--vocabulary", "2048", "--caught", "60@25"]
    monkeypatch.setattr(sys, "argv", ["skewed_model", *map(str, words)])
    tool.main()
    counts = tmp_path / "counts.json"
    command = [runtime / "llama-bench", "-m", model, "-p", "0", "-n", "256", "-r", "1", "-t", "2"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, COUNTS_VARIABLE: str(counts)})
    layers = np.stack([layer.logical for layer in read_counts(counts).layers])
    assert json.loads(counts.read_text())["n_tokens"] > 256 and layers.shape == (5, 32)
    for layer in layers:
        assert tool.catch(layer[None], 25) == pytest.approx(60, abs=6)
        assert (layer > 0).sum() >= 28
