"""`rq-gguf doctor`: what the work needs, what is there, and the one line that gets the rest. Looking changes nothing."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rq_gguf import __version__, extras
from rq_gguf.errors import UserError
from rq_gguf.runtime import build, fetch, patch, tools, wheel
from rq_gguf.runtime.cache import cache_dir, current_file, read_json
from rq_gguf.runtime.installation import DISK_NEEDED
from rq_gguf.runtime.process import find_program

INSTALL = "rq-gguf runtime install"
WHEEL = 'pip install "$(rq-gguf runtime wheel)"'
OK, OPTIONAL, MISSING = "ok", "optional", "MISSING"
CMAKE_AT_LEAST = (3, 14)
MEMORY_PER_JOB = 1_500_000_000
"""Bytes that compiling llama.cpp's largest files takes, per job."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    state: str
    """OK; OPTIONAL: not there, and something works less well or not at all without it; MISSING: needed."""
    found: str
    fix: str = ""
    """The command, or the sentence, that mends it."""


def diagnose(backend: str | None = None) -> list[Check]:
    """Everything that is looked at. Build tools are needed only while the runtime is not built.

    backend: what llama.cpp is to compute on; None for that of the installed one, or cpu. Raises UserError for one that is unknown.
    """
    if backend is not None and backend not in build.BACKENDS:
        raise UserError(f"--backend {backend}: choose one of {', '.join(build.BACKENDS)}")
    stamp = read_json(Path(read_json(current_file()).get("patched", "")))
    backend = backend or stamp.get("backend") or "cpu"
    runtime = [*_source(), _patched(backend, stamp), _stock()]
    building = any(check.state == MISSING for check in runtime)
    tools_to_build = [_pip(), _compiler(), _cmake(), _program("git", package_command("git")), *_cuda(backend)]
    if not building:
        tools_to_build = [_unneeded(check) for check in tools_to_build]
    return [
        Check("rq-gguf", OK, f"{__version__}, python {platform.python_version()} ({sys.executable})"),
        *tools_to_build,
        _program("ninja", f"{extras.command('runtime')}, or {package_command('ninja-build')}", needed=False),
        _program("ccache", package_command("ccache"), needed=False),
        _cache(),
        _disk(building),
        _memory(),
        *runtime,
        _extra("calibrate", "torch and the like", "without it: inspect, plan, report, eval, and builds from a GGUF with --imatrix"),
        _extra("report", "matplotlib", "without it the report's figures are SVG only"),
        _python_bindings(),
    ]


def is_well(checks: Sequence[Check]) -> bool:
    return all(check.state != MISSING for check in checks)


def describe(checks: Sequence[Check]) -> list[str]:
    """A line each, and one that sums up."""
    wide = max(len(check.what) for check in checks)
    lines = [f"{c.what:{wide}}  {c.state:8}  {c.found}{f'  -> {c.fix}' if c.fix else ''}" for c in checks]
    return [*lines, "everything that is needed is there" if is_well(checks) else "something is missing: see the lines marked MISSING"]


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    return {"ok": is_well(checks), "checks": [asdict(check) for check in checks]}


def package_command(name: str) -> str:
    """How this system installs one of its packages."""
    for manager, command in (("apt-get", "apt-get install"), ("dnf", "dnf install"), ("pacman", "pacman -S"), ("brew", "brew install")):
        if shutil.which(manager):
            return f"{command} {name}"
    return f"install {name} with the system's package manager"


def _unneeded(check: Check) -> Check:
    return Check(check.what, OPTIONAL if check.state == MISSING else check.state, check.found, check.fix)


def _program(name: str, fix: str, needed: bool = True) -> Check:
    path = find_program(name)
    if path:
        return Check(name, OK, build.first_line([path, "--version"]) or path)
    return Check(name, MISSING if needed else OPTIONAL, "not found", fix)


def _pip() -> Check:
    pip = build.first_line([sys.executable, "-m", "pip", "--version"]).partition(" from ")[0]
    return Check("pip", OK, pip) if pip else Check("pip", MISSING, "not found", f"{sys.executable} -m ensurepip")


def _compiler() -> Check:
    what, command = "C++ compiler", build.find_compiler()
    if command:
        version = build.first_line([*command, "--version"])
        if version:
            return Check(what, OK, version)
        return Check(what, MISSING, f"{' '.join(command)} does not run", "unset CXX or set it to a working compiler")
    if sys.platform == "win32":
        return Check(what, OPTIONAL, "left to CMake", "install Visual Studio's C++ build tools if CMake finds none")
    return Check(what, MISSING, "not found", "xcode-select --install" if sys.platform == "darwin" else package_command("g++"))


def _cmake() -> Check:
    fix = f"{extras.command('runtime')}, or {package_command('cmake')}"
    found = _program("cmake", fix)
    version = re.search(r"\b(\d+)\.(\d+)", found.found)
    if found.state == OK and version and (int(version[1]), int(version[2])) < CMAKE_AT_LEAST:
        return Check("cmake", MISSING, f"{found.found} is too old for llama.cpp", fix)
    return found


