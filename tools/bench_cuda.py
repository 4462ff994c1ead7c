"""Speed of tiered files on CUDA against stock files: builds, checks and measures in one go on the machine that has the GPU.

    python tools/bench_cuda.py SOURCE --work DIR [--out DIR] [--steps build,files,ops,sanitize,profile,experts,bench] [--rounds 5]

SOURCE: the pinned llama.cpp, a folder or a tarball (`models/`, `docs/` and `tools/ui/` are not needed). Needs CMake, nvcc, patch, and
Python with numpy and gguf (`PYTHONPATH=DIR/tree/gguf-py` will do).

build     stock, then patched in the same tree, so that what the series does not touch is compiled once. The first patch appends two ops to
          ggml's enum, which every file includes: 'stock' is the tree with that patch, in which there is no CUDA code. `--pure-stock`
          builds the untouched tree in a folder of its own instead, which takes as long again. 7 minutes on 16 cores.
files     random weights of the shape of OLMoE-1B-7B (or of the experts of Qwen3-30B-A3B, `--shape qwen3`), fewer layers, a small
          vocabulary: stock files of one type; tiered files of one type, half Q8_0 and half Q4_K, and a ladder of four types, each with
          0, 4 and 16 copies a layer; with `--plan PLAN.json=TYPE`, the types of a plan of rq-gguf, dealt out so that each type serves the
          share of selections that the plan gives it, to be compared with the stock file of a type that has the same KL divergence
ops       test-backend-ops for the two ops and what is fused with them, against the CPU
sanitize  the same for some of the cases under compute-sanitizer, memcheck and racecheck
profile   time of each kernel in a prompt of 512 tokens and in decode, by Nsight Compute, launched one by one: where the time goes
experts   the same of the experts' kernels alone in decode of 2 to 8 sequences
bench     rounds over all files in random order; llama-bench for tg128, pp512 and pp2048, llama-batched-bench for decode of 2 to 32
          sequences. A file's ratio is its speed over that of stock files whose times are weighted by the share of expert selections that
          each type serves (counted by the patched llama.cpp). Medians over the rounds, a ratio's standard error by bootstrap. With
          `--gpus N` that many rounds run at a time.
          With `--rpc` the GPU is behind a server of llama.cpp's RPC on this machine, of the same build as the program.
Everything measured goes to OUT/bench_cuda.json, the tables to the terminal, OUT/bench_cuda.md and OUT/profile.md.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rq_gguf.bench.printed import batched_options, batched_speeds, bench_speeds, in_order
from rq_gguf.format import (
    DEFAULT_DISPATCH_BLOCK,
    FORMAT_VERSION,
    KEY_DISPATCH,
    KEY_DISPATCH_BLOCK,
    KEY_FORMAT_VERSION,
    MATRICES,
    GroupLayout,
    build_map,
    layout_group,
    map_name,
    tier_name,
)
from rq_gguf.runtime.rpc import Server, rpc_server

STEPS = ("build", "files", "ops", "sanitize", "profile", "experts", "bench")
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "test-backend-ops", "ggml-rpc-server")
SEQUENCES = (2, 4, 8, 32)
COPIES = (0, 4, 16)
LADDER = ("Q8_0", "Q6_K", "Q4_K", "Q3_K")
PROMPT, DECODED = 16, 128
"""Tokens of each sequence with llama-batched-bench; with fewer generated the start shows."""
PROFILED = (2, 4, 8)
OPS = "EXPERT_REMAP,EXPERT_REMAP_FUSION,MUL_MAT_TIERS,MUL_MAT_TIERS_FUSION"
STOCK_OPS = "TOPK_MOE,MUL_MAT_ID,MUL_MAT_ID_FUSION"
RESAMPLED, DRAWS = 2000, np.random.default_rng(0)
SANITIZED = 12
"""Every so manieth case goes through compute-sanitizer."""
SCALES = {
    "Q8_0": [(0, 2e-4)], "Q6_K": [(208, 2e-5)], "Q5_K": [(0, 3e-4), (2, 4e-3)], "Q4_K": [(0, 5e-4), (2, 4e-3)], "Q3_K": [(108, 5e-4)],
    "Q2_K": [(80, 2e-3), (82, 2e-3)], "IQ4_XS": [(0, 1e-5)], "IQ3_S": [(0, 1e-4)], "IQ3_XXS": [(0, 1e-4)],
}  # fmt: skip
"""Type, from many bits to few -> [(offset of an F16 scale in a block, its value)]: random blocks with these are finite weights."""


@dataclass(frozen=True)
class Shape:
    """A model's measures. Attention is that of architecture `olmoe` in every case, so only the experts are like the named model's."""

    n_embd: int
    n_ff: int
    n_expert: int
    n_used: int
    n_head: int
    n_layer: int
    n_vocab: int = 8192


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8, 16, 8),
    "qwen3": Shape(2048, 768, 128, 8, 16, 6),
    "qwen3-235b": Shape(4096, 1536, 128, 8, 32, 3),
}


@dataclass(frozen=True)
class Variant:
    """A file, and how the types are dealt to its experts in turns."""

    name: str
    types: tuple[str, ...]
    copies: int = 0
    tiered: bool = True
    down: tuple[str, ...] = ()
    """Of the down matrices, where not the same."""
    rival: str = ""
    """Type of the stock file to compare with; where empty, those of its own types, weighted."""

    @property
    def build(self) -> str:
        return "patched" if self.tiered else "stock"


@dataclass
class Measured:
    """Samples in tokens per second by test, and the share of selections by type."""

    shares: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


def variants() -> list[Variant]:
    stock = [Variant(f"stock {t}", (t,), tiered=False) for t in LADDER]
    mixes = {"one type Q8_0": ("Q8_0",), "one type Q4_K": ("Q4_K",), "half Q8_0, half Q4_K": ("Q8_0", "Q4_K"), "ladder of four": LADDER}
    return stock + [Variant(name, types, copies) for name, types in mixes.items() for copies in COPIES]


def plan_variant(text: str, shape: Shape) -> Variant:
    """text: PLAN.json=TYPE. The experts are dealt to the types as the plan's selections are, all layers together; at most four types."""
    path, _, rival = text.rpartition("=")
    experts = [e for layer in json.loads(Path(path).read_text())["layers"] for e in layer["experts"]]
    groups = []
    for group in ("gate_up", "down"):
        served: dict[str, float] = {}
        for e in experts:
            kind = str(e[group]).upper()
            served[kind] = served.get(kind, 0.0) + e["share"]
        most = sorted(served, key=lambda kind: -served[kind])[:4]
        bounds = np.cumsum([served[kind] for kind in most])
        dealt = [most[int(np.searchsorted(bounds, (i + 0.5) / shape.n_expert * bounds[-1]))] for i in range(shape.n_expert)]
        groups.append(tuple(np.random.default_rng(0).permutation(dealt).tolist()))
    return Variant(f"plan as good as {rival.upper()}", groups[0], down=groups[1], rival=rival.upper())


