"""docs/choosing.md: its tables are what the tool computes, and the tool's shapes are the published models'."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = TOOLS / "choose_budget.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("choose_budget")


def test_parameters_are_the_published_ones(tool: ModuleType) -> None:
    """The number of values in the checkpoints, as their publishers' safetensors files have them (gpt-oss: with its MXFP4 unpacked)."""
    assert {m.hub: m.parameters for m in tool.MODELS} == {
        "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
        "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
        "openai/gpt-oss-20b": 20_914_757_184,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    }


def test_a_budget_leaves_room_for_the_cache(tool: ModuleType) -> None:
    """By hand: OLMoE's cache is 16 layers x 2 x 16 heads x 128 values x 2 bytes x 8192 tokens, 1 GiB; of 6 GiB, 4 are left."""
    olmoe = tool.MODELS[0]
    assert olmoe.cache_bytes(8192) == 1 << 30
    assert tool.budget(olmoe, 6, 8192).startswith("`4.0GiB`: ")
    assert tool.budget(olmoe, 4, 8192) == "no (2.4 least)"
    assert tool.budget(olmoe, 24, 8192) == "`q8_0` (6.9)"


def test_windowed_layers_hold_their_window(tool: ModuleType) -> None:
    """gpt-oss: of 24 layers 12 hold 8192 tokens and 12 hold 128 + 512, of 2 x 8 x 64 values of 2 bytes."""
    assert tool.MODELS[2].cache_bytes(8192) == 12 * (8192 + 640) * 1024 * 2


def test_the_page_has_the_tables() -> None:
    printed = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=True).stdout
    assert printed in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
