"""tools/bench_vram.py: what it makes of figures, with a program in llama-bench's place."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, load_tool
from writing.samples import base_model

TOOL = TOOLS / "bench_vram.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("bench_vram")


def test_the_runtime_s_speeds_by_hand(tool: ModuleType) -> None:
    """6 layers, 4 of them with 8 experts of 100 bytes, 2 used; 1000 bytes of others: 10 s in VRAM, 6 s for the layers besides,
    0.5 s for a layer's experts on the GPU, where it has some."""
    model = tool.Model(Path("m.gguf"), layers=4, used=0.25, n_used=1, expert_bytes=3200, other_bytes=1500, read_bytes=1000, blocks=6)
    speeds = tool.Speeds(ram=10, vram=100, handover=3, layer=1, experts=0.5, whole=0)
    assert 1 / speeds.decode(model, 0, 4, 0.0) == pytest.approx(10 + 6 + 4 * 2.5)
    assert 1 / speeds.decode(model, 0, 1, 0.0) == pytest.approx(10 + 6 + 2.5 + 3 * (3 + 20))
    assert 1 / replace(speeds, whole=5).decode(model, 0, 1, 0.0) == pytest.approx(10 + 6 + 2.5 + 3 * (5 + 20))
    assert 1 / speeds.decode(model, 3, 1, 0.75) == pytest.approx(10 + 6 + 2.5 + 3 * (3 + 0.75 * 2.5 + 0.25 * 20))


PROGRAM = """#!PYTHON
import json, os, sys
layers = int(sys.argv[sys.argv.index("-ncmoe") + 1]) if "-ncmoe" in sys.argv else 0
vram = os.environ.get("LLAMA_EXPERT_VRAM")
seconds = 0.010 + layers * 0.003
if vram:
    missed = (1 - float(vram[:-1]) / 100) ** 2
    seconds = 0.010 + LAYERS * (0.001 + missed * 0.002)
    print(f"llama_hot: CUDA0: ram=5e+10,vram=2e+12,handover=0.001,layer=0.0005,experts=1e-06,whole=0.002,q8_0=5e+10", file=sys.stderr)
    print(f"llama_hot: experts in fast memory: 1 to 2 of 4 in each of LAYERS layers; 1.0 of 2.0 MiB", file=sys.stderr)
    print(f"llama: experts in fast memory took {100 * (1 - missed):.1f} % of the selections in decoding, 1 % in prompts", file=sys.stderr)
records = [{"n_prompt": p, "n_gen": 0, "samples_ts": [p / (0.1 + layers * 0.05)]} for p in (512, 2048)]
print(json.dumps(records + [{"n_prompt": 0, "n_gen": 128, "samples_ts": [1 / seconds]}]))
"""


def test_as_many_bytes_as_stocks_layers_by_hand(tool: ModuleType) -> None:
    model = tool.Model(Path("m.gguf"), layers=16, used=0.25, n_used=1, expert_bytes=1, other_bytes=1, read_bytes=1, blocks=16)
    assert [model.on_cpu(p) for p in (0, 0.01, 0.1, 0.25, 0.9, 0.99, 1)] == [16, 15, 14, 12, 2, 1, 0]
    assert [model.held(p) for p in (0, 0.1, 0.25, 0.9, 1)] == [0, 0.125, 0.25, 0.875, 1]


def test_a_whole_run(tool: ModuleType, tmp_path: Path) -> None:
    model = base_model(tmp_path / "m.gguf")
    layers = tool.read_model(model).layers
    program = tmp_path / "llama-bench"
    program.write_text(PROGRAM.replace("PYTHON", sys.executable).replace("LAYERS", str(layers)))
    program.chmod(0o755)
    words = [sys.executable, TOOL, model, "--stock", tmp_path, "--patched", tmp_path, "--parts", "25,50", "--threads", "4", "--rounds", "1"]
    done = subprocess.run([str(w) for w in [*words, "--out", tmp_path / "out"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "bench_vram.md").read_text()
    assert "| 0 % | 0 % |" in text and "| 50 % | 75 % |" in text and "| 100 % | 100 % |" in text
    each = "hand-over 1000 us, of a layer that is all the CPU's 2000 us, 500 us for any layer, 1 us for experts"
    assert f"the runtime's speeds: RAM 50.0 GB/s, VRAM 2000 GB/s, {each}" in text
    assert f"| 0 whole, {layers} split, " in text
    data = json.loads((tmp_path / "out" / "machine-m-4.json").read_text())
    assert (data["handover"], data["whole_handover"], data["ram_bandwidth"]) == (0.001, 0.002, 5e10)
    assert data["pcie_bandwidth"] == pytest.approx(tool.read_model(model).expert_bytes / (layers * 0.05))
