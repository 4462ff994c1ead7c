"""Builds the harness: Metal kernels and ggml-metal's host code, compiled for this CPU, in one program.

Nothing is built where the program was made from the same files before; ccache, if it is there, saves files that did not change.
"""

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from metal import sources

from rq_gguf.runtime import tools

HERE = Path(__file__).resolve().parent
CPP = HERE / "cpp"

SOURCE = "RQ_GGUF_METAL_SOURCE"
"""Environment variable: a patched llama.cpp tree to test instead of the installed one's source."""

LIBRARIES = {
    "mul_mv": r"kernel_mul_mv_id_\w+",
    "mul_mm": r"kernel_mul_mm_id_\w+(?<!_f16)",
    "argsort": r"kernel_(argsort_\w+|topk_moe_f32|moe_reduce_f32)",
    "unary": r"kernel_(swiglu_f32|unary_f32_f32)",
    "softmax": r"kernel_soft_max_f32\w*",
    "binbcast": r"kernel_(bin_fuse_f32_f32_f32\w*|add_id)",
    "reduce": r"kernel_sum_rows_f32_f32\w*",
    "quantize": r"kernel_(get_rows_f32|cpy_f32_f32)",
}
"""The .metal files with what a layer of experts needs, and the kernels of them that are compiled."""

HOST = ("ops", "tiers", "device", "common", "tuning", "fusion")

KERNEL_FLAGS = (
    "-O2",
    "-fsigned-char",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Xclang",
    "-cl-single-precision-constant",
    "-mavx2",
    "-mf16c",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-user-defined-literals",
    "-Wno-pass-failed",
    "-Wno-unused-value",
    "-DGGML_METAL_HAS_BF16",
)
"""Literals and half arithmetic as in Metal."""


class BuildError(Exception):
    """A compiler's message."""


@dataclass(frozen=True)
class Tree:
    """A patched llama.cpp and the directory of ggml's shared libraries built from it."""

    root: Path
    libraries: Path

    @property
    def metal(self) -> Path:
        return self.root / "ggml/src/ggml-metal"

    @property
    def has_tiers(self) -> bool:
        return (self.metal / "ggml-metal-tiers.cpp").is_file()


def compiler() -> str | None:
    """clang 19, whose half arithmetic and vectors the harness is written for; None where it is missing or this is no x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    return shutil.which("clang++-19")


def find_tree(libraries: Path) -> Tree:
    """The source that the programs in a directory were built from, or the one that the environment names. Raises UserError."""
    named = os.environ.get(SOURCE)
    return Tree(Path(named) if named else tools.source_path("ggml").parent, libraries)


def folders(tree: Tree) -> list[str]:
    ggml = tree.root / "ggml"
    return [f"-I{d}" for d in (ggml / "include", ggml / "src", tree.metal, CPP)]


def write_kernels(tree: Tree, target: Path, edit: sources.Edit | None = None) -> dict[str, list[str]]:
    """Write the kernels' sources as C++ below `target`. Returns the names of the kernels of each translation unit.

    The file of the tiers is compiled apart from mul_mv.metal, which includes it: faults are put into it alone.
    edit: changes a file of the tiers, for tests of the tests.
    """
    kernels = tree.metal / "kernels"
    target.mkdir(parents=True, exist_ok=True)
    texts = {p.name: p.read_text(encoding="utf-8") for p in sorted(kernels.iterdir()) if p.suffix in (".metal", ".h")}
    tiers = texts["tiers.metal"]
    include = '#include "tiers.metal"'
    if include not in texts["mul_mv.metal"]:
        raise BuildError("mul_mv.metal does not include tiers.metal: the host would not find its kernels")
    own = sources.read_library("tiers.metal", tiers)
    texts["mul_mv_and_tiers.metal"] = texts["mul_mv.metal"].replace(include, edit(TIERS_KERNELS, tiers) if edit else tiers)
    texts["mul_mv.metal"] = texts["mul_mv.metal"].replace(include, "")
    for name, text in texts.items():
        (target / name).write_text(sources.as_cpp(text), encoding="utf-8")

    names = {}
    for stem in (*LIBRARIES, "mul_mv_and_tiers"):
        library = sources.read_library(f"{stem}.metal", texts[f"{stem}.metal"])
        library = sources.only(library, LIBRARIES.get(stem, "|".join(own.kernels)))
        names[stem] = sorted(library.kernels)
        (target / f"{stem}.cpp").write_text(sources.translation_unit(library, f"metal_{stem}"), encoding="utf-8")
    return names


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def compile_all(commands: list[list[str]]) -> None:
    """Two at a time. Raises BuildError."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        errors = [str(e) for e in [done.exception() for done in [pool.submit(run, command) for command in commands]] if e]
    if errors:
        raise BuildError("\n".join(errors))


