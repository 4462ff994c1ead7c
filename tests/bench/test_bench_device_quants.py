"""tools/bench_device_quants.py on the CPU, which torch computes on alike."""

from pathlib import Path

import pytest
import torch
from tool_modules import load_tool

from rq_gguf.types import LADDER

pytestmark = pytest.mark.runtime


def test_every_type_of_the_ladder_is_timed(runtime: Path) -> None:
    tool = load_tool("bench_device_quants")
    taken = tool.milliseconds(torch.device("cpu"), experts=1, columns=512, rows=4)
    assert list(taken) == list(LADDER)
    assert all(len(ms) == tool.CALLS and min(ms) > 0 for ms in taken.values())
