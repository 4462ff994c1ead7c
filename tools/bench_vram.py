"""Busy experts in VRAM against stock's layout in the same VRAM, and the model of speed beside both.

    python tools/bench_vram.py FILE.gguf [FILE.gguf ...] --stock DIR --patched DIR [--parts 10,25,50,75,90] [--threads 16,8,4]
        [--prompts 512,2048] [--sequences 2,4,8] [--load-mode none] [--rounds 3] [--seconds 500] [--vram-bandwidth 2400] [--out DIR]

DIR: where llama-bench lies, and llama-batched-bench for --sequences. Files are stock GGUFs with routed experts (tools/skewed_model.py makes
some). For each part (per cent) of the experts' bytes: stock llama.cpp
with `--n-cpu-moe`, as many layers as leave that part in VRAM, and the patched one with LLAMA_EXPERT_VRAM; both also with nothing and with
all in VRAM. Rounds over everything in random order until about --seconds have passed (one at least); medians count.

Two points are taken to fit a hand-over and a time per byte on the CPU (stock with all layers on the CPU; busy experts at the part nearest
to 50 %), all others are predicted from these: docs/vram.md. With LLAMA_EXPERT_VRAM_OVERLAP=0 in the environment the CPU and the GPU are
taken to work one after the other, as they then do. Beside that stands what follows from the speeds that the runtime measured when
it loaded the model, with the layout that it chose and what was caught. Tables go to the terminal and to OUT/bench_vram.md, figures to
OUT/bench_vram.json, for each file and number of threads a machine for `rq-gguf plan --machine` to OUT/machine-FILE-THREADS.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np
from rounds import rounds_before

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rq_gguf.bench.printed import batched_options, batched_speeds, bench_speeds, in_order
from rq_gguf.format import parse_expert_name
from rq_gguf.gguf_file import read_headers
from rq_gguf.vram.speed import longer

OVERLAP = os.environ.get("LLAMA_EXPERT_VRAM_OVERLAP") != "0"
PROMPT, DECODED = 64, 128
"""Tokens of each sequence with llama-batched-bench."""
_HITS = re.compile(r"experts in fast memory took ([\d.]+) ?% of the selections in decoding")
_SPEEDS = re.compile(r"llama_hot: \S+: ram=([^,]+),vram=([^,]+),handover=([^,]+),layer=([^,]+),experts=([^,\s]+)")
_SPLIT = re.compile(r"experts in fast memory: \d+(?: to \d+)? of \d+ in each of (\d+) layers")
_WHOLE = re.compile(r"experts in fast memory: all in (\d+) layers, none")


@dataclass(frozen=True)
class Model:
    """What of a file decides its speed."""

    path: Path
    layers: int
    """With routed experts."""
    used: float
    """Part of a layer's experts that a token uses."""
    n_used: int
    """Experts of a layer that it uses."""
    expert_bytes: int
    other_bytes: int
    read_bytes: int
    """Of the others, what a token reads: of the embeddings one row."""
    blocks: int
    """Layers, those without experts too."""

    @property
    def layer_bytes(self) -> float:
        """Of a layer's experts, that a token reads."""
        return self.used * self.expert_bytes / self.layers

    def on_cpu(self, part: float) -> int:
        """Layers that stock's layout leaves to the CPU with a part of the experts in VRAM."""
        return round(self.layers * (1 - part))


def both(cpu: float, gpu: float, missed: float, n_used: int, always: float = 0.0) -> float:
    """Seconds of a layer's two parts, of which each takes so many in the mean. missed: part of the selections that is the CPU's; always:
    what the GPU's part takes besides."""
    return float(longer(np.array(cpu), np.array(gpu), np.array(missed), n_used, always)) if OVERLAP else cpu + always + gpu


@dataclass(frozen=True)
class Speeds:
    """What the runtime measured: bytes per second, seconds per layer."""

    ram: float
    vram: float
    handover: float
    layer: float
    experts: float
    """Seconds of a layer's experts on the GPU, beyond reading them."""

    def __str__(self) -> str:
        each = f"hand-over {1e6 * self.handover:.0f} us, {1e6 * self.layer:.0f} us for any layer, {1e6 * self.experts:.0f} us for experts"
        return f"RAM {self.ram / 1e9:.1f} GB/s, VRAM {self.vram / 1e9:.0f} GB/s, {each}"

    def decode(self, model: Model, split: int, whole: int, caught: float) -> float:
        """Tokens per second with the experts of `whole` layers in VRAM and of `split` layers a part `caught`; all others in RAM."""
        on_cpu = model.layers - split - whole
        cpu, gpu = model.layer_bytes / self.ram, model.layer_bytes / self.vram
        parts = both((1 - caught) * cpu, caught * gpu, 1 - caught, model.n_used, self.experts)
        experts = on_cpu * cpu + whole * (gpu + self.experts) + split * parts + (split + on_cpu) * self.handover
        return 1 / (model.read_bytes / self.vram + model.blocks * self.layer + experts)


