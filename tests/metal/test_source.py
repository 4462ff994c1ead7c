"""What Apple's compiler and loader would look at first: address spaces, names, structs, and that both ways of building find the kernels."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from metal import build, sources
from metal.build import Tree

from rq_gguf.runtime import tools

KARGS = ("ggml_metal_kargs_expert_remap", "ggml_metal_kargs_mul_mm_tiers_map0", "ggml_metal_kargs_mul_mv_tiers")
TARGETS = ("x86_64-linux-gnu", "arm64-apple-macos", "spir64")
"""This machine, an Apple host, and a GPU's 64-bit model."""


@pytest.fixture(scope="session")
def tiers(tree: Tree) -> str:
    """The kernels that the series adds."""
    return (tree.metal / "kernels/tiers.metal").read_text(encoding="utf-8")


def clang(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    compiler = build.compiler()
    assert compiler is not None
    return subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)


def check_address_spaces(tree: Tree, folder: Path, text: str) -> list[str]:
    """What is wrong with the kernels where address spaces are part of types: clang's errors, and casts between spaces, which it allows."""
    kernels = tree.metal / "kernels"
    for name in ("common.h", "dequantize.h", "mul_mv.metal", "tiers.h"):
        source = (kernels / name).read_text(encoding="utf-8")
        source = source.replace('#include "tiers.metal"', "")
        (folder / name).write_text(sources.as_cpp(sources.declarations(source)) if name != "tiers.h" else source, encoding="utf-8")
    (folder / "tiers.cpp").write_text(f'#include <metal_stdlib>\n#include "mul_mv.metal"\n{sources.as_cpp(text)}', encoding="utf-8")
    include = [f"-I{d}" for d in (build.CPP / "shim_address_spaces", folder, tree.metal, tree.root / "ggml/src")]
    flags = ("-std=c++17", "-fsyntax-only", "-w", "-DGGML_METAL_HAS_BF16", "-nostdinc", "-Xclang", "-ast-dump")
    done = clang(*flags, *include, folder / "tiers.cpp")
    casts = [line for line in done.stdout.splitlines() if "<AddressSpaceConversion>" in line]
    return [line for line in done.stderr.splitlines() if "error:" in line] + casts


def test_address_spaces(tree: Tree, tiers: str, tmp_path: Path) -> None:
    assert not check_address_spaces(tree, tmp_path, tiers)


MIX_UPS = (
    ("a local copy loses its space", "device const char * src0_cur =", "const char * src0_cur ="),
    ("threadgroup memory as device", "src0_cur, src1_cur, dst_cur, shmem,", "src0_cur, src1_cur, dst_cur, dst_cur,"),
    ("device as threadgroup memory", "src0_cur, src1_cur, dst_cur, shmem,", "src0_cur, shmem, dst_cur, shmem,"),
    ("a cast between spaces", "(device int32_t *) hids", "(threadgroup int32_t *) hids"),
    ("a cast that drops the space", "((device uint32_t *) htpe)[ide]", "((uint32_t *) htpe)[ide]"),
    ("arguments as device memory", "device const int32_t * row = src1 +", "constant int32_t * row = src1 +"),
    ("writing to constant memory", "device       char * dst0,", "constant     char * dst0,"),
)


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MIX_UPS], ids=[m[0] for m in MIX_UPS])
def test_a_mix_up_is_an_error(tree: Tree, tiers: str, tmp_path: Path, old: str, new: str) -> None:
    assert old in tiers
    assert check_address_spaces(tree, tmp_path, tiers.replace(old, new))


def test_every_pointer_names_its_address_space(tiers: str) -> None:
    assert not sources.bare_pointers(tiers)


def test_a_pointer_without_address_space_is_found() -> None:
    text = "void f(device char * a, float * b) { const int32_t * row = x; threadgroup int * c = (int *) a; float d = e * 2; g(*c); }"
    assert sources.bare_pointers(text) == ["float * b", "const int32_t * row = x", "int *"]


