"""The CUDA files that the series adds or changes compile for one architecture, and the kernels for few tokens keep to their registers.

No GPU is needed. Half a minute on a quiet core.
"""

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
LIMIT = 300
"""Seconds for a file."""


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
    command = [NVCC, "-cubin", path, "-o", target, *FLAGS, *(f"-I{d}" for d in include)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert " warning" not in done.stderr, done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA part of the series is not compiled here")
@pytest.mark.parametrize("name", cuda_files())
def test_compiles(source: Path, name: str, tmp_path: Path) -> None:
    report = compile_file(source, name, tmp_path / "out.cubin")
    if not name.endswith("tiers-mmv.cu"):
        return
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", report, flags=re.DOTALL
    )
    assert len(kernels) == 7, "one token and more, with and without fusion, few types and all, less one that both numbers share"
    for kernel, stored, loaded, registers in kernels:
        assert int(registers) <= MOST_REGISTERS, kernel
        assert int(stored) == int(loaded) == 0, f"{kernel} spills {stored} and {loaded} bytes"


def test_the_series_has_cuda_files() -> None:
    """Else nothing above is compiled."""
    assert {Path(f).name for f in cuda_files()} == {"ggml-cuda.cu", "tiers-mmv.cu", "tiers.cu", "topk-moe.cu"}