@dataclass(frozen=True)
class Placed:
    """Layers by what the runtime chose."""

    split: int
    whole: int


@dataclass(frozen=True)
class Setting:
    model: Model
    threads: int
    part: float
    """Of the experts' bytes in VRAM."""
    ours: bool

    @property
    def on_cpu(self) -> int:
        """Layers, of stock's layout."""
        return self.model.on_cpu(self.part)


@dataclass
class Measured:
    speeds: dict[str, list[float]] = field(default_factory=dict)
    hits: list[float] = field(default_factory=list)
    found: list[Speeds] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)

    def median(self, test: str) -> float:
        return statistics.median(self.speeds[test])


@dataclass(frozen=True)
class Fit:
    """Seconds of a token."""

    base: float
    """With all experts in VRAM."""
    handover: float
    """Of a layer that the CPU has a part in."""
    cpu: float
    """Of a layer's experts on the CPU."""
    gpu: float
    """Of a layer's experts on the GPU, reading them."""
    always: float
    """The same besides reading."""
    n_used: int

    def stock(self, on_cpu: int) -> float:
        return self.base + on_cpu * (self.handover + self.cpu - self.gpu - self.always)

    def ours(self, layers: int, missed: float) -> float:
        parts = both(missed * self.cpu, (1 - missed) * self.gpu, missed, self.n_used, self.always)
        return self.base + layers * (self.handover + parts - self.gpu - self.always)


def fit(base: float, all_on_cpu: float, ours: float, layers: int, missed: float, gpu: float, always: float, n_used: int) -> Fit:
    """From seconds per token: all in VRAM, stock with all layers on the CPU, busy experts in VRAM with a part `missed`.

    gpu, always: as in Fit.
    """

    def saved(cpu: float) -> float:
        """Per layer, with so many seconds of all its experts on the CPU. Grows with them."""
        return cpu - both(missed * cpu, (1 - missed) * gpu, missed, n_used, always)

    wanted = (all_on_cpu - ours) / layers
    low, high = 0.0, (all_on_cpu + gpu) / (1 - missed)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) < wanted else (low, middle)
    return Fit(base, (all_on_cpu - base) / layers - (low - gpu - always), low, gpu, always, n_used)


def read_model(path: Path) -> Model:
    headers = read_headers(path)
    arch = headers[0].get("general.architecture")
    tensors = [t for h in headers for t in h.tensors.values()]
    experts = [t for t in tensors if parse_expert_name(t.name) is not None]
    layers = {parsed[0] for t in experts if (parsed := parse_expert_name(t.name)) is not None}
    n_used = headers[0].integer(f"{arch}.expert_used_count", 0)
    used = n_used / headers[0].integer(f"{arch}.expert_count", 1)
    size, sizes = sum(t.n_bytes for t in experts), {t.name: t.n_bytes for t in tensors}
    other = sum(sizes.values()) - size
    read = other - (sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0)
    return Model(path, len(layers), used, n_used, size, other, read, headers[0].integer(f"{arch}.block_count", len(layers)))


def run(s: Setting, programs: Path, name: str, options: list[str], log: Path) -> "subprocess.CompletedProcess[str]":
    """One of llama.cpp's programs as the setting wants it. Raises CalledProcessError."""
    command = [str(programs / name), "-m", str(s.model.path), "-t", str(s.threads), "-ngl", "99", *options]
    environment = {**os.environ, "LLAMA_ARG_THREADS": str(s.threads)}
    if not s.ours and s.on_cpu:
        command += ["-ncmoe", str(s.on_cpu)]
    if s.ours and s.part < 1:
        environment["LLAMA_EXPERT_VRAM"] = f"{100 * s.part:g}%"
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    with log.open("a", encoding="utf-8") as f:
        f.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done


