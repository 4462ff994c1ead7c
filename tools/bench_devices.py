"""Speed of tiered files on several devices of one host against stock files, and whether they give what one device gives.

    python tools/bench_devices.py --work DIR [--tiered FILE.gguf --stock FILE.gguf --text HELDOUT.txt] [--devices CUDA0,CUDA1]
        [--layers 5] [--seconds 240]

DIR: where `tools/bench_cuda.py SOURCE --work DIR --steps build,files` left programs and files; files that lack are written. Layers are
split over the devices (`-sm layer`, llama.cpp's default). Devices may be servers: `--rpc HOST:PORT,HOST:PORT --devices RPC0,RPC1`.

tensor  `-sm tensor`: the stock FILE on both builds (OLMoE, whose shape the bench's files have, stock llama.cpp does not split so), and
        the tiered one, which is to be refused with a sentence
check   of both FILEs, a real model: logits on all devices against those on the first, in prompts and decode of 1, 4 and 8, and the
        counts of experts. The same kernels run, so that they should be the same bytes
bench   rounds over all files in random order: llama-bench for tg128, pp512 and pp2048 (whose four batches are on several devices at
        once), llama-batched-bench for decode of 2 to 128 sequences. Ratios as in bench_cuda.py
All together ends after about --seconds; the rounds that fit count. Figures go to OUT/bench_devices.json, tables to the terminal and to
OUT/bench_devices.md.
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

from bench_cuda import SHAPES, Measured, Shape, Variant, expected, file_of, file_speeds, key, make_files, shares, variants
from check_cuda import Programs
from rounds import rounds_before

SEQUENCES = (2, 8, 32, 128)
MIXES = ("half Q8_0, half Q4_K", "ladder of four")
COPIES = (0, 4)
BATCHES: dict[str, list[str]] = {"prompts": [], **{f"decode of {n}": ["-b", str(n), "-ub", str(n)] for n in (1, 4, 8)}}
REFUSAL = "split mode 'tensor' does not support experts in tiers"
LONGEST = 90
"""Seconds that a program with `-sm tensor` may take."""


@dataclass(frozen=True)
class Place:
    """Devices that run the files."""

    devices: tuple[str, ...]
    """Names, as `--list-devices` prints them."""
    rpc: tuple[str, ...] = ()
    """Servers, host:port, that give devices RPC0, RPC1 and so on."""

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--devices", default="CUDA0,CUDA1")
        p.add_argument("--rpc", default="")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Place":
        """What add_options read."""
        return cls(tuple(args.devices.split(",")), tuple(args.rpc.split(",")) if args.rpc else ())

    def options(self, separator: str = ",") -> list[str]:
        """Of llama.cpp's programs. separator: between devices; llama-bench alone has another, "/"."""
        return [*(["--rpc", ",".join(self.rpc)] if self.rpc else []), "--device", separator.join(self.devices)]


def split_tensors(file: Path, build: str, work: Path, place: Place) -> str:
    """What became of a file with `-sm tensor`: that it runs, or how the program ended and what it said last."""
    options = ["-v", "-ngl", "99", "-sm", "tensor", "-p", "64", "-n", "8", "-r", "1", *place.options("/")]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    words = [str(w) for w in (work / f"bin-{build}/llama-bench", "-m", file, *options)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LONGEST, env=quiet)
    except subprocess.TimeoutExpired:
        return f"nothing within {LONGEST} s"
    if done.returncode == 0:
        return "runs"
    ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    said = re.findall(rf"{re.escape(REFUSAL)}.*|.*(?:error|ASSERT|failed).*", done.stderr) or [""]
    return f"{ended}: {said[0].strip()[-300:]}"


def tensor_rows(stock: Path, tiered: Path, work: Path, place: Place) -> Iterator[str]:
    for file, build in ((stock, "stock"), (stock, "patched"), (tiered, "patched")):
        yield f"| {file.name} | {build} | {split_tensors(file, build, work, place)} |"


