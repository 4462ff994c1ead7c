"""SGLang's own code reads what `export` writes, and `simulate` reads what SGLang's recorder writes. Its wheel is fetched with pip."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from placement.engines import OPTIONS, function_in, importable, settings
from placement.packages import SGLANG, extracted, fetched
from placement.samples import sample_trace

from rq_gguf.calibration.trace import write_trace
from rq_gguf.placement.files import read_loads, write_location
from rq_gguf.placement.location import Exported, export
from rq_gguf.placement.make import make_export

DEVICES = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = ("sglang/srt/eplb/", "sglang/srt/arg_groups/fields/", "sglang/srt/models/deepseek_v2.py", "sglang/srt/models/qwen3_moe.py")
    return extracted(fetched(SGLANG), folders, tmp_path_factory.mktemp("sglang"))


@pytest.fixture
def sglang(root: Path) -> Iterator[SimpleNamespace]:
    """(settings, expert_location, expert_location_dispatch), with DeepSeek-V2 as the model."""
    s, context = settings()
    model = SimpleNamespace(hf_config=SimpleNamespace(num_hidden_layers=4, n_routed_experts=16, n_group=1))
    loader: dict[str, Any] = {}
    elastic = {"elastic_expanded_world_enabled": lambda: False}
    modules = {
        "sglang.srt.runtime_context": context,
        "sglang.srt.model_loader": loader,
        "sglang.srt.elastic_ep.elastic_ep": elastic,
        "sglang.srt.elastic_ep": {},
    }
    with importable(root, "sglang", modules):
        from sglang.srt.eplb import expert_location, expert_location_dispatch  # type: ignore[import-not-found]

        deepseek = function_in(
            root / "sglang/srt/models/deepseek_v2.py",
            "DeepseekV2ForCausalLM",
            "get_model_config_for_expert_location",
            {"ModelConfigForExpertLocation": expert_location.ModelConfigForExpertLocation},
        )
        sys.modules["sglang.srt.model_loader"].get_model_architecture = lambda _: (deepseek, None)  # type: ignore[attr-defined]
        yield SimpleNamespace(settings=s, location=expert_location, dispatch=expert_location_dispatch, model=model)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Exported]:
    """Layer 2 of the sample's four has no experts."""
    write_trace(tmp_path / "t.npz", sample_trace(sequences=200))
    return tmp_path / "l.json", make_export(tmp_path / "t.npz", tmp_path / "l.json", "sglang", DEVICES, 4, 4)


def start(sglang: SimpleNamespace, path: Path, exported: Exported, rank: int = 0) -> Any:
    """What SGLang makes of the options that we print, on one rank."""
    words = exported.command.split()
    assert words[0::2] == ["--ep-size", "--ep-num-redundant-experts", "--init-expert-location"]
    sglang.settings.parallel.ep_size, sglang.settings.moe.ep_num_redundant_experts = int(words[1]), int(words[3])
    sglang.settings.moe.init_expert_location = str(path)
    return sglang.location.compute_initial_expert_location_metadata(sglang.model, rank)


@pytest.mark.parametrize("backend", [("none", "dynamic"), ("deepep", "static")])
def test_it_loads_on_every_rank(sglang: SimpleNamespace, exported: tuple[Path, Exported], backend: tuple[str, str]) -> None:
    sglang.settings.moe.moe_a2a_backend, sglang.settings.moe.ep_dispatch_algorithm = backend
    path, e = exported
    ours = np.array(e.content["physical_to_logical_map"])
    for rank in range(DEVICES):
        m = start(sglang, path, e, rank)
        assert (m.num_layers, m.num_physical_experts, m.num_logical_experts, m.num_local_physical_experts) == (4, 20, 16, 5)
        assert (m.physical_to_logical_map.numpy() == ours).all()
        for layer in range(4):
            for expert in range(16):
                held = m.logical_to_all_physical(layer, expert)
                assert held and all(ours[layer, p] == expert for p in held)


def test_rows_are_decoder_layers(sglang: SimpleNamespace, root: Path) -> None:
    """Layers without experts count: the map has a row for each decoder layer."""
    make = sglang.location.ModelConfigForExpertLocation
    for file, owner in (("deepseek_v2", "DeepseekV2ForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM")):
        path = root / f"sglang/srt/models/{file}.py"
        model = function_in(path, owner, "get_model_config_for_expert_location", {"ModelConfigForExpertLocation": make})
        config = SimpleNamespace(num_hidden_layers=61, n_routed_experts=256, num_experts=256, n_group=8, first_k_dense_replace=3)
        assert model.get_model_config_for_expert_location(config).num_layers == 61


def test_its_options_are_called_so(root: Path, exported: tuple[Path, Exported]) -> None:
    fields = "".join(p.read_text() for p in (root / "sglang/srt/arg_groups/fields").glob("*.py"))
    for option in OPTIONS["sglang"]:
        assert f"    {option[2:].replace('-', '_')}: A[" in fields, option
    assert set(exported[1].command.split()[0::2]) <= set(OPTIONS["sglang"])


def test_it_takes_no_other_key(sglang: SimpleNamespace, exported: tuple[Path, Exported]) -> None:
    path, e = exported
    path.write_text(json.dumps({**e.content, "model": "sample"}))
    with pytest.raises(TypeError, match="model"):
        start(sglang, path, e)