def run(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output; everything printed is appended to the log. Raises CalledProcessError."""
    words = [str(c) for c in command]
    done = subprocess.run(words, env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True, errors="replace")
    with log.open("a", encoding="utf-8") as f:
        f.write(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}\n")
    if done.returncode != 0:
        print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, words)
    return done.stdout


def run_tests(program: Sequence[str | Path], cases: str, log: Path) -> str:
    """What test-backend-ops prints; that tests fail is not an error."""
    words = [*map(str, program), "test", "-o", cases]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with log.open("a", encoding="utf-8") as f:
        f.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    return done.stdout


#
# build
#


def unpack(source: Path, tree: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, tree, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    else:
        tree.mkdir(parents=True)
        with tarfile.open(source) as tar:
            tar.extractall(tree, filter="data")


def apply_patches(tree: Path, patches: Sequence[Path], log: Path) -> None:
    for p in patches:
        run(["patch", "-p1", "--no-backup-if-mismatch", "-i", p.resolve()], log, cwd=tree)


def compile_tree(tree: Path, bin_dir: Path, arch: str, jobs: int, log: Path) -> None:
    """Programs without shared libraries, so that they stay when the tree changes."""
    folder = tree.parent / f"build-{tree.name}"
    if not (folder / "CMakeCache.txt").exists():
        off = [f"-D{o}=OFF" for o in ("GGML_CUDA_FA", "BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_EXAMPLES")]
        on = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}"]
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []  # compiles across targets, where make waits for one after another
        run(["cmake", *ninja, "-S", tree, "-B", folder, *on, *off], log)
    run(["cmake", "--build", folder, "-j", str(jobs), "--target", *PROGRAMS], log)
    bin_dir.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        shutil.copy2(folder / "bin" / program, bin_dir / program)


def build(source: Path, patches: Path, work: Path, arch: str, jobs: int, pure_stock: bool, log: Path) -> None:
    series = sorted(patches.glob("*.patch"))
    if pure_stock:
        unpack(source, work / "stock")
        compile_tree(work / "stock", work / "bin-stock", arch, jobs, log)
    unpack(source, work / "tree")
    if not pure_stock:
        apply_patches(work / "tree", series[:1], log)
        compile_tree(work / "tree", work / "bin-stock", arch, jobs, log)
        series = series[1:]
    apply_patches(work / "tree", series, log)
    compile_tree(work / "tree", work / "bin-patched", arch, jobs, log)


#
# files
#


def random_blocks(rng: np.random.Generator, type_name: str, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], gguf.GGMLQuantizationType]:
    """Weights of a type as rows of bytes, and the type."""
    qtype = gguf.GGMLQuantizationType[type_name]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    rows = (*shape[:-1], shape[-1] // block * size)
    n_bytes = int(np.prod(rows))
    tile = rng.integers(0, 256, (min(n_bytes // size, 100_000), size), dtype=np.uint8)
    for offset, value in SCALES[type_name]:
        tile[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    return np.resize(tile.reshape(-1), n_bytes).reshape(rows), qtype


def layouts(v: Variant, shape: Shape) -> tuple[GroupLayout, GroupLayout]:
    """Of gate+up and of down: the types dealt to the experts in turns, the copies spread over them; a copy has its primary's type."""
    copied = {i * shape.n_expert // v.copies for i in range(v.copies)} if v.copies else set()

    def layout(types: tuple[str, ...]) -> GroupLayout:
        instances = tuple((types[e % len(types)],) * (2 if e in copied else 1) for e in range(shape.n_expert))
        return layout_group(instances, tuple(kind for kind in SCALES if kind in types))

    return layout(v.types), layout(v.down or v.types)


def write_file(v: Variant, shape: Shape, path: Path) -> None:
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path.with_suffix(".part"), "olmoe")
    w.add_context_length(4096)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layer)
    w.add_feed_forward_length(shape.n_ff)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv(shape.n_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_expert_count(shape.n_expert)
    w.add_expert_used_count(shape.n_used)
    w.add_vocab_size(shape.n_vocab)
    w.add_tokenizer_model("no_vocab")
    if v.tiered:
        w.add_uint32(KEY_FORMAT_VERSION, FORMAT_VERSION)
        w.add_string(KEY_DISPATCH, "balanced")
        w.add_uint32(KEY_DISPATCH_BLOCK, DEFAULT_DISPATCH_BLOCK)

    def quantized(name: str, dims: tuple[int, ...], type_name: str) -> None:
        data, qtype = random_blocks(rng, type_name, dims)
        w.add_tensor(name, data, raw_dtype=qtype)

    gate_up, down = layouts(v, shape)
    quantized("token_embd.weight", (shape.n_vocab, shape.n_embd), "Q8_0")
    quantized("output.weight", (shape.n_vocab, shape.n_embd), "Q8_0")
    w.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    for i in range(shape.n_layer):
        for norm in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.n_embd, np.float32))
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            quantized(f"blk.{i}.{matrix}.weight", (shape.n_embd, shape.n_embd), "Q8_0")
        w.add_tensor(f"blk.{i}.ffn_gate_inp.weight", rng.standard_normal((shape.n_expert, shape.n_embd), np.float32) * np.float32(0.02))
        for matrix in MATRICES:
            if matrix == "gate_up":
                continue
            dims = (shape.n_embd, shape.n_ff) if matrix == "down" else (shape.n_ff, shape.n_embd)
            if not v.tiered:
                quantized(f"blk.{i}.ffn_{matrix}_exps.weight", (shape.n_expert, *dims), v.types[0])
                continue
            for t, tier in enumerate((down if matrix == "down" else gate_up).tiers):
                quantized(tier_name(i, matrix, t), (len(tier.instances), *dims), tier.type)
        if v.tiered and (v.copies or max(len(gate_up.tiers), len(down.tiers)) > 1):
            w.add_tensor(map_name(i), build_map((gate_up, down), shape.n_expert))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    path.with_suffix(".part").rename(path)