def check_rows(file: Path, text: Path, chunks: int, work: Path, out: Path, place: Place) -> Iterator[str]:
    """Logits and counts on all devices against the first one's."""
    programs = Programs(work / "bin-patched", text, chunks)
    first = Place(place.devices[:1], place.rpc)
    ours, theirs, counts = out / "logits.bin", out / "logits-one.bin", out / "counts.json"
    for name, batch in BATCHES.items():
        programs.save(file, theirs, ["-ngl", "99", *batch, *first.options()])
        programs.save(file, ours, ["-ngl", "99", *batch, *place.options()])
        same = ours.read_bytes() == theirs.read_bytes()
        divergence = "0 | 0 | 100" if same else programs.compare(file, theirs, ["-ngl", "99", *batch, *place.options()])
        served = [programs.counts(file, counts, ["-ngl", "99", *batch, *p.options()]) for p in (first, place)]
        counted = "the same" if served[0] == served[1] else "DIFFERENT"
        yield f"| {file.name}, {name} | {'the same bytes' if same else 'different'} | {divergence} | {counted} |"
    for path in (ours, theirs, counts):
        path.unlink()


def bench_once(v: Variant, work: Path, log: Path, repetitions: int, place: Place) -> dict[str, float]:
    """Tokens per second by test."""
    programs, file = work / f"bin-{v.build}", file_of(v, work)
    return file_speeds(programs, file, log, repetitions, SEQUENCES, bench=place.options("/"), batched=place.options())


def table(wanted: Sequence[Variant], results: dict[str, Measured]) -> str:
    """Median speeds; of tiered files also the ratio to what stock files give."""
    tests = ["tg128", *(f"{n} seq" for n in SEQUENCES), "pp512", "pp2048"]
    rows = [["file", *tests], ["---", *["---:"] * len(tests)]]
    for v in wanted:
        medians = {test: statistics.median(results[key(v)].samples[test]) for test in tests}
        ratios = {test: f" ({medians[test] / expected(v, test, results)[0]:.3f})" if v.tiered else "" for test in tests}
        rows.append([key(v), *(f"{medians[test]:.0f}{ratios[test]}" for test in tests)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def bench(wanted: Sequence[Variant], work: Path, out: Path, place: Place, rounds: int, repetitions: int, end: float) -> str:
    """The table. At least one round, and no other that would end after `end` (of time.monotonic)."""
    results = {key(v): Measured() for v in wanted}
    for v in wanted:
        if v.tiered:
            results[key(v)].shares = shares(v, work, out)
    for _ in rounds_before(end, rounds):
        for v in random.sample(wanted, len(wanted)):
            for test, speed in bench_once(v, work, out / "bench_devices.log", repetitions, place).items():
                results[key(v)].samples.setdefault(test, []).append(speed)
        (out / "bench_devices.json").write_text(json.dumps({name: asdict(r) for name, r in results.items()}, indent=1))
    n = len(results[key(wanted[0])].samples["tg128"])
    return f"{', '.join(place.devices)}, {n} rounds, medians\n\n{table(wanted, results)}"


def main() -> None:
    started = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path)
    Place.add_options(p)
    p.add_argument("--tiered", type=Path, metavar="FILE.gguf", help="a real model")
    p.add_argument("--stock", type=Path, metavar="FILE.gguf", help="the same model without tiers")
    p.add_argument("--text", type=Path)
    p.add_argument("--chunks", type=int, default=8)
    p.add_argument("--shape", choices=SHAPES, default="olmoe")
    p.add_argument("--layers", type=int, help="as with bench_cuda.py, whose files are used")
    p.add_argument("--rounds", type=int, default=8, help="at most")
    p.add_argument("--repetitions", type=int, default=5, help="of llama-bench in a round; their median counts")
    p.add_argument("--seconds", type=float, default=240)
    args = p.parse_args()
    real = (args.tiered, args.stock, args.text)
    if any(real) and not all(real):
        p.error("--tiered, --stock and --text go together")

    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    place = Place.of(args)
    shape = SHAPES[args.shape]
    if args.layers:
        shape = Shape(**{**asdict(shape), "n_layer": args.layers})
    wanted = [v for v in variants() if not v.tiered or (v.name in MIXES and v.copies in COPIES)]
    make_files(shape, args.work, wanted)

    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        (out / "bench_devices.md").write_text("\n".join(lines) + "\n")

    if all(real):
        say("| `-sm tensor` | build | |\n|:---|:---|:---|")
        for row in tensor_rows(args.stock, args.tiered, args.work, place):
            say(row)
        say("\n| all devices against the first | logits | mean KLD | maximum | Same top p, % | counts |\n|:---|:---|---:|---:|---:|:---|")
        for file in (args.stock, args.tiered):
            for row in check_rows(file, args.text, args.chunks, args.work, out, place):
                say(row)
    end = started + args.seconds
    say("\n" + bench(wanted, args.work, out, place, args.rounds, args.repetitions, end))


if __name__ == "__main__":
    main()
