"""Configure and build a source tree with CMake, resuming what an earlier run left and remembering what was built."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq_gguf.errors import UserError
from rq_gguf.progress import Bar
from rq_gguf.runtime.cache import Tree, read_json, say, write_json
from rq_gguf.runtime.process import find_program, git_environment, run_logged
from rq_gguf.threads import available_threads

BASE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # the build may be moved
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # a library has one name, so wheels, which hold no links, need one copy of it
    "-DLLAMA_BUILD_SERVER=ON",  # llama-cli is a client of it
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_CCACHE=OFF",  # set here, with its environment
    "-DGGML_RPC=ON",  # --rpc: devices of other machines
)
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("-DGGML_METAL=OFF",),
    "cuda": ("-DGGML_CUDA=ON", "-DGGML_METAL=OFF"),
    "vulkan": ("-DGGML_VULKAN=ON", "-DGGML_METAL=OFF"),
    "metal": ("-DGGML_METAL=ON",),
}
"""CMake flags by backend."""
BACKENDS_WITH_KERNELS = ("cpu", "cuda", "metal")
"""Backends for which the patch series has kernels of its own."""

TARGETS = (
    "llama-cli", "llama-completion", "llama-server", "llama-perplexity", "llama-bench", "llama-batched-bench", "llama-quantize",
    "llama-imatrix", "llama-gguf-split", "ggml-rpc-server", "test-backend-ops",
)  # fmt: skip
OPTIONAL_TARGETS = ("test-moe-tiers",)
"""Asked for only where the tree has them: the patch series adds them."""
STOCK_TARGETS = (
    "llama-completion", "llama-perplexity", "llama-bench", "llama-batched-bench", "llama-quantize", "llama-imatrix", "llama-gguf-split",
    "ggml-rpc-server",
)  # fmt: skip
"""What comparisons with unpatched llama.cpp need: without the server's and the multimodal code, a third less to compile."""

MINUTES_PER_CORE = {"patched": 17, "stock": 11}
"""Rough time of a first CPU build, on one core."""


@dataclass(frozen=True)
class Build:
    """What a build is asked to be; compared with the stamp of what is there."""

    backend: str
    kind: str
    """"patched" or "stock"."""
    source: str
    series: str | None
    flags: tuple[str, ...]
    targets: tuple[str, ...]
    compiler: str
    cpu: str

    def stamp(self, complete: bool) -> dict[str, Any]:
        return {**self.__dict__, "flags": list(self.flags), "targets": list(self.targets), "complete": complete}


def plan_build(backend: str, kind: str, source: str, series: str | None, commit: str, source_dir: Path | None) -> Build:
    """The build that would be made on this machine now.

    source_dir: the tree, to see which optional targets it has; None where it is not there yet.
    Raises UserError for a backend that this platform cannot have.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    if backend == "metal" and sys.platform != "darwin":
        raise UserError("--backend metal: Metal exists on macOS only; choose cpu, cuda or vulkan")
    targets = STOCK_TARGETS if kind == "stock" else TARGETS + optional_targets(source_dir)
    flags = (*BASE_FLAGS, *BACKENDS[backend], f"-DLLAMA_BUILD_COMMIT={commit}", "-DLLAMA_BUILD_NUMBER=0")
    return Build(backend, kind, source, series, flags, targets, compiler_identity(), cpu_identity())


def optional_targets(source_dir: Path | None) -> tuple[str, ...]:
    tests = source_dir / "tests" / "CMakeLists.txt" if source_dir else None
    text = tests.read_text(encoding="utf-8") if tests and tests.is_file() else ""
    return tuple(t for t in OPTIONAL_TARGETS if re.search(rf"\b{t}\b", text))


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, as CMake would choose it; None where there is none (or Visual Studio's, which CMake finds itself)."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    return [found] if found else None


def first_line(args: list[str]) -> str:
    """The first line a program prints, "" where it cannot run."""
    try:
        done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip().partition("\n")[0]


def compiler_identity() -> str:
    command = find_compiler()
    return f"{' '.join(command)}: {first_line([*command, '--version'])}" if command else "CMake's choice"


def cpu_identity() -> str:
    """What the machine's processor can do: programs built for it may not run on one that can do less."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        features = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
        if features:
            return " ".join([platform.machine(), *sorted(features[1].split())])
    return f"{platform.machine()} {platform.processor()}"


def binary(build: Path, name: str) -> Path:
    """Where a program of a build directory is: Visual Studio puts them one level down."""
    suffix = ".exe" if sys.platform == "win32" else ""
    return bin_dir(build) / f"{name}{suffix}"


def bin_dir(build: Path) -> Path:
    return build / "bin" / "Release" if (build / "bin" / "Release").is_dir() else build / "bin"


def is_complete(tree: Tree, wanted: Build) -> bool:
    """True if the build that is there is the wanted one."""
    build = tree.build(wanted.backend)
    return read_json(tree.build_stamp(wanted.backend)) == wanted.stamp(True) and all(binary(build, t).is_file() for t in wanted.targets)


