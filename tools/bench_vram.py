"""Busy experts in VRAM against stock's layout in the same VRAM, and the model of speed beside both.

    python tools/bench_vram.py FILE.gguf [FILE.gguf ...] --stock DIR --patched DIR [--parts 10,25,50,75,90] [--threads 16,8,4]
        [--prompts 512,2048] [--sequences 2,4,8] [--load-mode none] [--rounds 3] [--seconds 500] [--out DIR]

DIR: where llama-bench lies, and llama-batched-bench for --sequences. Files are stock GGUFs with routed experts (tools/skewed_model.py makes
some). For each part (per cent) of the experts' bytes: stock llama.cpp with `--n-cpu-moe`, as many layers as leave about that part in VRAM,
and the patched one with LLAMA_EXPERT_VRAM for as many bytes as those layers have; both also with nothing and with all in VRAM. Rounds over
everything in random order until about --seconds have passed (one at least); medians count.

Beside that stands what the model of speed (docs/vram.md) predicts from the speeds that the runtime measured when it loaded the model, with
the layout that it chose and what was caught; with LLAMA_EXPERT_VRAM_OVERLAP=0 in the environment the CPU and the GPU are taken to work one
after the other, as they then do. Tables go to the terminal and to OUT/bench_vram.md, figures to OUT/bench_vram.json, and for each file
and number of threads, with both ends and a prompt of 512, a machine for `rq-gguf plan --machine` to OUT/machine-FILE-THREADS.json.
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
_SPEEDS = re.compile(r"llama_hot: \S+: ram=([^,]+),vram=([^,]+),handover=([^,]+),layer=([^,]+),experts=([^,\s]+),whole=([^,\s]+)")
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
        """Layers that stock's layout leaves to the CPU with about a part of the experts in VRAM; some and not all of a part between."""
        some = round(self.layers * (1 - part))
        return some if part in (0, 1) else max(min(some, self.layers - 1), 1)

    def held(self, part: float) -> float:
        """Of the experts' bytes, that stock's layout then has in VRAM: whole layers of them."""
        return 1 - self.on_cpu(part) / self.layers


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
    whole: float
    """A hand-over of a layer whose experts are all the CPU's."""

    def __str__(self) -> str:
        each = f"hand-over {1e6 * self.handover:.0f} us, of a layer that is all the CPU's {1e6 * self.whole:.0f} us, "
        each += f"{1e6 * self.layer:.0f} us for any layer, {1e6 * self.experts:.0f} us for experts"
        return f"RAM {self.ram / 1e9:.1f} GB/s, VRAM {self.vram / 1e9:.0f} GB/s, {each}"

    def decode(self, model: Model, split: int, whole: int, caught: float) -> float:
        """Tokens per second with the experts of `whole` layers in VRAM and of `split` layers a part `caught`; all others in RAM."""
        on_cpu = model.layers - split - whole
        cpu, gpu = model.layer_bytes / self.ram, model.layer_bytes / self.vram
        parts = both((1 - caught) * cpu, caught * gpu, 1 - caught, model.n_used, self.experts)
        experts = on_cpu * (max(self.whole, self.handover) + cpu) + split * (self.handover + parts) + whole * (self.experts + gpu)
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
        environment["LLAMA_EXPERT_VRAM"] = f"{100 * s.model.held(s.part):g}%"  # as many bytes as stock's layout
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


def table(model: Model, threads: int, parts: list[float], results: dict[Setting, Measured], speeds: Speeds | None) -> list[str]:
    """Rows by part. speeds: by all runs on the model."""

    def of(part: float, ours: bool) -> Measured:
        return results[Setting(model, threads, part, ours)]

    tests = in_order(of(parts[0], False).speeds)
    head = ["in VRAM", "caught", *(f"{t}: stock, ours" for t in tests), "predicted tg128: layout, stock, ours"]
    lines = [f"{model.path.name}, {threads} threads", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for part in parts:
        stock, ours = of(part, False), of(part, True)
        caught = part if part in (0, 1) else statistics.median(ours.hits) if ours.hits else None
        row = [f"{100 * model.held(part):.3g} %", "-" if caught is None else f"{100 * caught:.0f} %"]
        row += [f"{stock.median(t):.1f}, {ours.median(t):.1f} ({ours.median(t) / stock.median(t):.2f}x)" for t in tests]
        lines.append("| " + " | ".join([*row, predicted(model, part, stock, ours, speeds)]) + " |")
    return lines


def typical(said: list[Speeds]) -> Speeds | None:
    """Medians; None where nothing was said."""
    return Speeds(*map(statistics.median, zip(*map(astuple, said), strict=True))) if said else None


def predicted(model: Model, part: float, stock: Measured, ours: Measured, speeds: Speeds | None) -> str:
    """A cell: whole and split layers, then tokens per second predicted, in brackets over those measured. speeds: by all runs on the
    model."""
    whole = model.layers - model.on_cpu(part)
    placed = ours.placed[0] if ours.placed else Placed(0, whole) if part in (0, 1) else None
    if speeds is None or placed is None:
        return "-"
    caught = statistics.median(ours.hits) if ours.hits else 0.0
    expected = speeds.decode(model, 0, whole, 0.0), speeds.decode(model, placed.split, placed.whole, caught)
    cells = [f"{e:.1f} ({e / m.median('tg128'):.2f})" for e, m in zip(expected, (stock, ours), strict=True)]
    return f"{placed.whole} whole, {placed.split} split, " + ", ".join(cells)


def machine(model: Model, found: Speeds, prompt: float, prompt_on_cpu: float) -> dict[str, float | bool]:
    """A file for `--machine`. prompt, prompt_on_cpu: seconds of 512 tokens with all experts in VRAM and with none."""
    return {
        "ram_bandwidth": found.ram,
        "vram_bandwidth": found.vram,
        "handover": found.handover,
        "whole_handover": found.whole,
        "pcie_bandwidth": model.expert_bytes / max(prompt_on_cpu - prompt, 1e-6),
        "compute": 2 * 512 * (model.other_bytes + model.used * model.expert_bytes) / prompt,  # about one byte a weight
        "gpu_layer": found.layer,
        "gpu_experts": found.experts,
        "overlap": OVERLAP,
    }


def main() -> None:
    started = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="+")
    p.add_argument("--stock", type=Path, required=True)
    p.add_argument("--patched", type=Path, required=True)
    p.add_argument("--parts", default="10,25,50,75,90")
    p.add_argument("--no-ends", action="store_true", help="not 0 and 100 %")
    p.add_argument("--threads", default=str(os.cpu_count() or 1))
    p.add_argument("--prompts", default="512,2048", help="their tokens")
    p.add_argument("--sequences", default="", help="numbers of them to decode at a time, besides one")
    p.add_argument("--load-mode", default="auto", help="llama.cpp's; with `none` experts go up from pinned memory (default auto: mmap)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=500)
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
            found = typical([f for s, r in results.items() if (s.model, s.threads) == (m, t) for f in r.found])
            text += [*table(m, t, parts, results, found), ""]
            if found is None:
                continue
            text += [f"the runtime's speeds: {found}", ""]
            if not args.no_ends and "512" in args.prompts.split(","):
                prompt, on_cpu = (512 / results[Setting(m, t, part, False)].median("pp512") for part in (1.0, 0.0))
                made = machine(m, found, prompt, on_cpu)
                (args.out / f"machine-{m.path.stem}-{t}.json").write_text(json.dumps(made, indent=1) + "\n")
    (args.out / "bench_vram.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
