"""Experts by device (`rq.devices`) against layers by device (`-sm layer`) and against one device, of the same files.

    python tools/bench_by_device.py --work DIR [--shapes olmoe:6,qwen3-235b:2] [--devices CUDA0,CUDA1] [--seconds 120]
        [--model FILE.gguf --text HELDOUT.txt] [--steps check,bench,profile]

DIR: where `tools/bench_cuda.py SOURCE --work DIR --steps build` left bin-patched; files that lack are written. Devices may be servers:
`--rpc HOST:PORT,HOST:PORT --devices RPC0,RPC1`.

check    logits of a real FILE with experts by device against one device, in prompts and decode of 1 and 8, counts of experts, and the
         busiest device's selections over the mean: as in stock order, and as packed
bench    rounds over all files and ways in random order (one device in the first alone): llama-bench for tg128, pp512 and pp2048,
         llama-batched-bench for decode of 2 to 128 sequences. A file's ratio is its speed over that of `-sm layer`
profile  decode of 8 and 32 sequences: splits of the graph; with `--trace LIB.so`, made of tools/cuda_trace.cpp, how long each device was
         busy, how long both, what copies took and which kernels
Figures go to OUT/by_device.json, tables to the terminal and to OUT/by_device.md.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_cuda import SHAPES, Shape, Variant, file_of, file_speeds, key, make_files, variants
from bench_devices import SEQUENCES, Place
from check_cuda import Programs
from rounds import rounds_before

WAYS = ("one", "layers", "experts", "experts, home 0")
"""One device; layers by device; experts by device, all else layers by device; experts by device, all else on the first."""
TESTS = ("tg128", *(f"{n} seq" for n in SEQUENCES), "pp512", "pp2048")
FILES = ("stock Q8_0", "half Q8_0, half Q4_K, 4 copies")
STEPS = ("check", "bench", "profile")
BATCHES: dict[str, list[str]] = {"prompts": [], **{f"decode of {n}": ["-b", str(n), "-ub", str(n)] for n in (1, 8)}}
CHUNKS = 4
"""Of 512 tokens, that check reads."""
PROFILED = {"8 seq": ["-npp", "16", "-ntg", "16", "-npl", "8"], "32 seq": ["-npp", "16", "-ntg", "16", "-npl", "32"]}
PEER = {"GGML_CUDA_P2P": "1"}
"""Devices write into each other's memory without the host's."""


@dataclass(frozen=True)
class Setting:
    """What runs a file."""

    way: str
    place: Place
    peer: bool

    @property
    def env(self) -> dict[str, str]:
        return (PEER if self.peer else {}) | ({"LLAMA_EXPERT_DEVICES": "all"} if self.way.startswith("experts") else {})

    def options(self, separator: str = ",") -> list[str]:
        """Of llama.cpp's programs; separator as for Place."""
        first = ["-ts", separator.join(["1", *["0"] * (len(self.place.devices) - 1)])]
        return self.place.options(separator) + (first if self.way.endswith("home 0") else [])


def settings(place: Place, peer: bool) -> list[Setting]:
    return [Setting(way, Place(place.devices[:1], place.rpc) if way == "one" else place, peer) for way in WAYS]


#
# check
#


