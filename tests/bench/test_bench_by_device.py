"""What tools/bench_by_device.py makes of counts, samples and traces."""

from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import load_tool


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("bench_by_device")


def test_busiest_device(tool: ModuleType) -> None:
    """Four experts, the first with a copy; stock order has the first two on device 0."""
    layer = {"logical": [6, 2, 1, 1], "physical": [3, 2, 1, 1, 3], "device": [0, 0, 1, 1, 1]}
    assert tool.device_lis([layer, layer], 2) == (1.6, 1.0)


def test_ways_and_their_options(tool: ModuleType) -> None:
    one, layers, experts, home = tool.settings(tool.Place(("CUDA0", "CUDA1")), True)
    assert one.options() == ["--device", "CUDA0"] and layers.options("/") == ["--device", "CUDA0/CUDA1"]
    assert home.options("/") == ["--device", "CUDA0/CUDA1", "-ts", "1/0"]
    assert [s.env.get("LLAMA_EXPERT_DEVICES") for s in (one, layers, experts, home)] == [None, None, "all", "all"]
    assert all(s.env["GGML_CUDA_P2P"] == "1" for s in (one, layers, experts, home))
    assert tool.settings(tool.Place(("CUDA0", "CUDA1")), False)[0].env == {}


def test_table_of_ratios(tool: ModuleType) -> None:
    speeds = {"one": 50.0, "layers": 100.0, "experts": 125.0, "experts, home 0": 90.0}
    samples = {f"file; {way}": {test: [speed] for test in tool.TESTS} for way, speed in speeds.items()}
    rows = tool.table(["file"], samples).splitlines()
    assert rows[2].startswith("| file | one | 50 (0.500) |")
    assert rows[3].startswith("| file | layers | 100 | 100 |")
    assert rows[4].startswith("| file | experts | 125 (1.250) |")


def test_trace_says_who_computes_when(tool: ModuleType, tmp_path: Path) -> None:
    """Device 0 computes for 1 us, sends for half of one, then both compute for 1 us and device 1 goes on alone for another."""
    trace = tmp_path / "trace.txt"
    lines = ["K 0 1000 2000 void first<int>(int, int)", "C 0 1 2000 2500 8192 10", "K 1 2500 4500 void part<1>(int)"]
    trace.write_text("\n".join(["K 0 100 200 too_early(int)", *lines, "K 0 2500 3500 part"]) + "\n")
    told = tool.busy(trace, 3.5e-6).splitlines()
    assert told[0].endswith("0 28.6 %, 0+1 28.6 %, 1 28.6 %, none 14.3 %; 1 copies between devices, 0.5 us in the median")
    assert told[1:] == ["device 0: 2 us: void first 1, part 1", "device 1: 2 us: void part 2"]
    assert "too_early" not in trace.read_text()


def test_shapes_with_layers(tool: ModuleType) -> None:
    found = dict(tool.chosen("olmoe:6,qwen3-235b"))
    assert (found["olmoe"].n_layer, found["olmoe"].n_expert) == (6, 64)
    assert found["qwen3-235b"].n_expert == 128
    with pytest.raises(KeyError):
        dict(tool.chosen("none"))
