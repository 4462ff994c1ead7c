"""Several contexts and models at a time, and a device that is short of memory: cpp/exchange.cpp, which compares logits bit for bit."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hot.conftest import linked
from local_servers import free_port, serving

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def program(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked("exchange", runtime, tmp_path_factory.mktemp("exchange"))


@pytest.fixture
def device(program: Path, tmp_path: Path) -> Iterator[list[str]]:
    """A device, and the file that says how much memory it has."""
    port, memory = free_port(), tmp_path / "memory"
    with serving([program, "serve", str(port), memory], port):
        yield [str(port), str(memory)]


@pytest.mark.parametrize("case", ["contexts", "models", "memory"])
def test_exchange(case: str, program: Path, device: list[str], stock_demo: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LLAMA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([program, stock_demo, *device, case], capture_output=True, text=True, errors="replace", timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