def device_lis(layers: Sequence[dict[str, list[int]]], n_devices: int) -> tuple[float, float]:
    """The busiest device's selections over the mean, (stock order, as packed), mean over layers."""
    found = []
    for layer in layers:
        n = len(layer["logical"])
        loads = [[0] * n_devices, [0] * n_devices]
        for e, served in enumerate(layer["logical"]):
            loads[0][e * n_devices // n] += served
        for device, served in zip(layer["device"], layer["physical"], strict=True):
            loads[1][device] += served
        found.append([max(v) * n_devices / sum(v) for v in loads])
    before, after = (statistics.mean(v) for v in zip(*found, strict=True))
    return before, after


def check_rows(file: Path, text: Path, work: Path, out: Path, ways: Sequence[Setting]) -> Iterator[str]:
    programs = Programs(work / "bin-patched", text, CHUNKS)
    one, _, experts, _ = ways
    logits, counts = out / "logits-one.bin", (out / "counts-one.json", out / "counts.json")
    block = ["--override-kv", "rq.dispatch_block=int:1", "--kl-divergence-base", str(logits)]
    for name, batch in BATCHES.items():
        options = ["-ngl", "99", *batch, *block]
        programs.perplexity(file, [*options, *one.place.options()], one.env | {"LLAMA_EXPERT_COUNTS": str(counts[0])})
        printed = programs.perplexity(
            file, [*options, "--kl-divergence", *experts.place.options()], experts.env | {"LLAMA_EXPERT_COUNTS": str(counts[1])}
        )
        found = [re.search(rf"{what}: +(.*)", printed) for what in ("Mean +KLD", "Maximum KLD", "Same top p")]
        whole, layers = (json.loads(path.read_text())["layers"] for path in counts)
        differ = sum(abs(a - b) for w, x in zip(whole, layers, strict=True) for a, b in zip(w["physical"], x["physical"], strict=True))
        share = differ / 2 / sum(sum(w["physical"]) for w in whole)
        before, after = device_lis(layers, len(experts.place.devices))
        told = " | ".join(m[1].strip() if m else "?" for m in found)
        yield f"| {file.name}, {name} | {told} | {100 * share:.3f} | {before:.3f} | {after:.3f} |"
    for path in (logits, *counts):
        path.unlink()


#
# bench
#


def table(names: Sequence[str], samples: dict[str, dict[str, list[float]]]) -> str:
    """Median speeds; with experts by device also over `-sm layer`'s."""
    rows = [["file", "by", *TESTS], ["---", "---", *["---:"] * len(TESTS)]]
    for name in names:
        medians = {way: {t: statistics.median(samples[f"{name}; {way}"][t]) for t in TESTS} for way in WAYS}
        for way in WAYS:
            told = [f" ({medians[way][t] / medians['layers'][t]:.3f})" if way != "layers" else "" for t in TESTS]
            rows.append([name, way, *(f"{medians[way][t]:.0f}{ratio}" for t, ratio in zip(TESTS, told, strict=True))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def bench(files: dict[str, Path], work: Path, out: Path, ways: Sequence[Setting], rounds: int, repetitions: int, end: float) -> str:
    """The table. At least one round, and no other that would end after `end` (of time.monotonic)."""
    samples: dict[str, dict[str, list[float]]] = {f"{name}; {way}": {} for name in files for way in WAYS}
    n = 0
    for n in rounds_before(end, rounds):
        jobs = [(name, s) for name in files for s in ways[n > 0 :]]
        for name, s in random.sample(jobs, len(jobs)):
            programs, log, bench_options, options = work / "bin-patched", out / "by_device.log", s.options("/"), s.options()
            speeds = file_speeds(programs, files[name], log, repetitions, SEQUENCES, bench=bench_options, batched=options, env=s.env)
            for test, speed in speeds.items():
                samples[f"{name}; {s.way}"].setdefault(test, []).append(speed)
        (out / "by_device.json").write_text(json.dumps(samples, indent=1))
    return f"{', '.join(ways[-1].place.devices)}, {n + 1} rounds, medians; over layers by device\n\n{table(list(files), samples)}"


#
# profile
#


def run(words: Sequence[str | Path], log: Path, env: dict[str, str]) -> str:
    """All that a program prints; "" where it fails."""
    done = subprocess.run([str(w) for w in words], env=os.environ | env, capture_output=True, text=True, errors="replace")
    with log.open("a", encoding="utf-8") as f:
        f.write(f"$ {' '.join(map(str, words))}\n{done.stdout}{done.stderr}\n")
    return done.stdout + done.stderr if done.returncode == 0 else ""


def kernels_told(lines: Sequence[Sequence[str]], n: int = 6) -> Iterator[str]:
    """The kernels that take the most time on each device, of a trace's lines."""
    sums: dict[str, dict[str, int]] = {}
    for line in lines:
        if line[0] == "K":
            of = sums.setdefault(line[1], {})
            kernel = re.sub(r"^_Z\w*?\d+|[<(].*", "", line[4])[:40]
            of[kernel] = of.get(kernel, 0) + int(line[3]) - int(line[2])
    for device, of in sorted(sums.items()):
        most = sorted(of.items(), key=lambda item: -item[1])[:n]
        yield f"device {device}: {sum(of.values()) / 1e3:.0f} us: " + ", ".join(f"{kernel} {ns / 1e3:.0f}" for kernel, ns in most)


def busy(trace: Path, last: float) -> str:
    """Of tools/cuda_trace.cpp's records: in the last `last` seconds, how long each device, both and none computed, and the copies.

    Lines before that are dropped from the file.
    """
    read = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.split(" ", 4 if line.startswith("K") else -1) for line in read]
    kernels = [(int(line[2]), int(line[3]), int(line[1])) for line in lines if line[0] == "K"]
    copies = [(int(line[3]), int(line[4]), line[1] != line[2]) for line in lines if line[0] == "C"]
    if not kernels:
        return "no kernels were seen"
    stop = max(end for _, end, _ in kernels)
    begin = stop - int(last * 1e9)
    kept = [line for line in lines if int(line[2 if line[0] == "K" else 3]) >= begin]
    kept.sort(key=lambda line: int(line[2 if line[0] == "K" else 3]))
    trace.write_text("\n".join(" ".join(line) for line in kept) + "\n", encoding="utf-8")
    edges = sorted(edge for start, end, d in kernels if end > begin for edge in ((max(start, begin), 1, d), (end, -1, d)))
    depth: dict[int, int] = {}
    times: dict[str, int] = {}
    before = begin
    for at, step, device in edges:
        name = "+".join(str(d) for d in sorted(depth) if depth[d]) or "none"
        times[name] = times.get(name, 0) + at - before
        depth[device], before = depth.get(device, 0) + step, at
    shares = ", ".join(f"{name} {100 * ns / (stop - begin):.1f} %" for name, ns in sorted(times.items()))
    peer = [end - start for start, end, between in copies if between and start > begin]
    each = f"; {len(peer)} copies between devices, {statistics.median(peer) / 1e3:.1f} us in the median" if peer else ""
    return "\n".join([f"devices that compute in {1e3 * last:.0f} ms: {shares}{each}", *kernels_told(kept)])


def profile(files: dict[str, Path], work: Path, out: Path, ways: Sequence[Setting], library: Path | None) -> Iterator[str]:
    program, log = work / "bin-patched/llama-batched-bench", out / "profile.log"
    for name, file in files.items():
        for s in ways:
            for test, options in PROFILED.items():
                words: list[str | Path] = [program, "-m", file, "-ngl", "99", "-c", "8192", *options, *s.options()]
                trace = out / f"trace-{len(list(out.glob('trace-*')))}.txt"
                traced = {"CUDA_INJECTION64_PATH": str(library), "TRACE_FILE": str(trace)} if library else {}
                splits = re.findall(r"splits = (.*?),", run([*words, "-v"], log, s.env | traced))
                told = busy(trace, 0.02) if trace.exists() else "no trace"
                yield f"\n{name}; {s.way}, {test}: {', '.join(splits)} splits ({trace.name})\n{told}"


def chosen(text: str) -> Iterator[tuple[str, Shape]]:
    """olmoe:6 -> (olmoe, its shape with 6 layers)."""
    for word in text.split(","):
        name, _, layers = word.partition(":")
        shape = SHAPES[name]
        yield name, Shape(**asdict(shape) | {"n_layer": int(layers)}) if layers else shape


def main() -> None:
    started = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path)
    Place.add_options(p)
    p.add_argument("--shapes", default="olmoe:6,qwen3-235b:2", help="names of tools/bench_cuda.py with numbers of layers")
    p.add_argument(
        "--files", default="|".join(FILES), help="names of files, separated by |; of the first shape, of others the first file alone"
    )
    p.add_argument("--model", type=Path, action="append", default=[], metavar="FILE.gguf", help="a real one, for check; may be repeated")
    p.add_argument("--text", type=Path)
    p.add_argument("--no-peer", action="store_true", help="copies between devices go through the host's memory")
    p.add_argument("--trace", type=Path, metavar="LIB.so")
    p.add_argument("--steps", default=",".join(STEPS))
    p.add_argument("--rounds", type=int, default=8, help="at most")
    p.add_argument("--repetitions", type=int, default=3, help="of llama-bench in a round; their median counts")
    p.add_argument("--seconds", type=float, default=120, help="for check and bench")
    args = p.parse_args()
    steps = args.steps.split(",")
    if "check" in steps and not (args.model and args.text):
        p.error("check needs --model and --text")

    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    place = Place.of(args)
    ways = settings(place, not args.no_peer)
    wanted: list[Variant] = [v for v in variants() if key(v) in args.files.split("|")]
    files: dict[str, Path] = {}
    for name, shape in chosen(args.shapes):
        some = wanted[: 1 if files else None]
        folder = args.work / f"{name}-{shape.n_layer}"
        make_files(shape, folder, some)
        files |= {f"{name}, {key(v)}": file_of(v, folder) for v in some}
    print(f"files: {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()

    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        (out / "by_device.md").write_text("\n".join(lines) + "\n")

    if "check" in steps:
        say("| experts by device against one device | mean KLD | maximum | Same top p, % | other choices, % | LIS, stock order | packed |")
        say("|:---|---:|---:|---:|---:|---:|---:|")
        for model in args.model:
            for row in check_rows(model, args.text, args.work, out, ways):
                say(row)
    if "bench" in steps:
        say("\n" + bench(files, args.work, out, ways, args.rounds, args.repetitions, started + args.seconds))
    if "profile" in steps:
        for line in profile(files, args.work, out, ways, args.trace):
            say(line)
    say(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
