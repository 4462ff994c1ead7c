"""The choice of experts, compiled on its own from the series: it needs nothing of llama.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rq_gguf.runtime.build import find_compiler
from rq_gguf.runtime.patch import series_dir

HERE = Path(__file__).resolve().parent


def compiled(folder: Path, test: str, sources: tuple[str, ...]) -> Path:
    """A program of cpp/ with sources of the series, taken out of it. Skips without git or a compiler."""
    git, compiler = shutil.which("git"), find_compiler()
    if not git or not compiler:
        pytest.skip("git takes the source out of the series, a compiler builds it")
    if not (folder / "src").is_dir():
        subprocess.run([git, "init", "-q", folder], check=True)
        for patch in sorted(series_dir().glob("*.patch")):
            if "b/src/llama-hot-" in patch.read_text(encoding="utf-8"):
                subprocess.run([git, "apply", "--include=src/llama-hot-*", patch], cwd=folder, check=True)
    files = [HERE / "cpp" / f"{test}.cpp", *(folder / "src" / f"{name}.cpp" for name in sources)]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-I", folder / "src"]
    subprocess.run([*compiler, *flags, *files, "-o", folder / test], check=True)
    return folder / test


def test_policy(tmp_path: Path) -> None:
    done = subprocess.run([compiled(tmp_path, "test_policy", ("llama-hot-policy",))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
