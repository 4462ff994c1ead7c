"""Machines in files."""

import json
from pathlib import Path
from typing import Any

import pytest

from rq_gguf.errors import UserError
from rq_gguf.types import TYPES
from rq_gguf.vram.files import find_machine
from rq_gguf.vram.machine import CORE_RATES, MACHINES, type_costs

LEAST: dict[str, Any] = {"ram_bandwidth": 4e10, "vram_bandwidth": 3e11, "handover": 5e-5, "pcie_bandwidth": 1e10, "compute": 1e13}


def written(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_examples_and_files(tmp_path: Path) -> None:
    assert find_machine("8gb") is MACHINES["8gb"]
    machine = find_machine(written(tmp_path, LEAST | {"vram": "8GiB", "ram": 10**10, "type_cost": {"q4_k": 1.5}}))
    assert (machine.name, machine.vram, machine.ram, machine.gpu_layer) == ("mine", 8 << 30, 10**10, 45e-6)
    assert find_machine(written(tmp_path, LEAST | {"whole_handover": 2e-4})).whole_handover == 2e-4 and machine.whole_handover == 0
    assert machine.overlap and not find_machine(written(tmp_path, LEAST | {"overlap": False})).overlap
    assert machine.ram_seconds("q4_k", 4e10) == 1.5 and machine.ram_seconds("q8_0", 4e10) == 1.0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("{", "is no JSON"),
        ([], "must hold an object"),
        (LEAST | {"speed": 1}, "speed is no field"),
        ({k: v for k, v in LEAST.items() if k != "handover"}, "handover is missing"),
        (LEAST | {"compute": 0}, "compute must be a number above 0"),
        (LEAST | {"compute": "fast"}, "compute must be a number above 0"),
        (LEAST | {"handover": -1}, "handover must be a number of at least 0"),
        (LEAST | {"ram_bandwidth": True}, "ram_bandwidth must be"),
        (LEAST | {"ram_bandwidth": 1e300}, "ram_bandwidth must be"),
        (json.dumps(LEAST).replace("40000000000.0", "NaN"), "ram_bandwidth must be"),
        (LEAST | {"overlap": 1}, "overlap must be true or false, not 1"),
        (LEAST | {"vram": "much"}, "vram must be bytes, or a size"),
        (LEAST | {"vram": []}, "vram must be"),
        (LEAST | {"name": ""}, "name must be a text"),
        (LEAST | {"type_cost": [1]}, "type_cost must be an object"),
        (LEAST | {"type_cost": {"q9": 1}}, "unknown type 'q9'"),
        (LEAST | {"type_cost": {"q4_k": 0}}, "type_cost.q4_k must be a number above 0"),
    ],
)
def test_refused(tmp_path: Path, data: Any, why: str) -> None:
    with pytest.raises(UserError, match="mine.json") as e:
        find_machine(written(tmp_path, data))
    assert why in str(e.value)


def test_neither_a_file_nor_an_example(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor one of 6gb"):
        find_machine("fast")
    with pytest.raises(UserError, match="cannot be read"):
        find_machine(str(tmp_path))


def test_a_type_costs_more_where_arithmetic_is_slower_than_memory() -> None:
    """Eight cores get through 22.4 GB/s of iq3_s and 84.8 of q4_k; the RAM gives 56."""
    costs = type_costs(56e9, 8)
    assert costs["iq3_s"] == 2.5 and "q4_k" not in costs and min(costs.values()) > 1
    assert set(CORE_RATES) == set(TYPES) - {"f16", "bf16"}