def _cuda(backend: str) -> list[Check]:
    """GPU and toolkit, where they are wanted or a GPU is there."""
    smi, nvcc = shutil.which("nvidia-smi"), os.environ.get("CUDACXX") or shutil.which("nvcc")
    gpu = build.first_line([smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]) if smi else ""
    wanted, what = backend == "cuda", "CUDA toolkit"
    if not wanted and not gpu:
        return []
    first = Check("NVIDIA GPU", OK, gpu) if gpu else Check("NVIDIA GPU", OPTIONAL, "none seen", "install NVIDIA's driver")
    if nvcc:
        unused = "" if wanted else f"; the runtime computes on {backend}"
        return [first, Check(what, OK if wanted else OPTIONAL, nvcc + unused, "" if wanted else f"{INSTALL} --backend cuda")]
    state = MISSING if wanted else OPTIONAL
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        return [first, Check(what, state, "/usr/local/cuda, but nvcc is not on PATH", 'export PATH=/usr/local/cuda/bin:"$PATH"')]
    return [first, Check(what, state, "nvcc not found", "install NVIDIA's CUDA toolkit, or use --backend cpu")]


def _existing(directory: Path) -> Path:
    return next(p for p in (directory, *directory.parents) if p.exists())


def _cache() -> Check:
    directory = cache_dir()
    try:
        with tempfile.TemporaryFile(dir=_existing(directory)):
            return Check("cache directory", OK, str(directory))
    except OSError as e:
        found = f"{directory} cannot be written: {e.strerror}"
        return Check("cache directory", MISSING, found, "set RQ_GGUF_CACHE to a directory that can be written")


def _disk(building: bool) -> Check:
    free = shutil.disk_usage(_existing(cache_dir())).free
    if free >= DISK_NEEDED:
        return Check("disk space", OK, f"{free / 1e9:.1f} GB free")
    state = MISSING if building else OPTIONAL
    return Check("disk space", state, f"{free / 1e9:.1f} GB free", "free 1 GB or set RQ_GGUF_CACHE to another disk")


def _memory() -> Check:
    """What can be had now (MemAvailable where the system says it), or all of it."""
    info = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE) if info.is_file() else None
    if available:
        size, word = 1024 * int(available[1]), "available"
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        size, word = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "in all"
    else:
        return Check("memory", OK, "not known")
    jobs = build.job_count()
    found = f"{size / 1e9:.1f} GB {word}"
    if size >= jobs * MEMORY_PER_JOB:
        return Check("memory", OK, found)
    fewer = max(1, size // MEMORY_PER_JOB)
    return Check("memory", OPTIONAL, f"{found}, little for {jobs} compilations at a time", f"export CMAKE_BUILD_PARALLEL_LEVEL={fewer}")


def _source() -> list[Check]:
    kept = cache_dir() / "downloads" / fetch.ARCHIVE
    given = os.environ.get("RQ_GGUF_SDIST")
    if given and not Path(given).expanduser().is_file():
        fix = f"unset RQ_GGUF_SDIST, or put {fetch.ARCHIVE} there"
        checks = [Check("source package", MISSING, f"RQ_GGUF_SDIST: {given} is not a file", fix)]
    elif given:
        checks = [Check("source package", OK, f"{given} (RQ_GGUF_SDIST)")]
    elif kept.is_file():
        checks = [Check("source package", OK, str(kept))]
    else:
        checks = [Check("source package", OPTIONAL, "not fetched yet", INSTALL)]
    try:
        series = patch.read_series(patch.series_dir())
        return [*checks, Check("patch series", OK, f"{len(series.patches)} patches, {series.sha256[:12]}")]
    except UserError as e:
        return [*checks, Check("patch series", MISSING, str(e), "pip install --force-reinstall --no-deps rq-gguf")]


def _patched(backend: str, stamp: dict[str, Any]) -> Check:
    what, fix = "llama.cpp, patched", INSTALL if backend == "cpu" else f"{INSTALL} --backend {backend}"
    override = os.environ.get(tools.OVERRIDES["patched"])
    try:
        directory = tools.bin_dir()
    except UserError as e:
        return Check(what, MISSING, str(e).partition(";")[0], f"unset {tools.OVERRIDES['patched']}" if override else fix)
    if not override and stamp["backend"] != backend:
        return Check(what, MISSING, f"{directory} computes on {stamp['backend']}", fix)
    try:
        tools.run_tool(["llama-completion", "--version"])
    except UserError as e:
        return Check(what, MISSING, f"{directory}: {str(e).partition(';')[0]}", fix)
    return Check(what, OK, f"{directory} ({'RQ_GGUF_RUNTIME' if override else backend})")


def _stock() -> Check:
    try:
        return Check("llama.cpp, stock", OK, str(tools.bin_dir(unpatched=True)))
    except UserError:
        return Check("llama.cpp, stock", OPTIONAL, "not installed; only comparisons need it", f"{INSTALL} --unpatched")


def _extra(name: str, words: str, without: str) -> Check:
    lacking = extras.missing(name)
    if lacking:
        return Check(words, OPTIONAL, f"not installed: {', '.join(lacking)}; {without}", extras.command(name))
    versions = [f"{module} {importlib.metadata.version(module)}" for module in extras.EXTRAS[name][:2]]
    return Check(words, OK, ", ".join(versions))


def _python_bindings() -> Check:
    what = "llama-cpp-python"
    try:
        version = importlib.metadata.version(fetch.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return Check(what, OPTIONAL, "not installed; only Python scripts need it", WHEEL)
    if "+rq." not in version:
        return Check(what, OPTIONAL, f"{version} is a stock one and refuses the files", WHEEL)
    try:
        current = wheel.version("", patch.read_series(patch.series_dir())).rpartition(".")[2]
    except UserError:
        return Check(what, OK, version)
    if not version.endswith(f".{current}"):
        return Check(what, OPTIONAL, f"{version} was built with another patch series", WHEEL)
    return Check(what, OK, version)
