"""Speed of tiered files on the CPU against stock files, with llama-bench, interleaved in one run.

    python tools/bench_cpu.py MODEL [--rounds 20] [--threads 2] [--repetitions 3] [--processor-time] [--rpc] [--json FILE]

MODEL: a Hugging Face directory (`rq_gguf/data/demo`) or a GGUF in F16, BF16 or F32. Needs `rq-gguf runtime install`, with and without
`--unpatched`. Makes stock files with all experts in Q8_0 and in Q4_K (llama-quantize), tiered files with the same bits in one tier, and
one in which every other expert is Q8_0 and the rest Q4_K. In each round every file runs pp512 and tg64 once, in random order.
Ratios are medians over rounds of the two figures of the same round: shared cores drift, and neighbours in time drift together.
On a machine that does other work use --threads 1 and many rounds: with more threads, each waits for the one that was set aside.
The mixed file is compared with the speed that the unpatched build's two times give, weighted by the share of expert selections that each
type serves in the mixed file's own run (counted by the patched llama.cpp): where half of the selections take 1 ms and half 3, 2 ms.
--processor-time: seconds of processor instead of the clock's, with one thread: what others do on the machine counts less.
--rpc: all layers are on an RPC server on this machine, of the same build as the client.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench_write import plan_for, random_calibration
from tqdm import tqdm

from rq_gguf.bench.printed import bench_speeds
from rq_gguf.bench.spread import ratio
from rq_gguf.calibration.file import write_calibration
from rq_gguf.evaluation.balance import COUNTS_VARIABLE, read_counts
from rq_gguf.ggml import Ggml
from rq_gguf.runtime.rpc import Server, rpc_server
from rq_gguf.runtime.tools import library_path, run_tool, tool_path
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model

TYPES = ("q8_0", "q4_k")
TESTS = {"pp512": ["-p", "512", "-n", "0"], "tg64": ["-p", "0", "-n", "64"]}


@dataclass(frozen=True)
class Variant:
    """A file and the build that runs it."""

    name: str
    file: Path
    unpatched: bool
    server: Server | None = None
    """The RPC server that holds all layers."""


def make_files(model: Path, folder: Path, threads: int) -> list[Variant]:
    """All variants: stock files on both builds, tiered files on the patched one."""
    base = model
    if model.is_dir():
        base = folder / "base.gguf"
        convert_base(model, base)
    imatrix, variants = folder / "imatrix.gguf", []
    with Source(base) as source:
        calibration = random_calibration(source)
        write_calibration(imatrix, calibration)
        for name in TYPES:
            stock = folder / f"stock-{name}.gguf"
            run_tool(["llama-quantize", "--imatrix", imatrix, "--tensor-type", f"_exps={name}", base, stock, "Q8_0", str(threads)])
            variants += [Variant(f"stock {name}", stock, True), Variant(f"stock {name}, patched build", stock, False)]
        for label, types in {**{f"tiered {name}": (name,) for name in TYPES}, "tiered half": TYPES}.items():
            file = folder / f"{label.replace(' ', '-')}.gguf"
            write_model(base, plan_for(source, types, False), calibration, file, ggml=Ggml(library_path()), threads=threads)
            variants.append(Variant(label, file, False))
    return variants


def run_bench(v: Variant, test: str, threads: int, repetitions: int, counts: Path | None = None) -> float:
    """Tokens per second, the median of the repetitions."""
    command: list[str | Path] = ["llama-bench", "-m", v.file, *TESTS[test], "-t", str(threads), "-r", str(repetitions), "-o", "json"]
    command += ["--rpc", v.server.endpoint, "-ngl", "99"] if v.server else []
    printed = run_tool(command, unpatched=v.unpatched, env={COUNTS_VARIABLE: str(counts)} if counts else None)
    return bench_speeds(printed.stdout)[test]


def processor_seconds(v: Variant) -> float:
    """What the programs that this one ran have taken so far, and the file's server."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    if v.server:
        fields = Path(f"/proc/{v.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def bench(v: Variant, test: str, threads: int, repetitions: int, processor_time: bool) -> float:
    """Tokens per second; with processor_time, of processor: a run with more repetitions less one with one, so that loading drops out."""
    if not processor_time:
        return run_bench(v, test, threads, repetitions)
    took = []
    for n in (1, 1 + repetitions):
        before = processor_seconds(v)
        run_bench(v, test, threads, n)
        took.append(processor_seconds(v) - before)
    return repetitions * int(test[2:]) / (took[1] - took[0])


def shares(v: Variant, test: str, threads: int, folder: Path) -> list[float]:
    """Share of expert selections that each of TYPES serves; `plan_for` gives experts the types in turns."""
    counts = folder / "counts.json"
    run_bench(v, test, threads, 1, counts)
    layers = read_counts(counts).layers
    served = [sum(int(c.logical[k :: len(TYPES)].sum()) for c in layers) for k in range(len(TYPES))]
    return [n / sum(served) for n in served]


def rounds(variants: list[Variant], n: int, threads: int, repetitions: int, processor_time: bool) -> dict[tuple[str, str], list[float]]:
    """(variant, test) -> a speed per round."""
    found: dict[tuple[str, str], list[float]] = {(v.name, test): [] for v in variants for test in TESTS}
    order = random.Random(0)
    for _ in tqdm(range(n), desc="rounds"):
        for v in order.sample(variants, len(variants)):
            for test in TESTS:
                found[v.name, test].append(bench(v, test, threads, repetitions, processor_time))
    return found


def ratios(found: dict[tuple[str, str], list[float]], share: dict[str, list[float]]) -> Iterator[tuple[str, str, list[float], list[float]]]:
    """(variant, test, its speeds, what they are compared with)."""
    for test in TESTS:
        for name in TYPES:
            stock = found[f"stock {name}", test]
            yield f"stock {name}, patched build", test, found[f"stock {name}, patched build", test], stock
            yield f"tiered {name}", test, found[f"tiered {name}", test], stock
        both = zip(*(found[f"stock {name}", test] for name in TYPES), strict=True)
        mean = [1 / sum(w / speed for w, speed in zip(share[test], pair, strict=True)) for pair in both]
        yield "tiered half", test, found["tiered half", test], mean


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="of each test in each round")
    parser.add_argument("--processor-time", action="store_true", help="tokens per second of processor; with --threads 1, on Linux")
    parser.add_argument("--rpc", action="store_true", help="all layers on a server on this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time needs --threads 1: with more, threads that wait for each other take time as well")
    with tempfile.TemporaryDirectory(prefix="rq-gguf-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        variants = make_files(args.model, folder, args.threads)
        share = {test: shares(variants[-1], test, args.threads, folder) for test in TESTS}
        if args.rpc:
            servers = [rpc_server(tool_path("ggml-rpc-server", unpatched), threads=args.threads) for unpatched in (False, True)]
            up = [stack.enter_context(server) for server in servers]
            variants = [replace(v, server=up[v.unpatched]) for v in variants]
        found = rounds(variants, args.rounds, args.threads, args.repetitions, args.processor_time)
    print(f"{args.model.name}, {args.threads} threads, median of {args.rounds} rounds of {args.repetitions}, t/s")
    for test in TESTS:
        print(f"{test}: in the mixed file " + ", ".join(f"{w:.0%} of selections in {t}" for w, t in zip(share[test], TYPES, strict=True)))
    print("\n| file | test | t/s | stock, unpatched | ratio | quartiles |\n|:---|:---|---:|---:|---:|---:|")
    for variant, test, ours, theirs in ratios(found, share):
        r, medians = ratio(ours, theirs), [statistics.median(x) for x in (ours, theirs)]
        assert r is not None  # one round at least
        print(f"| {variant} | {test} | {medians[0]:.0f} | {medians[1]:.0f} | {r.median:.3f} | {r.low:.2f} to {r.high:.2f} |")
    if args.json:
        figures = [{"file": v, "test": test, "t/s": speeds} for (v, test), speeds in found.items()]
        args.json.write_text(json.dumps({"shares": share, "rounds": figures}, indent=2))


if __name__ == "__main__":
    main()