def test_the_host_asks_for_kernels_that_exist(tree: Tree, tiers: str) -> None:
    """By name; the harness refuses every other name too, but sees only what cases ask for."""
    host = (tree.metal / "ggml-metal-tiers.cpp").read_text(encoding="utf-8")
    asked = set(re.findall(r'"(kernel_\w+)"', host))
    library = sources.read_library("tiers.metal", tiers)
    assert asked == set(library.kernels)
    others = "".join(p.read_text(encoding="utf-8") for p in (tree.metal / "kernels").glob("*.metal") if p.name != "tiers.metal")
    taken = set(re.findall(r'host_name\("(\w+)|kernel void (\w+)', others))
    assert len(taken) > 300
    assert not {name for pair in taken for name in pair} & asked, "a kernel of the same name exists"


def test_types_have_their_kernels(tree: Tree, tiers: str) -> None:
    """Each type that the host sends to the kernel of one launch has a case there, and matrix times matrix exists for it."""
    header = (tree.metal / "kernels/tiers.h").read_text(encoding="utf-8")
    known = set(re.findall(r"^\s+TIERS_TYPE_(\w+)(?:,| =)", header, re.MULTILINE)) - {"NONE"}
    host = (tree.metal / "ggml-metal-tiers.cpp").read_text(encoding="utf-8")
    sent = dict(re.findall(r"case GGML_TYPE_(\w+):\s+return \{ TIERS_TYPE_(\w+),", host))
    cases = set(re.findall(r"TIERS_CASE(?:_F|_SPLIT)?\((\w+),", tiers)) - {"TYPE"}
    assert known == set(sent) == set(sent.values()) == cases
    assert all(name == kind for name, kind in sent.items())
    matrix = sources.read_library("mul_mm.metal", (tree.metal / "kernels/mul_mm.metal").read_text(encoding="utf-8"))
    for kind in known:
        names = {f"kernel_mul_mm_id_{k}_f32" for k in (kind, kind.lower(), re.sub(r"_K$", "_K", kind.lower().replace("_k", "_K")))}
        assert names & set(matrix.kernels), kind


def test_function_constants(tree: Tree, tiers: str) -> None:
    """Their numbers are nobody else's."""
    header = (tree.metal / "kernels/tiers.h").read_text(encoding="utf-8")
    (base,) = map(int, re.findall(r"#define FC_MUL_MV_TIERS\s+(\d+)", header))
    other = (tree.metal / "ggml-metal-impl.h").read_text(encoding="utf-8")
    bases = [int(n) for n in re.findall(r"#define FC_\w+\s+(\d+)", other)]
    assert all(abs(base - b) >= 100 for b in bases)
    assert tiers.count("[[function_constant(") == 8


def layouts(tree: Tree, folder: Path, target: str) -> str:
    """Offsets of the structs that the host passes to kernels."""
    source = folder / "layout.cpp"
    uses = "".join(f"int use_{i} = sizeof({name});\n" for i, name in enumerate(KARGS))
    source.write_text(f'#include <stdint.h>\n#include "kernels/tiers.h"\n{uses}', encoding="utf-8")
    done = clang(
        "-target",
        target,
        "-ffreestanding",
        "-nostdlibinc",
        f"-I{tree.metal}",
        "-fsyntax-only",
        "-Xclang",
        "-fdump-record-layouts-simple",
        source,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"DataSize:\d+", "", done.stdout)


def test_structs_have_one_layout(tree: Tree, tmp_path: Path) -> None:
    """Both sides include one header; it holds no type whose size or alignment differs between host and GPU."""
    first, *others = [layouts(tree, tmp_path, target) for target in TARGETS]
    assert all(f"Type: {name}" in first for name in KARGS) or first.count("FieldOffsets") >= len(KARGS)
    assert all(other == first for other in others)


def test_the_header_is_c(tree: Tree, tmp_path: Path) -> None:
    """Objective-C includes it."""
    source = tmp_path / "header.c"
    source.write_text('#include "ggml-metal-tiers.h"\n', encoding="utf-8")
    done = clang("-x", "c", "-std=c11", "-fsyntax-only", "-Wall", "-Wno-unused-function", "-Werror", *build.folders(tree), source)
    assert done.returncode == 0, done.stderr


