"""The CUDA files of the series compile for one architecture, and the kernels for few tokens keep to their registers. No GPU is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.runtime import tools
from rq_gguf.runtime.patch import series_dir

NVCC = shutil.which("nvcc")
STUB = Path(__file__).parent / "cuda_stub"
FOLDER = "ggml/src/ggml-cuda"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-gencode",
    "arch=compute_90,code=sm_90",
    "-use_fast_math",
    "-extended-lambda",
    "-DNDEBUG",
    "-DGGML_CUDA_NO_FA",
    "-DGGML_CUDA_USE_GRAPHS",
    "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128",
    "-Xptxas",
    "-v",
)
MOST_REGISTERS = 64
"""Eight blocks of 128 threads share a multiprocessor's registers."""
MOST_SPILLED = 32
"""Bytes. Spills in a kernel's prologue cost nothing that could be measured; those in the inner loop are many times as large."""

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA part of the series is not compiled here")


def cuda_files() -> list[str]:
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(series_dir().glob("*.patch")))
    return sorted(set(re.findall(rf"^\+\+\+ b/({FOLDER}/\S+\.cu)$", text, flags=re.MULTILINE)))


@pytest.fixture(scope="session")
def source() -> Path:
    try:
        return tools.source_path("ggml")
    except UserError as e:
        pytest.skip(f"no patched llama.cpp: {e}")


def compile_file(source: Path, name: str, target: Path) -> str:
    """What ptxas reports."""
    assert NVCC is not None
    path = source.parent / name
    if not path.is_file():
        pytest.skip(f"the installed llama.cpp has no {name}: it was built from another series")
    include = (STUB, source / "include", source / "src", source / "src/ggml-cuda")
    done = subprocess.run([NVCC, "-cubin", path, "-o", target, *FLAGS, *(f"-I{d}" for d in include)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert " warning" not in done.stderr, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("name", cuda_files())
def test_compiles(source: Path, name: str, tmp_path: Path) -> None:
    report = compile_file(source, name, tmp_path / "out.cubin")
    if not name.endswith("tiers-mmv.cu"):
        return
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", report, flags=re.DOTALL
    )
    assert len(kernels) >= 4
    for kernel, stored, loaded, registers in kernels:
        assert int(registers) <= MOST_REGISTERS, kernel
        assert max(int(stored), int(loaded)) <= MOST_SPILLED, f"{kernel} spills {stored} and {loaded} bytes"