def file_of(v: Variant, work: Path) -> Path:
    return work / "files" / f"{v.name}-{v.copies}.gguf".replace(" ", "_").replace(",", "")


def make_files(shape: Shape, work: Path, wanted: Sequence[Variant]) -> None:
    (work / "files").mkdir(parents=True, exist_ok=True)
    for v in wanted:
        if not file_of(v, work).exists():
            write_file(v, shape, file_of(v, work))
            print(f"{v.name}, {v.copies} copies: {file_of(v, work).stat().st_size / 1e9:.2f} GB", file=sys.stderr)


#
# checks
#


def passed_cases(printed: str) -> list[str]:
    """Names of the cases that test-backend-ops found to be right."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    return [m[1] for m in re.finditer(r"^.*?(\w+\(.*\)): OK$", plain, flags=re.MULTILINE)]


def check_ops(work: Path, out: Path) -> str:
    """What test-backend-ops says of the ops, with the cases that failed."""
    printed = run_tests([work / "bin-patched/test-backend-ops"], f"{OPS},{STOCK_OPS}", out / "ops.log")
    failed = [line.strip()[-200:] for line in printed.splitlines() if "FAIL" in line]
    return "\n".join([f"test-backend-ops: {len(passed_cases(printed))} cases right, {len(failed)} wrong", *failed[:20]])


def sanitize(work: Path, out: Path) -> str:
    """compute-sanitizer's summaries on every so manieth case."""
    program = work / "bin-patched/test-backend-ops"
    cases = passed_cases(run_tests([program], OPS, out / "ops.log"))
    lines = []
    for tool, step in (("memcheck", SANITIZED), ("racecheck", 3 * SANITIZED)):
        printed = run_tests(["compute-sanitizer", "--tool", tool, program], ",".join(cases[::step]), out / "sanitize.log")
        summaries = [line.strip("= ") for line in printed.splitlines() if "SUMMARY" in line] or ["no summary"]
        lines += [f"{tool}, {len(cases[::step])} cases: {s}" for s in summaries]
    return "\n".join(lines)


