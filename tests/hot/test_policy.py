"""The choice of experts, compiled on its own from the series: it needs nothing of llama.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rq_gguf.runtime.build import find_compiler
from rq_gguf.runtime.patch import series_dir

HERE = Path(__file__).resolve().parent


def test_policy(tmp_path: Path) -> None:
    git, compiler = shutil.which("git"), find_compiler()
    if not git or not compiler:
        pytest.skip("git takes the source out of the series, a compiler builds it")
    patch = next(p for p in sorted(series_dir().glob("*.patch")) if "b/src/llama-hot-policy.cpp" in p.read_text(encoding="utf-8"))
    subprocess.run([git, "init", "-q", tmp_path], check=True)
    subprocess.run([git, "apply", "--include=src/llama-hot-policy.*", patch], cwd=tmp_path, check=True)
    sources = [HERE / "cpp" / "test_policy.cpp", tmp_path / "src" / "llama-hot-policy.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-I", tmp_path / "src"]
    subprocess.run([*compiler, *flags, *sources, "-o", tmp_path / "test"], check=True)
    done = subprocess.run([tmp_path / "test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