def measure(s: Setting, programs: Path, prompts: str, sequences: list[int], load_mode: str, log: Path, into: Measured) -> None:
    """A run of llama-bench that decodes, so that no other test's prompts decide what is held, one for prompts, and one of
    llama-batched-bench where there are sequences. Raises CalledProcessError."""
    mode = ["-lm", load_mode]
    done = run(s, programs, "llama-bench", [*mode, "-v", "-p", "0", "-n", "128", "-r", "3", "-o", "json"], log)
    speeds = bench_speeds(done.stdout)
    if prompts:
        speeds |= bench_speeds(run(s, programs, "llama-bench", [*mode, "-p", prompts, "-n", "0", "-r", "2", "-o", "json"], log).stdout)
    if sequences:
        options = [*mode, "-fit", "off", *batched_options(sequences, PROMPT, DECODED)]
        printed = run(s, programs, "llama-batched-bench", options, log).stdout
        speeds |= {f"{n} seq": speed for n, speed in batched_speeds(printed).items()}
    for test, speed in speeds.items():
        into.speeds.setdefault(test, []).append(speed)
    if s.ours:
        into.found += [Speeds(*(float(x) for x in f)) for f in _SPEEDS.findall(done.stderr)]
        split = [Placed(int(n), s.model.layers - int(n)) for n in _SPLIT.findall(done.stderr)]
        into.placed += split + [Placed(0, int(n)) for n in _WHOLE.findall(done.stderr)]
    into.hits += [share for share in (float(h) / 100 for h in _HITS.findall(done.stderr)) if share > 0]


