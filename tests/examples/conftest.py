"""A demo file with experts in tiers and a chat template, and a Python that has llama-cpp-python."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, need

from rq_gguf import build as steps
from rq_gguf.choices import check_choices
from rq_gguf.runtime.fetch import PACKAGE
from rq_gguf.runtime.patch import read_series, series_dir
from rq_gguf.runtime.tools import run_tool
from rq_gguf.runtime.wheel import version
from rq_gguf.writing.convert import convert_base

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def base_file(demo_model: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in bf16, with a chat template."""
    folder = tmp_path_factory.mktemp("examples")
    model = shutil.copytree(demo_model, folder / "demo")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    convert_base(model, folder / "base.gguf", progress=False)
    return folder / "base.gguf"


@pytest.fixture(scope="session")
def tiered_file(base_file: Path) -> Path:
    """The same with two types and two copies a layer."""
    imatrix, out = base_file.with_name("imatrix.gguf"), base_file.with_name("rq.gguf")
    text = ROOT / "rq_gguf" / "data" / "calibration" / "books.txt"
    run_tool(["llama-imatrix", "-m", base_file, "-f", text, "--chunks", "4", "-o", imatrix])
    choices = check_choices("6.5bpw", "q4_k,q8_0", "2", "budget", None, None, None)
    steps.build(str(base_file), out, choices, imatrix=imatrix, say=lambda line: None)
    return out


@pytest.fixture(scope="session")
def example() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a script of examples/ with arguments, with variables on top of the environment."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    wanted = version("cpu", read_series(series_dir()))
    need(found == wanted, f'llama-cpp-python {wanted} is needed ({found} is there): pip install "$(rq-gguf runtime wheel)"')

    def run(script: str, *args: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")} | variables
        command = [sys.executable, ROOT / "examples" / script, *map(str, args)]
        return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    return run
