"""Conversion by the pinned llama.cpp's converter."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import read_header
from rq_gguf.runtime import tools
from rq_gguf.writing.convert import convert_base, hub_metadata
from rq_gguf.writing.source import Source


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def changed(demo_model: Path, to: Path) -> Path:
    shutil.copytree(demo_model, to)
    for path in to.iterdir():
        path.chmod(0o644)
    return to


@pytest.mark.runtime
@pytest.mark.slow
def test_demo(folder, runtime, demo_model):
    """Experts keep their 16 bits, and the routers the checkpoint's values; names with braces are names."""
    out = folder / "de{mo}.gguf"
    convert_base(demo_model, out)
    assert [p.name for p in folder.iterdir()] == ["de{mo}.gguf"]
    weights = load_file(demo_model / "model.safetensors")
    config = json.loads((demo_model / "config.json").read_text())
    with Source(out) as source:
        assert [s.n_expert for s in source.shape.layers] == [config["num_local_experts"]] * config["num_hidden_layers"]
        assert {t.type for layer in source.experts.values() for t in layer.values()} == {"bf16"}
        name = next(k for k in weights if "layers.2." in k and k.endswith("experts.3.w2.weight"))
        np.testing.assert_array_equal(source.expert(2, "down", 3, Ggml(tools.library_path())), weights[name].float().numpy())
        assert source.fingerprint()


@pytest.mark.runtime
@pytest.mark.slow
def test_a_model_in_the_hub_cache_keeps_its_name(folder, tmp_path, runtime, demo_model):
    """Its directory is named after a commit."""
    repository = tmp_path / "models--some-one--Tiny-16x5M-Instruct-v0.1"
    model = changed(demo_model, repository / "snapshots" / ("0123456789" * 4))
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some-one/Tiny\n---\n")
    convert_base(model, folder / "x.gguf")
    header = read_header(folder / "x.gguf")
    general = {
        "name": "Tiny 16x5M Instruct v0.1", "organization": "Some One", "basename": "Tiny", "finetune": "Instruct", "version": "v0.1",
        "size_label": "16x5M", "license": "apache-2.0", "base_model.0.repo_url": "https://huggingface.co/some-one/Tiny",
        "source.repo_url": "https://huggingface.co/some-one/Tiny-16x5M-Instruct-v0.1",
    }  # fmt: skip
    assert {key: header.get(f"general.{key}") for key in general} == general
    assert hub_metadata(demo_model) == hub_metadata(repository) == {}


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "f32"), (torch.float16, "f16")])
def test_float_types_are_kept(folder, tmp_path, runtime, demo_model, dtype, stored):
    model = changed(demo_model, tmp_path / "model")
    weights = {k: v.to(dtype) for k, v in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    convert_base(model, folder / "x.gguf")
    with Source(folder / "x.gguf") as source:
        assert {t.type for layer in source.experts.values() for t in layer.values()} == {stored}


@pytest.mark.runtime
def test_refusals(folder, tmp_path, runtime, demo_model):
    with pytest.raises(UserError, match="is not a Hugging Face model directory: it has no config.json"):
        convert_base(tmp_path, folder / "x.gguf")
    model = changed(demo_model, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="model.safetensors is no complete safetensors file"):
        convert_base(model, folder / "x.gguf")
    (model / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        convert_base(model, folder / "x.gguf")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        convert_base(model, folder / "x.gguf")
    assert list(folder.iterdir()) == []


@pytest.mark.runtime
@pytest.mark.slow
def test_converter_error(folder, tmp_path, runtime, demo_model):
    model = changed(demo_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}))
    with pytest.raises(UserError, match=r"cannot convert .*UnheardOfForCausalLM") as e:
        convert_base(model, folder / "x.gguf")
    assert "\n" not in str(e.value)
    assert list(folder.iterdir()) == []


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(folder, runtime, demo_model, number):
    """The converter ends too, and leaves nothing."""
    script = f"""
from pathlib import Path
from rq_gguf.writing.convert import convert_base
convert_base(Path({str(demo_model)!r}), Path({str(folder / "x.gguf")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = int(children.read_text().split()[0]) if children.exists() else None
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert list(folder.iterdir()) == []
    if child is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