def table(
    model: Model, threads: int, parts: list[float], results: dict[Setting, Measured], vram_bandwidth: float
) -> tuple[list[str], Fit | None]:
    """Rows by part; and the fit, where the runtime said what was hit. vram_bandwidth: bytes per second."""

    def of(part: float, ours: bool) -> Measured:
        return results[Setting(model, threads, part, ours)]

    def missed(part: float) -> float | None:
        if part in (0, 1):
            return 1 - part
        return 1 - statistics.median(of(part, True).hits) if of(part, True).hits else None

    inner = [p for p in parts if 0 < p < 1]
    taken = min(inner, key=lambda p: abs(p - 0.5)) if inner else None
    found, left = None, None if taken is None else missed(taken)
    speeds = typical([f for s, r in results.items() if (s.model, s.threads) == (model, threads) for f in r.found])
    if taken is not None and left is not None and left < 1 and {0.0, 1.0} <= set(parts):
        base, cpu, split = (1 / of(p, ours).median("tg128") for p, ours in ((1.0, False), (0.0, False), (taken, True)))
        always = speeds.experts if speeds else 0.0
        found = fit(base, cpu, split, model.layers, left, model.layer_bytes / vram_bandwidth, always, model.n_used)
    tests = in_order(of(parts[0], False).speeds)
    head = ["in VRAM", "caught", *(f"{t}: stock, ours" for t in tests)]
    head += ["predicted tg128: stock, ours", "by the runtime's speeds: layout, stock, ours"]
    lines = [f"{model.path.name}, {threads} threads", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for part in parts:
        stock, ours, left = of(part, False), of(part, True), missed(part)
        row = [f"{100 * part:g} %", "-" if left is None else f"{100 * (1 - left):.0f} %"]
        row += [f"{stock.median(t):.1f}, {ours.median(t):.1f} ({ours.median(t) / stock.median(t):.2f}x)" for t in tests]
        if found is None or left is None:
            row.append("-")
        else:
            on_cpu = model.on_cpu(part)
            expected = 1 / found.stock(on_cpu), 1 / (found.ours(model.layers, left) if part < 1 else found.base)
            over = [e / of_it.median("tg128") for e, of_it in zip(expected, (stock, ours), strict=True)]
            fitted = ["fitted" if part in (0, 1) else f"{over[0]:.2f}", "fitted" if part in (taken, 1) else f"{over[1]:.2f}"]
            row.append(", ".join(f"{e:.1f} ({f})" for e, f in zip(expected, fitted, strict=True)))
        row.append(by_runtime(model, part, stock, ours, speeds))
        lines.append("| " + " | ".join(row) + " |")
    return lines, found


def typical(said: list[Speeds]) -> Speeds | None:
    """Medians; None where nothing was said."""
    return Speeds(*map(statistics.median, zip(*map(astuple, said), strict=True))) if said else None


def by_runtime(model: Model, part: float, stock: Measured, ours: Measured, speeds: Speeds | None) -> str:
    """A cell: whole and split layers, then tokens per second predicted and over those measured. speeds: by all runs on the model."""
    whole = model.layers - model.on_cpu(part)
    placed = ours.placed[0] if ours.placed else Placed(0, whole) if part in (0, 1) else None
    if speeds is None or placed is None:
        return "-"
    caught = statistics.median(ours.hits) if ours.hits else 0.0
    expected = speeds.decode(model, 0, whole, 0.0), speeds.decode(model, placed.split, placed.whole, caught)
    cells = [f"{e:.1f} ({e / m.median('tg128'):.2f})" for e, m in zip(expected, (stock, ours), strict=True)]
    return f"{placed.whole} whole, {placed.split} split, " + ", ".join(cells)


def machine(model: Model, found: Fit, vram_bandwidth: float, prompt: float, prompt_on_cpu: float) -> dict[str, float | bool]:
    """A file for `--machine`. prompt, prompt_on_cpu: seconds of 512 tokens with all experts in VRAM and with none.

    One file cannot tell the GPU's bandwidth from its time per layer, so the bandwidth is given.
    """
    read = model.other_bytes + model.used * model.expert_bytes
    layers = found.base - read / vram_bandwidth - model.layers * found.always
    return {
        "ram_bandwidth": model.layer_bytes / found.cpu,
        "vram_bandwidth": vram_bandwidth,
        "handover": max(found.handover, 0.0),
        "pcie_bandwidth": model.expert_bytes / max(prompt_on_cpu - prompt, 1e-6),
        "compute": 2 * 512 * read / prompt,  # about one byte a weight
        "gpu_layer": max(layers, 0.0) / model.layers,
        "gpu_experts": found.always,
        "overlap": OVERLAP,
    }


def main() -> None:
    started = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="+")
    p.add_argument("--stock", type=Path, required=True)
    p.add_argument("--patched", type=Path, required=True)
    p.add_argument("--parts", default="10,25,50,75,90")
    p.add_argument("--no-ends", action="store_true", help="not 0 and 100 %, from which all else would be predicted")
    p.add_argument("--threads", default=str(os.cpu_count() or 1))
    p.add_argument("--prompts", default="512,2048", help="their tokens")
    p.add_argument("--sequences", default="", help="numbers of them to decode at a time, besides one")
    p.add_argument("--load-mode", default="auto", help="llama.cpp's; with `none` experts go up from pinned memory (default auto: mmap)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=500)
    p.add_argument("--vram-bandwidth", type=float, default=2400, help="GB/s that the GPU's weights are read at (default 2400)")
    p.add_argument("--out", type=Path, default=Path("."))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = sorted({float(x) / 100 for x in args.parts.split(",")} | (set() if args.no_ends else {0.0, 1.0}))
    models, threads = [read_model(f) for f in args.files], [int(t) for t in args.threads.split(",")]
    sequences = [int(n) for n in args.sequences.split(",") if n]
    settings = [Setting(m, t, part, ours) for m in models for t in threads for part in parts for ours in (False, True)]
    results = {s: Measured() for s in settings}
    for _ in rounds_before(started + args.seconds, args.rounds):
        for s in random.sample(settings, len(settings)):
            measure(
                s, args.patched if s.ours else args.stock, args.prompts, sequences, args.load_mode, args.out / "bench_vram.log", results[s]
            )
        data = [
            {"file": s.model.path.name, "threads": s.threads, "part": s.part, "ours": s.ours, "hits": r.hits, **r.speeds}
            | {"found": [asdict(f) for f in r.found], "placed": [asdict(f) for f in r.placed]}
            for s, r in results.items()
        ]
        (args.out / "bench_vram.json").write_text(json.dumps(data, indent=1))
    text = []
    for m in models:
        for t in threads:
            lines, found = table(m, t, parts, results, 1e9 * args.vram_bandwidth)
            text += [*lines, ""]
            if found is not None:
                text += [
                    f"hand-over {1e6 * found.handover:.0f} us, a layer's experts {1e6 * (found.cpu - found.gpu):.0f} us longer on the CPU",
                    "",
                ]
            if found is not None and "512" in args.prompts.split(","):
                prompt, on_cpu = (512 / results[Setting(m, t, part, False)].median("pp512") for part in (1.0, 0.0))
                made = machine(m, found, 1e9 * args.vram_bandwidth, prompt, on_cpu)
                (args.out / f"machine-{m.path.stem}-{t}.json").write_text(json.dumps(made, indent=1) + "\n")
            for said in [f for s, r in results.items() if (s.model, s.threads) == (m, t) for f in r.found][:1]:
                text += [f"the runtime's speeds: {said}", ""]
    (args.out / "bench_vram.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