def test_it_wants_a_multiple_of_the_devices(sglang: SimpleNamespace, exported: tuple[Path, Exported]) -> None:
    path, e = exported
    sglang.settings.parallel.ep_size = 3
    sglang.settings.moe.init_expert_location, sglang.settings.moe.ep_num_redundant_experts = str(path), 4
    with pytest.raises(AssertionError):
        sglang.location.compute_initial_expert_location_metadata(sglang.model, 0)


def test_its_dispatch_loads_devices_as_predicted(sglang: SimpleNamespace, exported: tuple[Path, Exported]) -> None:
    """The recorded choices through SGLang's own dispatch: the busiest device over the mean, trivially placed and as exported."""
    path, e = exported
    trace, found = sample_trace(sequences=200), {}
    # Trivial: 20 physical experts, the first four twice.
    for name, target in (("trivial", "trivial"), ("exported", str(path))):
        sglang.settings.moe.init_expert_location = target
        sglang.settings.parallel.ep_size, sglang.settings.moe.ep_num_redundant_experts = DEVICES, e.n_redundant
        metadata = sglang.location.compute_initial_expert_location_metadata(sglang.model, 0)
        sglang.location.set_global_expert_location_metadata(metadata, allow_overwrite=True)
        ratios = []
        for layer, ids in zip(trace.layers, trace.ids, strict=True):
            info = sglang.dispatch.ExpertLocationDispatchInfo.init_new(layer)
            phys = sglang.dispatch.topk_ids_logical_to_physical(torch.from_numpy(ids.astype(np.int64)), info).numpy()
            assert (metadata.physical_to_logical_map.numpy()[layer][phys] == ids).all()
            sums = np.bincount(phys.reshape(-1) // 5, minlength=DEVICES)
            ratios.append(sums.max() / sums.mean())
        found[name] = ratios
    # It takes copies by the token's row, not by its rank among the expert's tokens: nearly the even split that is predicted.
    assert found["exported"] == pytest.approx(e.after, rel=0.03)
    assert np.mean(found["exported"]) < np.mean(found["trivial"]) - 0.1


def test_its_own_balancer_does_no_better(sglang: SimpleNamespace, tmp_path: Path) -> None:
    """SGLang's EPLB on the same loads, as it would place them from a file of counts."""
    trace = sample_trace(layers=(0, 1, 2, 3))
    counts = trace.selections()
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    e = export(read_loads(tmp_path / "counts.json"), "sglang", DEVICES, 4, None)
    write_location(tmp_path / "l.json", e)
    ours = start(sglang, tmp_path / "l.json", e)
    theirs = start(sglang, tmp_path / "counts.json", e)
    busiest = []
    for m in (ours, theirs):
        split = counts / m.logical_to_all_physical_map_num_valid.numpy()
        held = np.take_along_axis(split, m.physical_to_logical_map.numpy(), axis=1).reshape(4, DEVICES, -1).sum(axis=2)
        busiest.append(held.max(axis=1) / held.mean(axis=1))
    assert busiest[0] == pytest.approx(e.after)
    assert busiest[0].mean() <= busiest[1].mean() + 1e-9


def test_its_recorders_file_is_read(root: Path, tmp_path: Path) -> None:
    """SGLang's accumulator counts physical experts, makes logical counts of them, and dumps them to a file."""
    _, context = settings()
    unused = {
        "einops": {},
        "sglang.srt.runtime_context": context,
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=SimpleNamespace(get=lambda: str(tmp_path)))},
        "sglang.srt.model_executor": {},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": None, "ForwardMode": None},
        "sglang.srt.observability": {},
        "sglang.srt.observability.metrics_collector": dict.fromkeys(
            ("STAT_LOGGER_ROLE_EXPERT_DISPATCH", "ExpertDispatchCollector", "resolve_collector_class")
        ),
        "sglang.srt.utils": {"Withable": list, "get_device": None, "get_int_env_var": lambda _, default=0: default},
    }
    trace = sample_trace(layers=(1, 2))
    physical = torch.zeros(2, 4, 20, dtype=torch.int32)
    placed = torch.arange(20).repeat(4, 1) % 16
    for step in range(2):  # even tokens, then odd ones; copies of the first four experts serve none
        for layer, counts in zip(trace.layers, trace.selections(np.arange(step, trace.n_tokens, 2)), strict=True):
            physical[step, layer, :16] = torch.from_numpy(counts)
    had = sys.modules.get("einops")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with importable(root, "sglang", unused):
            from sglang.srt.eplb import expert_distribution  # type: ignore[import-not-found]

            metadata = SimpleNamespace(num_layers=4, num_physical_experts=20, num_logical_experts=16, physical_to_logical_map=placed)
            torch_get = torch.get_device_module
            torch.get_device_module = lambda *_: SimpleNamespace(empty_cache=lambda: None)  # type: ignore[assignment]
            try:
                recorder = expert_distribution._StatAccumulator(metadata, 0)
                for step in range(2):
                    recorder.append(step, "primary", {"global_physical_count": physical[step]}, {})
                recorder.dump("file")
            finally:
                torch.get_device_module = torch_get
    finally:
        torch.distributed.destroy_process_group()
        sys.modules.pop("einops", None)
        if had is not None:
            sys.modules["einops"] = had
    (path,) = tmp_path.glob("*.pt")
    loads = read_loads(path)
    assert loads.layers == (1, 2) and (loads.load == trace.selections()).all()