#
# profile
#


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    us: float


def launches(csv_text: str) -> list[Launch]:
    """Launches in order, from what `ncu --csv` prints of gpu__time_duration.sum."""
    rows = list(csv.reader(line for line in csv_text.splitlines() if line.startswith('"')))
    name, grid, value, unit = (rows[0].index(column) for column in ("Kernel Name", "Grid Size", "Metric Value", "Metric Unit"))
    factor = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
    return [
        Launch(
            row[name].replace("void ", "").split("(")[0],
            tuple(map(int, re.findall(r"\d+", row[grid]))),
            float(row[value].replace(",", "")) * factor[row[unit]],
        )
        for row in rows[1:]
    ]


def kernel_times(csv_text: str) -> dict[str, list[float]]:
    """Microseconds of each launch by kernel."""
    times: dict[str, list[float]] = {}
    for launch in launches(csv_text):
        times.setdefault(launch.kernel, []).append(launch.us)
    return times


def profile(work: Path, out: Path, wanted: Sequence[Variant]) -> str:
    """For one stock file, and for one tiered file of each mix: the kernels that take the most time, per layer and evaluation."""
    program, lines = work / "bin-patched/llama-bench", []
    for v in wanted:
        if v.tiered and v.copies != COPIES[1] and not v.rival:
            continue
        for test, options, evaluations in (("pp512", ["-p", "512", "-n", "0"], 1), ("tg", ["-p", "0", "-n", "4"], 4)):
            ncu = ["ncu", "--clock-control", "none", "--cache-control", "none", "--metrics", "gpu__time_duration.sum", "--csv"]
            command: list[str | Path] = [*ncu, program, "-m", file_of(v, work), "-ngl", "99", "-r", "1", "--no-warmup", *options]
            printed = run(command, out / "profile.log", env={"GGML_CUDA_DISABLE_GRAPHS": "1"})
            times = kernel_times(printed)
            total = sum(map(sum, times.values())) / evaluations
            launches = sum(map(len, times.values())) / evaluations
            lines.append(f"\n{key(v)}, {test}: {total:.0f} us in {launches:.0f} kernels\n")
            lines += ["| us | launches | us each | kernel |", "|---:|---:|---:|:---|"]
            for kernel, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:16]:
                row = (f"{sum(each) / evaluations:.1f}", f"{len(each) / evaluations:.1f}", f"{statistics.mean(each):.2f}", kernel[:100])
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def experts_times(csv_text: str, shape: Shape, evaluations: int) -> list[tuple[float, float]]:
    """Microseconds of a layer's (gate, up and GLU; down) in each of the last sets of that many evaluations, one set for each of PROFILED.

    Counted are launches that have a row of blocks for each expert used.
    """
    experts = [launch for launch in launches(csv_text) if launch.grid[1] == shape.n_used]
    is_down = [(launch.kernel, launch.grid[0]) == (experts[-1].kernel, experts[-1].grid[0]) for launch in experts]  # a layer's last
    ends = [i + 1 for i, down in enumerate(is_down) if down]
    n = evaluations * shape.n_layer
    bounds = [0, *ends][-len(PROFILED) * n - 1 :: n]
    times = []
    for first, last in itertools.pairwise(bounds):
        down = sum(launch.us for launch, d in zip(experts[first:last], is_down[first:last], strict=True) if d)
        times.append(((sum(launch.us for launch in experts[first:last]) - down) / n, down / n))
    return times


