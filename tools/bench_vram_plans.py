"""What plans for a machine gain, and how long they take: a table of docs/vram.md. `python tools/bench_vram_plans.py` (a minute).

Synthetic calibrations (skewed loads, errors that fall with the bits of a type, each expert's its own) of two shapes, all experts in q4_k's
bytes, on the machine `12gb`. Speed is predicted; nothing is run.
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent.parent / "tests"),
]  # the package and tests/synthetic.py, from anywhere

from synthetic import synthetic_calibration  # noqa: E402

from rq_gguf.planning.policy import make_plan  # noqa: E402
from rq_gguf.types import LADDER  # noqa: E402
from rq_gguf.vram.machine import MACHINES  # noqa: E402
from rq_gguf.vram.plans import FACTORS, TYPICAL, Setting, choose  # noqa: E402
from rq_gguf.vram.speed import Rest  # noqa: E402

SHAPES = ((12, 64), (48, 128))
"""Layers, experts."""
PARTS = (0.2, 0.4)
"""Of the experts' bytes, in VRAM."""
REST = 1.6e9
"""Bytes, and weights, of what is no routed expert."""


def main() -> None:
    head = ["layers x experts", "in VRAM", "layout over stock's", *(f"{f:g}x the error" for f in FACTORS), "seconds"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for n_layers, n_expert in SHAPES:
        c = synthetic_calibration(n_layers, n_expert, LADDER, n_embd=2048, n_ff=768, n_expert_used=8, n_tokens=65536)
        plain = make_plan(c, budget="q4_k", types=LADDER, replicas=0, policy="budget", other_bytes=0, calibration_sha256="")
        for part in PARTS:
            start = time.perf_counter()
            found = choose(c, plain, Setting(MACHINES["12gb"], Rest(int(REST), n_layers, REST), TYPICAL), part * plain.expert_bytes)
            seconds, first = time.perf_counter() - start, found[0]
            cells = []
            for factor in FACTORS:
                x = next((x for x in found[1:] if abs(x.kld / first.kld - factor) < 0.05), None)
                more = None if x is None else (x.speed.decode / first.speed.decode, x.plan.expert_bytes / plain.expert_bytes)
                cells.append("-" if more is None else f"{more[0]:.3f}x ({100 * (more[1] - 1):+.0f} % bytes)")
            row = [
                f"{n_layers} x {n_expert}",
                f"{100 * part:.0f} %",
                f"{first.speed.decode / first.speed.stock_decode:.2f}x",
                *cells,
                f"{seconds:.0f}",
            ]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
