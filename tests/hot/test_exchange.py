"""Several contexts and models at a time, and a device that is short of memory: cpp/exchange.cpp, which compares logits bit for bit."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_servers import free_port, serving

from rq_gguf.runtime.build import find_compiler
from rq_gguf.runtime.tools import source_path

pytestmark = pytest.mark.runtime

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def program(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """exchange.cpp, compiled."""
    compiler = find_compiler()
    if not compiler:
        pytest.skip("needs a C++ compiler")
    source, out = source_path().parent, tmp_path_factory.mktemp("exchange") / "exchange"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *(f"-I{source / d}" for d in ("include", "ggml/include", "ggml/src"))]
    libraries = [
        f"-L{runtime}",
        f"-Wl,-rpath,{runtime}",
        *(f"-l{n}" for n in ("llama", "ggml-rpc", "ggml", "ggml-cpu", "ggml-base", "pthread")),
    ]
    subprocess.run([*compiler, *flags, HERE / "cpp" / "exchange.cpp", "-o", out, *libraries], check=True)
    return out


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
