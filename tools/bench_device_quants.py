"""What measuring types on a GPU takes: `python tools/bench_device_quants.py [--device cuda] [--experts 64] [--columns 2048]`.

For each type of the ladder: milliseconds for the rows of a layer's gate and up matrices that calibrating looks at, with error feedback, as
`rq_gguf calibrate --device cuda` does it: the first time, the second (when a GPU's launches are recorded) and after that. Random weights.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rq_gguf.calibration.feedback import Feedback
from rq_gguf.calibration.measure import ROWS
from rq_gguf.calibration.on_device import factor_there, requantized
from rq_gguf.ggml import Ggml
from rq_gguf.runtime.tools import library_path
from rq_gguf.types import LADDER

CALLS = 4


def milliseconds(device: torch.device, experts: int, columns: int, rows: int) -> dict[str, list[float]]:
    """Of CALLS calls by type."""
    random = torch.Generator(device).manual_seed(0)
    w = 0.02 * torch.randn((experts, 2 * rows, columns), generator=random, device=device)
    importance = torch.rand((experts, columns), generator=random, device=device)
    half = np.random.default_rng(0).standard_normal((columns, columns)) / columns**0.5
    feedback = Feedback(half @ half.T, factor_there(device))
    ggml = Ggml(library_path("ggml-base"))
    taken: dict[str, list[float]] = {}
    for kind in LADDER:
        for _ in range(CALLS):
            start = time.perf_counter()
            requantized(ggml, kind, w, importance, feedback)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.setdefault(kind, []).append(1e3 * (time.perf_counter() - start))
    return taken


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--experts", type=int, default=64)
    p.add_argument("--columns", type=int, default=2048)
    p.add_argument("--rows", type=int, default=ROWS)
    args = p.parse_args()
    taken = milliseconds(torch.device(args.device), args.experts, args.columns, args.rows)
    print("| type | first, ms | second | after that |\n| :--- | ---: | ---: | ---: |")
    for kind, ms in taken.items():
        print(f"| {kind} | {ms[0]:.0f} | {ms[1]:.0f} | {min(ms[2:]):.0f} |")
    print(f"| all | {sum(ms[0] for ms in taken.values()):.0f} | | {sum(min(ms[2:]) for ms in taken.values()):.0f} |")


if __name__ == "__main__":
    main()
