"""What tools/bench_cuda.py makes of the profiler's output."""

import numpy as np
import pytest
from tool_modules import load_tool

bench_cuda = load_tool("bench_cuda")


def csv_line(*fields: str) -> str:
    return ",".join(f'"{f}"' for f in fields)


@pytest.mark.parametrize(("gate_up", "blocks"), [("gate_up<1>", 512), ("gate_up<1>", 1024), ("down", 512)])
def test_times_of_experts_by_number_of_sequences(gate_up: str, blocks: int) -> None:
    """Two layers, two evaluations for each number, a warm-up before them, and a kernel that is none of the experts'."""
    shape = bench_cuda.Shape(n_embd=2048, n_ff=1024, n_expert=64, n_used=8, n_head=16, n_layer=2)
    lines = [csv_line("ID", "Kernel Name", "Grid Size", "Metric Unit", "Metric Value")]
    for n, evaluations in ((2, 3), *((n, 2) for n in bench_cuda.PROFILED)):
        for _ in range(evaluations * shape.n_layer):
            lines.append(csv_line("0", f"void {gate_up}(int)", f"({blocks}, {shape.n_used}, {n})", "nsecond", f"{n},000"))
            lines.append(csv_line("0", "void other(int)", "(512, 1, 1)", "us", "1000"))
            lines.append(csv_line("0", "down(int)", f"(1024, {shape.n_used}, 1)", "us", f"{n * 3}"))
    printed = "==PROF== noise\n" + "\n".join(lines)

    assert bench_cuda.experts_times(printed, shape, 2) == [(n, 3 * n) for n in bench_cuda.PROFILED]
    assert bench_cuda.kernel_times(printed)[gate_up][0] == 2.0


def test_ratios_with_their_error() -> None:
    """Half the selections at 100 and half at 50 tokens per second make 66.7; the error falls with the number of samples."""
    stock = [bench_cuda.Variant(f"stock {t}", (t,), tiered=False) for t in ("Q8_0", "Q4_K")]
    half = bench_cuda.Variant("half", ("Q8_0", "Q4_K"))
    samples = {"stock Q8_0": [100.0] * 5, "stock Q4_K": [50.0] * 5, bench_cuda.key(half): [60.0] * 5}
    results = {name: bench_cuda.Measured({}, {"tg128": values}) for name, values in samples.items()}
    results[bench_cuda.key(half)].shares = {"Q8_0": 0.5, "Q4_K": 0.5}
    assert bench_cuda.expected(half, "tg128", results)[0] == pytest.approx(200 / 3)
    assert bench_cuda.ratio(samples[bench_cuda.key(half)], bench_cuda.expected(half, "tg128", results)) == "0.900 ± 0.000"
    assert bench_cuda.ratio([50.0], bench_cuda.expected(stock[1], "tg128", results)) == "1.000"

    random = np.random.default_rng(1)
    errors = [np.std(bench_cuda.medians(random.normal(100, 5, n))[1:]) for n in (5, 50)]
    assert errors[1] < errors[0] / 2 and errors[1] == pytest.approx(1.25 * 5 / 50**0.5, rel=0.5)
