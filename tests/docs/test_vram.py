"""docs/vram.md: its tables are what the tool computes, and the model of speed is near what was measured."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = TOOLS / "expect_vram.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("expect_vram")


def test_predictions_are_within_15_per_cent_of_what_was_measured(tool: ModuleType) -> None:
    rows = tool.beside_measured()
    assert len(rows) == 14
    for kind, what, predicted, measured in rows:
        assert predicted == pytest.approx(measured, rel=0.15), (kind, what)


def test_shares_catch_what_they_should(tool: ModuleType) -> None:
    row = tool.shares(32, 4, even=False)
    assert [row[:n].sum() for n in (4, 8, 16, 24, 32)] == pytest.approx([0.30, 0.49, 0.74, 0.89, 1.0])
    few = tool.shares(8, 4, even=False)
    assert few.max() == pytest.approx(1 / 4, rel=0.01) and few.sum() == pytest.approx(1.0)  # a token picks no expert twice


def test_where_nothing_is_to_be_gained(tool: ModuleType) -> None:
    """A card that holds all, one that does not even hold the rest, and experts that are all picked alike."""
    olmoe, mixtral = tool.chosen()[0], tool.chosen()[-1]
    assert tool.decode_cell(tool.speed(olmoe, tool.MACHINES["24gb"], 8192, False), olmoe).endswith("all fits")
    assert tool.decode_cell(tool.speed(mixtral, tool.MACHINES["6gb"], 131072, False), mixtral) == "no"
    even = tool.speed(mixtral, tool.MACHINES["12gb"], 8192, True)
    assert even is not None and even.decode < 1.1 * even.stock_decode


def test_the_page_has_the_tables() -> None:
    printed = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "vram.md").read_text(encoding="utf-8")
    for table in printed.strip().split("\n\n"):
        assert table in page