def test_supports_op_is_asked(tree: Tree) -> None:
    """ggml-metal-device.m and ggml-metal.cpp are not compiled here: at least their hooks are where they belong."""
    device = (tree.metal / "ggml-metal-device.m").read_text(encoding="utf-8")
    body = device[device.index("bool ggml_metal_device_supports_op") :]
    assert re.search(
        r"case GGML_OP_EXPERT_REMAP:\s+case GGML_OP_MUL_MAT_TIERS:\s+return ggml_metal_tiers_supports_op\(&dev->props, op\);", body
    )
    assert '#import "ggml-metal-tiers.h"' in device
    backend = (tree.metal / "ggml-metal.cpp").read_text(encoding="utf-8")
    assert re.search(r"case GGML_OP_MUL_MAT_TIERS:\s+\{\s+res \+= ggml_metal_op_mul_mat_tiers_extra\(tensor\);", backend)


def function_text(text: str, start: str) -> str:
    begin = text.index(start)
    return text[begin : text.index("\n}\n", begin)]


def test_stock_multiplication_is_unchanged(tree: Tree, stock_runtime: Path) -> None:
    """The kernels but for one line at the end of a file, and what encodes MUL_MAT_ID and makes its pipelines."""
    stock = tools.source_path("ggml", unpatched=True) / "src/ggml-metal"
    for path in sorted((stock / "kernels").iterdir()):
        text = (tree.metal / "kernels" / path.name).read_text(encoding="utf-8")
        assert text.removesuffix('\n#include "tiers.metal"\n') == path.read_text(encoding="utf-8"), path.name
    for name in ("ggml-metal-impl.h", "ggml-metal-device.cpp", "ggml-metal-tuning.cpp"):
        assert (tree.metal / name).read_bytes() == (stock / name).read_bytes(), name
    ours, theirs = ((d / "ggml-metal-ops.cpp").read_text(encoding="utf-8") for d in (tree.metal, stock))
    start = "size_t ggml_metal_op_mul_mat_id_extra_tpe"
    assert (
        ours[ours.index(start) : ours.index("int ggml_metal_op_tiers(")]
        == theirs[theirs.index(start) : theirs.index("int ggml_metal_op_add_id(")]
    )
    start = "static int ggml_metal_op_encode_impl"
    added = set(function_text(ours, start).splitlines()) - set(function_text(theirs, start).splitlines())
    assert sorted(line.strip() for line in added) == [
        "case GGML_OP_EXPERT_REMAP:",
        "case GGML_OP_MUL_MAT_TIERS:",
        "n_fuse = ggml_metal_op_tiers(ctx, idx);",
    ]


#
# CMake
#

STAND_IN = """\
cmake_minimum_required(VERSION 3.14)
project(stand-in C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_INSTALL_BINDIR bin)
set(FOUNDATION_LIBRARY m CACHE STRING "")
set(METAL_FRAMEWORK m CACHE STRING "")
set(METALKIT_FRAMEWORK m CACHE STRING "")
function(ggml_add_backend_library name)
    file(WRITE ${CMAKE_BINARY_DIR}/sources.txt "${ARGN}")
    set_source_files_properties(${ARGN} PROPERTIES HEADER_FILE_ONLY ON)
    add_library(${name} STATIC ${ARGN})
    set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
endfunction()
add_subdirectory(${METAL} metal)
"""
"""A project with what ggml-metal's CMakeLists.txt asks macOS and ggml for."""