def profile_experts(shape: Shape, work: Path, out: Path, wanted: Sequence[Variant]) -> str:
    """A table: microseconds of a layer's expert multiplications by number of sequences."""
    program, generated = work / "bin-patched/llama-batched-bench", 4
    ncu = ["ncu", "--clock-control", "none", "--cache-control", "none", "-k", "regex:mul_mat_vec_(tiers|q_moe)"]
    rows = [["us", *(f"{n} seq, {part}" for n in PROFILED for part in ("gate+up", "down"))], ["---", *["---:"] * (2 * len(PROFILED))]]
    for v in wanted:
        command: list[str | Path] = [*ncu, "--metrics", "gpu__time_duration.sum", "--csv", program, "-m", file_of(v, work), "-ngl", "99"]
        options = ["-c", "256", "-npp", "1", "-ntg", str(generated), "-npl", ",".join(map(str, PROFILED))]
        printed = run([*command, *options], out / "profile.log", env={"GGML_CUDA_DISABLE_GRAPHS": "1"})
        times = experts_times(printed, shape, generated + 1)
        rows.append([key(v), *(f"{us:.2f}" for pair in times for us in pair)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


#
# speed
#


def shares(v: Variant, work: Path, out: Path) -> dict[str, float]:
    """Share of expert selections that each type of a file serves in decode."""
    counts = work / "counts.json"
    run(
        [work / "bin-patched/llama-bench", "-m", file_of(v, work), "-ngl", "99", "-p", "0", "-n", "64", "-r", "1"],
        out / "bench.log",
        env={"LLAMA_EXPERT_COUNTS": str(counts)},
    )
    served = dict.fromkeys(v.types, 0)
    for layer in json.loads(counts.read_text())["layers"]:
        for e, n in enumerate(layer["logical"]):
            served[v.types[e % len(v.types)]] += n
    return {t: n / sum(served.values()) for t, n in served.items()}


def file_speeds(
    programs: Path,
    file: Path,
    log: Path,
    repetitions: int,
    sequences: Sequence[int],
    *,
    bench: Sequence[str] = (),
    batched: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Tokens per second by test, of prompts and decode with numbers of sequences. bench, batched: further options of the two programs."""
    common: list[str | Path] = ["-m", file, "-ngl", "99"]
    options = ["-p", "512,2048", "-n", "128", "-r", str(repetitions), "-o", "json"]
    speeds = bench_speeds(run([programs / "llama-bench", *common, *options, *bench], log, env=env))
    printed = run([programs / "llama-batched-bench", *common, *batched_options(sequences, PROMPT, DECODED), *batched], log, env=env)
    return speeds | {f"{n} seq": speed for n, speed in batched_speeds(printed).items()}


@dataclass(frozen=True)
class Setting:
    """What is run alike for every file."""

    repetitions: int
    sequences: tuple[int, ...]
    servers: Mapping[str, Server] = field(default_factory=dict)
    """RPC servers by build, which then have the GPU."""


def bench_once(v: Variant, build_name: str, work: Path, out: Path, setting: Setting, gpu: int) -> dict[str, float]:
    """Tokens per second by test."""
    server = setting.servers.get(build_name)
    env = {"CUDA_VISIBLE_DEVICES": "" if server else str(gpu)}
    rpc = ("--rpc", server.endpoint, "-fa", "off") if server else ()  # a client takes a server for able to do anything
    programs, log = work / f"bin-{build_name}", out / f"bench-{gpu}.log"
    return file_speeds(programs, file_of(v, work), log, setting.repetitions, setting.sequences, bench=rpc, batched=rpc, env=env)


def medians(samples: Sequence[float]) -> NDArray[np.float64]:
    """The median, and after it those of RESAMPLED draws from the samples with replacement. Shape: [1 + RESAMPLED]."""
    drawn = DRAWS.choice(np.asarray(samples), (RESAMPLED, len(samples)))
    return np.concatenate([[np.median(samples)], np.median(drawn, axis=1)])


def expected(v: Variant, test: str, results: Mapping[str, Measured]) -> NDArray[np.float64]:
    """Speed that stock files give, their times weighted by the shares, or the rival's. Shape: as `medians`."""
    if v.rival:
        return medians(results[f"stock {v.rival}"].samples[test])
    if not v.tiered:
        return medians(results[key(v)].samples[test])
    times = [share / medians(results[f"stock {t}"].samples[test]) for t, share in results[key(v)].shares.items()]
    return np.asarray(1 / np.sum(times, axis=0))


def ratio(samples: Sequence[float], rival: NDArray[np.float64]) -> str:
    """Of medians, and its standard error."""
    ratios = medians(samples) / rival
    return f"{ratios[0]:.3f} ± {np.std(ratios[1:]):.3f}" if len(samples) > 1 else f"{ratios[0]:.3f}"


def key(v: Variant) -> str:
    return f"{v.name}, {v.copies} copies" if v.tiered else v.name


def table(wanted: Sequence[Variant], results: Mapping[str, Measured]) -> str:
    tests = in_order(results[key(wanted[0])].samples)
    rows = [["file", *tests], ["---"] * (len(tests) + 1)]
    for v in wanted:
        r = results[key(v)]
        cells = []
        for test in tests:
            told = f" ({ratio(r.samples[test], expected(v, test, results))})" if v.tiered else ""
            cells.append(f"{statistics.median(r.samples[test]):.0f}{told}")
        rows.append([key(v), *cells])
        same = results.get(f"{v.name}, patched build")
        if same:
            rows.append([f"{v.name}, patched build", *(f"({ratio(same.samples[t], expected(v, t, results))})" for t in tests)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def bench(shape: Shape, work: Path, out: Path, wanted: Sequence[Variant], rounds: int, setting: Setting, seconds: float, gpus: int) -> str:
    jobs = [(v, v.build, key(v)) for v in wanted] + [(v, "patched", f"{v.name}, patched build") for v in wanted if not v.tiered]
    results = {name: Measured() for _, _, name in jobs}
    for v in wanted:
        if v.tiered:
            results[key(v)].shares = shares(v, work, out) if len(v.types) > 1 and not v.rival else {v.types[0]: 1.0}
    record: dict[str, Any] = {"shape": asdict(shape), "results": {}}
    lock = threading.Lock()
    start = time.monotonic()

    def rounds_on(gpu: int) -> None:
        for done in range(rounds):
            if done and (time.monotonic() - start) * (done + 1) / done > seconds:
                print(f"GPU {gpu}: {done} rounds", file=sys.stderr)
                break
            for v, build_name, name in random.sample(jobs, len(jobs)):
                speeds = bench_once(v, build_name, work, out, setting, gpu)
                with lock:
                    for test, speed in speeds.items():
                        results[name].samples.setdefault(test, []).append(speed)
            with lock:
                record["results"] = {name: asdict(r) for name, r in results.items()}
                (out / "bench_cuda.json").write_text(json.dumps(record, indent=1))

    with concurrent.futures.ThreadPoolExecutor(gpus) as pool:
        list(pool.map(rounds_on, range(gpus)))
    return table(wanted, results)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path)
    p.add_argument("--patches", type=Path, default=Path(__file__).resolve().parents[1] / "patches")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path)
    p.add_argument("--steps", default=",".join(STEPS))
    p.add_argument("--arch", default="90")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--pure-stock", action="store_true")
    p.add_argument("--shape", choices=SHAPES, default="olmoe")
    p.add_argument("--layers", type=int)
    p.add_argument("--plan", action="append", default=[], metavar="PLAN.json=TYPE", help="also a file with a plan's types; may be repeated")
    p.add_argument("--only", help="starts of the names of tiered files to measure, separated by |, with the stock files that they need")
    p.add_argument("--rounds", type=int, default=5, help="on each GPU")
    p.add_argument("--repetitions", type=int, default=15, help="of llama-bench in a round; their median counts")
    p.add_argument("--sequences", default=",".join(map(str, SEQUENCES)), help="numbers of them in decode")
    p.add_argument("--gpus", type=int, default=1)
    p.add_argument("--rpc", action="store_true", help="the GPU is behind an RPC server")
    p.add_argument("--seconds", type=float, default=float("inf"), help="fewer rounds, so that they take no longer")
    args = p.parse_args()

    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    if args.layers:
        shape = Shape(**{**asdict(shape), "n_layer": args.layers})
    wanted = variants()
    for v in (plan_variant(text, shape) for text in args.plan):
        rival = Variant(f"stock {v.rival}", (v.rival,), tiered=False)
        wanted = [*([] if rival in wanted else [rival]), *wanted, v]
    if args.only:
        kept = [v for v in wanted if v.tiered and key(v).startswith(tuple(args.only.split("|")))]
        wanted = [v for v in wanted if not v.tiered and any(v.types[0] in (k.rival or k.types) for k in kept)] + kept

    steps = args.steps.split(",")
    if "build" in steps:
        build(args.source, args.patches, args.work, args.arch, args.jobs, args.pure_stock, out / "build.log")
    if "files" in steps:
        make_files(shape, args.work, wanted)
    if "ops" in steps:
        print(check_ops(args.work, out), flush=True)
    if "sanitize" in steps:
        print(sanitize(args.work, out), flush=True)
    if "profile" in steps:
        text = profile(args.work, out, wanted)
        (out / "profile.md").write_text(text + "\n")
        print(text, flush=True)
    if "experts" in steps:
        text = profile_experts(shape, args.work, out, wanted)
        (out / "experts.md").write_text(text + "\n")
        print(text, flush=True)
    if "bench" in steps:
        with contextlib.ExitStack() as stack:
            programs = {name: args.work / f"bin-{name}/ggml-rpc-server" for name in ("stock", "patched") if args.rpc}
            servers = {name: stack.enter_context(rpc_server(program)) for name, program in programs.items()}
            setting = Setting(args.repetitions, tuple(map(int, args.sequences.split(","))), servers)
            text = bench(shape, args.work, out, wanted, args.rounds, setting, args.seconds, args.gpus)
        (out / "bench_cuda.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
