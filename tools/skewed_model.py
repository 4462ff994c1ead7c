"""Write a file of random weights whose router prefers some experts as much as wanted, for tools/bench_vram.py.

    python tools/skewed_model.py OUT.gguf --programs DIR [--shape olmoe] [--layers 16] [--type Q8_0] [--caught 60@25,83@50]

The first experts are the busiest, in every layer: the rows of the router get shorter from expert to expert, row e by
exp(-A (e / (E - 1))^B), B 0.2, and a longer row is more often among the highest. A is searched for, until decoding with DIR's (patched)
llama-bench counts the wanted per cent of the selections in the first 25 and 50 per cent of the experts, the mean error of the two nought
(a random model cannot have both; one alone is met). A file that is there already only gets another router and norms. What A gives depends
on the weights' type, which is why it is counted. The default is what a set that follows the text catches on the 32-expert model
(docs/vram.md).
Attention is that of architecture `olmoe` in every case.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from bench_cuda import SHAPES, Variant, write_file
from numpy.typing import NDArray

from rq_gguf.evaluation.balance import COUNTS_VARIABLE, read_counts

POWER = 0.2
QUIET = 0.02
"""Weights of the norms before attention and experts: what a layer adds to its input is small, so that every layer's tokens differ as
much as the first one's. Else attention makes them alike, and deep layers use the same third of their experts all the time."""
MOST, STEPS, CLOSE = 8.0, 8, 0.3
"""The largest A, tries, and per cent off the wanted at which one is taken."""


def lengths(n_expert: int, a: float) -> NDArray[np.float32]:
    """Of the router's rows by expert."""
    return np.exp(-a * (np.arange(n_expert) / (n_expert - 1)) ** POWER).astype(np.float32)


def catch(counted: NDArray[np.int64], part: float) -> float:
    """Per cent of the selections in the first `part` per cent of the experts. counted: [layers, n_expert] selections."""
    return 100 * float(counted[:, : round(part * counted.shape[1] / 100)].sum() / counted.sum())


def decoded(programs: Path, model: Path, tokens: int = 128) -> NDArray[np.int64]:
    """[layers, n_expert] selections while llama-bench decodes. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.json")
        command = [programs / "llama-bench", "-m", model, "-ngl", "99", "-p", "0", "-n", str(tokens), "-r", "1"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, COUNTS_VARIABLE: str(counts)})
        return np.stack([layer.logical for layer in read_counts(counts).layers])


def search(error: Callable[[float], float], most: float, steps: int, close: float) -> float:
    """Where a rising error is nought between 0 and most, by halving. Raises ValueError where it is not reached."""
    low, high = 0.0, most
    if error(high) < 0:
        raise ValueError(f"A {most:g} is not enough")
    for _ in range(steps):
        a = (low + high) / 2
        found = error(a)
        if abs(found) < close:
            break
        low, high = (low, a) if found > 0 else (a, high)
    return a


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--programs", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="olmoe")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--vocabulary", type=int, default=50304)
    p.add_argument("--type", default="Q8_0")
    p.add_argument("--caught", default="60@25,83@50")
    args = p.parse_args()
    wanted = [tuple(map(float, x.split("@"))) for x in args.caught.split(",")]
    shape = replace(SHAPES[args.shape], n_layer=args.layers, n_vocab=args.vocabulary)
    if not args.out.exists():
        write_file(Variant("", (args.type,), tiered=False), shape, args.out)
    file = gguf.GGUFReader(args.out, "r+")
    routers = [t.data for t in file.tensors if t.name.endswith("ffn_gate_inp.weight")]
    rows = [r / np.linalg.norm(r, axis=1, keepdims=True) * np.float32(0.02 * shape.n_embd**0.5 / QUIET) for r in routers]
    for t in file.tensors:
        if t.name.endswith(("attn_norm.weight", "ffn_norm.weight")):
            t.data[:] = QUIET

    def error(a: float) -> float:
        for router, row in zip(routers, rows, strict=True):
            router[:] = row * lengths(shape.n_expert, a)[:, None]
        file.data.flush()
        layers = decoded(args.programs, args.out)
        told = ", ".join(f"{catch(layers, part):.1f} % in the first {part} %" for part in (25, 50))
        print(f"{args.out.name}: A {a:.3f}: of the selections {told}", file=sys.stderr, flush=True)
        return float(np.mean([catch(layers, part) - share for share, part in wanted]))

    try:
        search(error, MOST, STEPS, CLOSE)
    except ValueError as e:
        sys.exit(f"Error: no router of {args.out} gives --caught {args.caught}: {e}")


if __name__ == "__main__":
    main()
