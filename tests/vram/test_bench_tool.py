"""tools/bench_vram.py: what it makes of figures, with a program in llama-bench's place."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, load_tool
from writing.samples import base_model

TOOL = TOOLS / "bench_vram.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("bench_vram")


def test_a_fit_by_hand(tool: ModuleType) -> None:
    """4 layers; 10 s with all in VRAM, 3 s more per layer on the CPU, 1 of them the hand-over; at a quarter missed 10 + 4 x 1.5."""
    found = tool.fit(10.0, 22.0, 16.0, 4, 0.25)
    assert (found.base, found.handover, found.layer) == (10, 1, 2)
    assert found.stock(4) == 22 and found.stock(2) == 16 and found.ours(4, 0.25) == 16 and found.ours(4, 0.5) == 18


PROGRAM = """#!PYTHON
import json, os, sys
layers = int(sys.argv[sys.argv.index("-ncmoe") + 1]) if "-ncmoe" in sys.argv else 0
vram = os.environ.get("LLAMA_EXPERT_VRAM")
seconds = 0.010 + layers * 0.003
if vram:
    missed = (1 - float(vram[:-1]) / 100) ** 2
    seconds = 0.010 + LAYERS * (0.001 + missed * 0.002)
    print(f"llama: experts in fast memory took {100 * (1 - missed):.1f} % of the selections in decoding, 1 % in prompts", file=sys.stderr)
records = [{"n_prompt": p, "n_gen": 0, "samples_ts": [p / (0.1 + layers * 0.05)]} for p in (512, 2048)]
print(json.dumps(records + [{"n_prompt": 0, "n_gen": 128, "samples_ts": [1 / seconds]}]))
"""


def test_a_whole_run(tool: ModuleType, tmp_path: Path) -> None:
    model = base_model(tmp_path / "m.gguf")
    program = tmp_path / "llama-bench"
    program.write_text(PROGRAM.replace("PYTHON", sys.executable).replace("LAYERS", str(tool.read_model(model).layers)))
    program.chmod(0o755)
    words = [sys.executable, TOOL, model, "--stock", tmp_path, "--patched", tmp_path, "--parts", "25,50", "--threads", "4", "--rounds", "1"]
    done = subprocess.run([str(w) for w in [*words, "--out", tmp_path / "out"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "bench_vram.md").read_text()
    assert "hand-over 1000 us" in text and "| 25 % | 44 % |" in text and "(1.00)" in text
    data = json.loads((tmp_path / "out" / "machine-m-4.json").read_text())
    assert data["handover"] == pytest.approx(0.001, rel=0.01)