def configure(tree: Tree, folder: Path, embed: bool) -> Path:
    """The build directory."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed")
    (folder / "CMakeLists.txt").write_text(STAND_IN, encoding="utf-8")
    target = folder / "build"
    options = [f"-DMETAL={tree.metal}", f"-DGGML_METAL_EMBED_LIBRARY={'ON' if embed else 'OFF'}"]
    done = subprocess.run(["cmake", "-G", "Ninja", "-S", folder, "-B", target, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def check_mul_mv(tree: Tree, tiers: str, text: str, folder: Path, *flags: str) -> None:
    """The source of one library as it comes to Apple's compiler: complete, and each thing declared before it is used."""
    assert '#include "tiers' not in text and "#pragma once" not in text
    stock = (tree.metal / "kernels/mul_mv.metal").read_text(encoding="utf-8")
    expected = set(sources.read_library("mul_mv.metal", stock).kernels) | set(sources.read_library("tiers.metal", tiers).kernels)
    assert set(sources.read_library("mul_mv.metal", text).kernels) == expected
    source = folder / "mul_mv.cpp"
    source.write_text("#include <metal_stdlib>\n" + sources.as_cpp(text), encoding="utf-8")
    done = clang("-std=c++17", *build.KERNEL_FLAGS, *flags, f"-I{build.CPP / 'shim'}", f"-I{build.CPP}", "-fsyntax-only", source)
    assert done.returncode == 0, done.stderr[-3000:]


def test_embedded_library(tree: Tree, tiers: str, tmp_path: Path) -> None:
    """CMake makes one text of each library and the headers it needs."""
    target = configure(tree, tmp_path, embed=True)
    made = "metal/autogenerated/ggml-metal-embed-mul_mv"
    done = subprocess.run(["cmake", "--build", target, "--target", f"{made}.s"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check_mul_mv(tree, tiers, (target / f"{made}.metal").read_text(encoding="utf-8"), tmp_path, "-DGGML_METAL_EMBED_LIBRARY")
    assert "_ggml_metallib_mul_mv_start" in (target / f"{made}.s").read_text(encoding="utf-8")
    assert "ggml-metal-tiers.cpp" in (target / "sources.txt").read_text(encoding="utf-8")


def test_embedded_library_is_made_again(tree: Tree, tmp_path: Path) -> None:
    """Where a file of the tiers changes."""
    target = configure(tree, tmp_path, embed=True)
    rules = (target / "build.ninja").read_text(encoding="utf-8").replace("$\n", "")
    (rule,) = re.findall(r"^build metal/autogenerated/ggml-metal-embed-mul_mv\.s.*$", rules, re.MULTILINE)
    assert "kernels/tiers.metal" in rule and "kernels/tiers.h" in rule


def flattened(path: Path, seen: set[Path]) -> str:
    """As ggml_metal_library_flatten_file in ggml-metal-device.m, which runs where there is no compiled library."""
    base = path.parent.parent if path.parent.name == "kernels" else path.parent
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        found = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        if line.strip() == "#pragma once":
            continue
        if found is None:
            lines.append(line)
            continue
        candidates = [d / found.group(1) for d in (base / "kernels", base, base.parent)]
        inner = next((c for c in candidates if c.is_file()), None)
        assert inner is not None, f"{path.name} includes {found.group(1)}, which is not there"
        if inner not in seen:
            seen.add(inner)
            lines.append(flattened(inner, seen))
    return "\n".join(lines)


@pytest.mark.parametrize("built", (True, False), ids=("copied", "in the source tree"))
def test_separate_sources(tree: Tree, tiers: str, tmp_path: Path, built: bool) -> None:
    """CMake copies the sources beside the programs; Apple's compiler, or the program itself, reads them there."""
    folder = configure(tree, tmp_path, embed=False) / "bin/kernels" if built else tree.metal / "kernels"
    text = flattened(folder / "mul_mv.metal", set())
    check_mul_mv(tree, tiers, text, tmp_path)


def test_compiled_library_is_made_again(tree: Tree, tmp_path: Path) -> None:
    """Where a file of the tiers changes."""
    rules = (configure(tree, tmp_path, embed=False) / "build.ninja").read_text(encoding="utf-8").replace("$\n", "")
    (rule,) = re.findall(r"^build bin/mul_mv\.air.*$", rules, re.MULTILINE)
    assert "kernels/tiers.metal" in rule and "kernels/tiers.h" in rule
