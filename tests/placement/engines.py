"""Engines' own modules, loaded alone: what they import of the rest of their engine, which needs GPUs, is given here."""

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

OPTIONS = {
    "sglang": (
        "--ep-size",
        "--ep-num-redundant-experts",
        "--init-expert-location",
        "--expert-distribution-recorder-mode",
    ),
    "vllm": ("--enable-expert-parallel", "--enable-eplb", "--eplb-config", "--expert-placement-strategy"),
}
"""Options of engines that our pages and commands name; the engines' tests look them up."""


@contextmanager
def importable(root: Path, package: str, modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """`root` is searched for a package first, and `modules` stand for further ones of it; all are forgotten afterwards."""
    sys.path.insert(0, str(root))
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(root))
        for name in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
            del sys.modules[name]


def function_in(path: Path, class_name: str, name: str, namespace: dict[str, Any]) -> Any:
    """A class method of an engine's source, compiled alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    method = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name)
    shell = ast.ClassDef(name="Model", bases=[], keywords=[], body=[method], decorator_list=[], type_params=[])
    exec(compile(ast.fix_missing_locations(ast.Module([shell], [])), str(path), "exec"), namespace)
    return namespace["Model"]


def settings(**changes: Any) -> tuple[SimpleNamespace, dict[str, Any]]:
    """(SGLang's settings, sglang.srt.runtime_context with them)."""
    s = SimpleNamespace(
        moe=SimpleNamespace(
            init_expert_location="trivial",
            ep_num_redundant_experts=0,
            ep_dispatch_algorithm="dynamic",
            moe_a2a_backend="none",
            ep_join_mode=None,
            eplb_algorithm="auto",
            expert_distribution_recorder_buffer_size=-1,
        ),
        parallel=SimpleNamespace(ep_size=1, elastic_ep_initial_size=None, nnodes=1),
        resources=SimpleNamespace(expert_location_metadata=None),
        device=SimpleNamespace(device="cpu"),
    )
    return s, {
        "get_exec": lambda: s,
        "get_parallel": lambda: s.parallel,
        "get_resources": lambda: s.resources,
        "get_device": lambda: s.device,
        "get_platform": lambda: None,
        "get_schedule": lambda: None,
        "reports_expert_balancedness": lambda: False,
        "logs_expert_balancedness_to_server_log": lambda: False,
    }