def digest(tree: Tree, extra: str = "") -> str:
    """Of all files that the program is made of."""
    paths = [*sorted(tree.metal.rglob("*")), *sorted((tree.root / "ggml/include").glob("*.h"))]
    paths += [*sorted(CPP.rglob("*")), *sorted(HERE.glob("*.py"))]
    total = hashlib.sha256(f"{extra}{tree.libraries}".encode())
    for path in paths:
        if path.is_file():
            total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:20]


def object_command(source: Path, target: Path, tree: Tree, flags: tuple[str, ...]) -> list[str]:
    clang = compiler()
    assert clang is not None
    launcher = [c] if (c := shutil.which("ccache")) else []
    return [*launcher, clang, "-std=c++17", *flags, *folders(tree), "-c", str(source), "-o", str(target)]


TIERS_KERNELS, TIERS_HOST = "tiers.metal", "ggml-metal-tiers.cpp"
"""Names by which an edit knows the files."""


def build(tree: Tree, home: Path, edit: sources.Edit | None = None) -> Path:
    """The harness, built below `home` if it is not there yet. Raises BuildError.

    edit: changes kernels/tiers.metal and ggml-metal-tiers.cpp on the way; only what depends on them is compiled apart then.
    """
    base = build(tree, home).parent if edit else None
    changed = [edit(name, path.read_text(encoding="utf-8")) for name, path in edited_files(tree)] if edit else []
    folder = home / ("harness" if edit is None else "edited")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        program, stamp, wanted = folder / "harness", folder / "stamp", digest(tree, "\0".join(changed))
        if not (program.is_file() and stamp.is_file() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            build_in(tree, folder, program, edit, base)
            stamp.write_text(wanted)
    return program


def edited_files(tree: Tree) -> tuple[tuple[str, Path], ...]:
    return (TIERS_KERNELS, tree.metal / "kernels" / TIERS_KERNELS), (TIERS_HOST, tree.metal / TIERS_HOST)


def build_in(tree: Tree, folder: Path, program: Path, edit: sources.Edit | None, base: Path | None) -> None:
    """base: a folder with the objects of all files that are not edited."""
    kernels = folder / "kernels"
    names = write_kernels(tree, kernels, edit)
    flags = ("-DMTL_MUTANTS",) if edit else ()
    kernel_flags = (*KERNEL_FLAGS, *flags, f"-I{CPP / 'shim'}", f"-I{tree.metal}", f"-I{tree.root / 'ggml/src'}")
    commands = {}
    for stem in sorted(names, key=len, reverse=True):  # the slowest first
        commands[f"{stem}.o"] = (kernels / f"{stem}.cpp", kernel_flags)
    for name in HOST:
        commands[f"host_{name}.o"] = (tree.metal / f"ggml-metal-{name}.cpp", ("-O1", "-w", *flags))
    for path in sorted(CPP.glob("*.cpp")):
        commands[f"harness_{path.stem}.o"] = (path, ("-O2", "-Wall", "-Wextra", *flags))
    if edit:
        changed = folder / TIERS_HOST
        changed.write_text(edit(TIERS_HOST, (tree.metal / TIERS_HOST).read_text(encoding="utf-8")), encoding="utf-8")
        commands["host_tiers.o"] = (changed, ("-O1", "-w", *flags))
    own = {"mul_mv_and_tiers.o", "host_tiers.o", "harness_main.o"} if edit else set(commands)
    compile_all([object_command(source, folder / name, tree, extra) for name, (source, extra) in commands.items() if name in own])
    objects = [str((folder if name in own or base is None else base) / name) for name in commands]
    libraries = [f"-L{tree.libraries}", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{tree.libraries}"]
    clang = compiler()
    assert clang is not None
    run([clang, *objects, *libraries, "-o", str(program)])
