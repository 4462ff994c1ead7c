"""Wheels of the engines that placements are exported to, at pinned versions: their own code reads what we write."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import need

from rq_gguf.runtime.cache import cache_dir

_FETCH = "RQ_GGUF_FETCH"


@dataclass(frozen=True)
class Wheel:
    """A package on the index that pip is configured for."""

    name: str
    version: str
    platform: str
    python: str
    """As in the file's name: cp311-cp311."""
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}-{self.python}-{self.platform}.whl"


SGLANG = Wheel(
    "sglang", "0.5.23", "manylinux_2_34_x86_64", "cp311-cp311", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937", 39
)
VLLM = Wheel(
    "vllm", "0.33.0", "manylinux_2_28_x86_64", "cp38-abi3", "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa", 336
)


def fetched(wheel: Wheel, *, large: bool = False) -> Path:
    """The wheel, from the cache or by pip. Where pip cannot get it, the test is skipped; in CI, where everything must be there, it fails.

    large: fetch it only where RQ_GGUF_FETCH=1 asks for it.
    """
    kept = cache_dir() / "downloads" / wheel.file
    if kept.is_file() and _sha256(kept) == wheel.sha256:
        return kept
    if large and os.environ.get(_FETCH) != "1":
        pytest.skip(f"{wheel.name} {wheel.version} has {wheel.megabytes} MB; {_FETCH}=1 fetches it")
    kept.parent.mkdir(parents=True, exist_ok=True)
    args = ["--no-deps", "--only-binary", ":all:", "--platform", wheel.platform, "--python-version", "3.11"]
    args += ["--implementation", "cp", "--abi", wheel.python.rpartition("-")[2], "-d", str(kept.parent)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", *args, f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    need(done.returncode == 0, f"pip could not fetch {wheel.name} {wheel.version}: {done.stderr.strip()[-300:]}")
    assert _sha256(kept) == wheel.sha256, f"{kept} is another file than the pinned one"
    return kept


def extracted(wheel: Path, folders: tuple[str, ...], target: Path) -> Path:
    """Extract modules below some folders of a wheel, or single files. Packages above them get no __init__, so nothing else is imported."""
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if n.startswith(folders) and n.endswith(".py")]
        assert names, f"{wheel} holds nothing of {', '.join(folders)}"
        z.extractall(target, names)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
