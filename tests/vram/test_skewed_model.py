"""tools/skewed_model.py on a small shape: every layer prefers its first experts as much as wanted, and uses nearly all of them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tool_modules import load_tool

pytestmark = pytest.mark.runtime


def test_every_layer_is_skewed_alike(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("skewed_model")
    small = replace(tool.SHAPES["olmoe"], n_embd=256, n_head=4, n_ff=256, n_expert=32, n_used=4)
    monkeypatch.setitem(tool.SHAPES, "small", small)
    model = tmp_path / "m.gguf"
    words = [model, "--programs", runtime, "--shape", "small", "--layers", "5", "--vocabulary", "2048", "--caught", "60@25"]
    monkeypatch.setattr(sys, "argv", ["skewed_model", *map(str, words)])
    tool.main()
    layers = tool.decoded(runtime, model, 256)
    assert layers.shape == (5, 32) and layers.sum(axis=1).min() > 256 * small.n_used
    for layer in layers:
        assert tool.catch(layer[None], 25) == pytest.approx(60, abs=6)
        assert (layer > 0).sum() >= 28
