"""How long planning takes: `python tools/bench_planning.py [LAYERS EXPERTS]` (60 x 256 by default).

Times make_plan on a synthetic calibration for two types and for eight, at a budget between them, with automatic copies.
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

LADDER = ("iq2_s", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


def main() -> None:
    n_layers, n_expert = (int(a) for a in sys.argv[1:3]) if len(sys.argv) > 2 else (60, 256)
    for types, budget in ((("q4_k", "q8_0"), "q8_0"), (("q4_k", "q8_0"), "6.0bpw"), (LADDER, "q4_k")):
        calibration = synthetic_calibration(n_layers, n_expert, types, n_embd=2048, n_ff=768)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            plan = make_plan(
                calibration, budget=budget, types=types, replicas="auto", policy="budget", other_bytes=0, calibration_sha256=""
            )
            times.append(time.perf_counter() - start)
        s = plan.summary
        print(
            f"{n_layers} layers x {n_expert} experts, {len(types)} types, budget {budget}: {min(times):.3f} s (best of {len(times)}), "
            f"{s['copies']} copies, LIS {s['lis_before']:.2f} -> {s['lis_after']:.2f}, error {s['error_gap_to_bound']:.2%} above the bound"
        )


if __name__ == "__main__":
    main()