def parse_progress(line: str) -> tuple[int, int] | None:
    """(done, total) from a line of Ninja's ("[12/244] Building ...") or Make's ("[ 12%] Building ..."), None for other lines."""
    m = re.match(r"\[\s*(\d+)/(\d+)\] ", line)
    if m:
        return int(m[1]), int(m[2])
    m = re.match(r"\[\s*(\d+)%\] ", line)
    return (int(m[1]), 100) if m else None


def job_count() -> int:
    """Compilations at a time: CMAKE_BUILD_PARALLEL_LEVEL, or the processors this process may use."""
    level = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    if level.isdecimal() and int(level) > 0:
        return int(level)
    return available_threads()


def ccache_environment(tree: Tree, wanted: Build) -> dict[str, str]:
    """Lets trees at other places share compiled files, but never machines with other processors (the code is built for this one)."""
    features = tree.root / "cpu.txt"
    features.write_text(wanted.cpu + "\n", encoding="utf-8")
    return {
        "CCACHE_BASEDIR": str(tree.root),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_EXTRAFILES": str(features),
        "CCACHE_SLOPPINESS": "time_macros",
    }


def cmake_cache(build: Path) -> dict[str, str]:
    """CMake's internal variables of a build directory; {} where it was never configured."""
    cache = build / "CMakeCache.txt"
    return dict(re.findall(r"^(\w+):INTERNAL=(.*)$", cache.read_text(errors="replace"), re.MULTILINE)) if cache.is_file() else {}


def discard_if_foreign(tree: Tree, wanted: Build, generator: str | None) -> None:
    """Delete a build directory that CMake or Ninja could not continue rightly."""
    build = tree.build(wanted.backend)
    if not build.is_dir():
        return
    stamp = read_json(tree.build_stamp(wanted.backend))
    known = cmake_cache(build)
    fits = (
        (stamp.get("compiler"), stamp.get("cpu")) == (wanted.compiler, wanted.cpu)
        and known.get("CMAKE_HOME_DIRECTORY") == tree.source.as_posix()
        and (known.get("CMAKE_GENERATOR") == "Ninja") == (generator == "Ninja")
    )
    if not fits:
        say("the build directory is of another compiler, processor or place: starting it anew")
        shutil.rmtree(build)


def build(tree: Tree, wanted: Build) -> None:
    """Configure and build; what an interrupted run compiled is kept.

    Raises UserError where CMake is missing or a step fails (the log is named).
    """
    cmake, ninja, ccache = (find_program(name) for name in ("cmake", "ninja", "ccache"))
    if cmake is None:
        raise UserError("cmake is needed to build llama.cpp; `rq-gguf doctor` says how to get it")
    generator = "Ninja" if ninja else None
    directory, stamp = tree.build(wanted.backend), tree.build_stamp(wanted.backend)
    discard_if_foreign(tree, wanted, generator)
    if wanted.kind == "patched" and wanted.backend not in BACKENDS_WITH_KERNELS:
        say(f"note: the patch has no kernels for {wanted.backend} yet: tiers and copies of experts run on the CPU")

    write_json(stamp, wanted.stamp(False))
    env = {**git_environment(tree.root), "NINJA_STATUS": "[%f/%t] "}
    flags = [*wanted.flags]
    if generator:
        flags += ["-G", generator, f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if ccache:
        languages = ["C", "CXX", *(["CUDA"] if wanted.backend == "cuda" else [])]
        flags += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in languages]
        env |= ccache_environment(tree, wanted)

    jobs = job_count()
    with tree.build_log(wanted.backend).open("wb") as log:
        say(f"configuring {wanted.kind} llama.cpp for {wanted.backend} (log: {log.name})")
        run_logged([cmake, "-S", tree.source, "-B", directory, *flags], log, "configuring llama.cpp", env=env)
        how = f"{generator or 'Make'}{' and ccache' if ccache else ''}, {jobs} {'job' if jobs == 1 else 'jobs'}"
        say(f"building {len(wanted.targets)} programs with {how} ({expected_time(wanted, jobs)})")
        # Where nobody watches, a line a minute is enough.
        slow = not sys.stderr.isatty()
        with Bar(desc="compiling", unit=" steps", mininterval=60 if slow else 0.2, leave=False) as bar:

            def show(line: str) -> None:
                progress = parse_progress(line)
                if progress:
                    bar.total = progress[1]
                    bar.update(progress[0] - bar.n)

            args = ["--build", str(directory), "--config", "Release", "--parallel", str(jobs), "--target", *wanted.targets]
            run_logged([cmake, *args], log, "building llama.cpp", env=env, on_line=show)
    write_json(stamp, wanted.stamp(True))


def expected_time(wanted: Build, jobs: int) -> str:
    minutes = max(1, round(MINUTES_PER_CORE[wanted.kind] / jobs))
    return f"about {minutes} min the first time" if wanted.backend == "cpu" else f"{minutes} min and more the first time"
