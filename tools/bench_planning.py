"""How long planning takes: `python tools/bench_planning.py [LAYERS EXPERTS]` (60 x 256 by default).

Times make_plan on a synthetic calibration, single-threaded: eight types, automatic copies, at most 2, 4 and 7 types in a layer and matrix
group; a fixed number of copies; a target instead of a budget; two types.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent.parent / "tests"),
]  # the package and tests/synthetic.py, from anywhere

from synthetic import synthetic_calibration  # noqa: E402

from rq_gguf.planning.policy import make_plan  # noqa: E402

TWO = ("q4_k", "q8_0")
LADDER = ("iq2_s", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
ROUNDS = 5
CASES: tuple[tuple[tuple[str, ...], str | None, dict[str, Any]], ...] = (
    (LADDER, "q4_k", {"max_tiers": 2}),
    (LADDER, "q4_k", {"max_tiers": 4}),
    (LADDER, "q4_k", {"max_tiers": 7}),
    (LADDER, "q6_k", {"max_tiers": 4}),
    (LADDER, "q4_k", {"max_tiers": 4, "replicas": 32}),
    (LADDER, None, {"max_tiers": 4, "target_kld": 0.1}),
    (TWO, "q8_0", {}),
)


def main() -> None:
    n_layers, n_expert = (int(a) for a in sys.argv[1:3]) if len(sys.argv) > 2 else (60, 256)
    print(f"{n_layers} layers x {n_expert} experts x 2 groups, best of {ROUNDS}")
    for types, budget, options in CASES:
        calibration = synthetic_calibration(n_layers, n_expert, types, n_embd=2048, n_ff=768)
        settings: dict[str, Any] = {"replicas": "auto", "policy": "budget", "other_bytes": 0, "calibration_sha256": ""} | options
        wall, cpu = [], []
        for _ in range(ROUNDS):
            start, used = time.perf_counter(), time.process_time()
            plan = make_plan(calibration, budget=budget, types=types, **settings)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        s, text = plan.summary, ", ".join(f"{name} {value}" for name, value in options.items())
        print(
            f"{len(types)} types, {plan.budget}{', ' if text else ''}{text}: {min(wall):.2f} s (processor {min(cpu):.2f} s), "
            f"{s['copies']} copies, LIS {s['lis_before']:.2f} -> {s['lis_after']:.2f}, KLD {s['predicted_kld']:.4g}, gap {s['gap']:.4%}"
        )


if __name__ == "__main__":
    main()
