"""What vLLM takes of a placement, by its own code: a number of copies, and its own policy. Its wheel is fetched with pip (336 MB)."""

import ast
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from placement.engines import OPTIONS, importable
from placement.packages import VLLM, extracted, fetched
from placement.samples import sample_trace

from rq_gguf.placement.loads import loads_of_trace
from rq_gguf.placement.location import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = (
        "vllm/distributed/eplb/policy/",
        "vllm/distributed/eplb/eplb_state.py",
        "vllm/config/parallel.py",
        "vllm/engine/arg_utils.py",
    )
    return extracted(fetched(VLLM, large=True), folders, tmp_path_factory.mktemp("vllm"))


def annotations(path: Path, name: str) -> list[str]:
    """Fields of a class."""
    owner = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    return [n.target.id for n in owner.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def test_it_takes_a_number_and_no_placement(root: Path) -> None:
    config = root / "vllm/config/parallel.py"
    fields = annotations(config, "EPLBConfig")
    made = export(loads_of_trace(sample_trace()), "vllm", 4, 3, None)
    assert made.content == {"num_redundant_experts": 4} and set(made.content) <= set(fields)
    assert made.command == "--enable-expert-parallel --enable-eplb --eplb-config '{\"num_redundant_experts\": 4}'"
    assert {o[2:].replace("-", "_") for o in OPTIONS["vllm"]} <= set(annotations(config, "ParallelConfig"))
    taken = (root / "vllm/engine/arg_utils.py").read_text()
    assert all(f'"{option}"' in taken for option in OPTIONS["vllm"])
    # Should a version take a file, this says so.
    assert not [f for f in fields if "path" in f or "file" in f or "map" in f or "location" in f]
    assert 'ExpertPlacementStrategy = Literal["linear", "round_robin"]' in config.read_text()
    start = (root / "vllm/distributed/eplb/eplb_state.py").read_text()
    assert "global_physical_to_logical_map = list(range(num_routed_experts))" in start


def test_its_own_policy_packs_as_we_do(root: Path) -> None:
    """What vLLM will do with these loads once it has seen them, against what we pack."""
    trace, n_devices = sample_trace(n_expert=32, n_used=4, layers=tuple(range(6))), 4
    loads = loads_of_trace(trace)
    made = export(loads, "vllm", n_devices, 8, None)
    n_phys = 32 + made.n_redundant
    with importable(root, "vllm", {"vllm.config": {}, "vllm.config.parallel": {"EPLBPolicyOption": Literal["default"]}}):
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy  # type: ignore[import-not-found]

        theirs = DefaultEplbPolicy.rebalance_experts(torch.from_numpy(loads.load), n_phys, 1, 1, n_devices).numpy()
    busiest = []
    for row, load in zip(theirs, loads.load, strict=True):
        sums = (load / np.bincount(row, minlength=32))[row].reshape(n_devices, -1).sum(axis=1)
        busiest.append(sums.max() / sums.mean())
    assert np.array(made.after) == pytest.approx(busiest, rel=0.01)
