"""Time the write step against llama-quantize doing the same work: same base, same importance matrix, same types, same threads.

    python tools/bench_write.py BASE.gguf [--threads 2] [--rounds 3]

BASE.gguf: a mixture-of-experts model in F16, BF16 or F32 (`python -c "from pathlib import Path; from rq_gguf.writing.convert import
convert_base; convert_base(Path('MODEL'), Path('BASE.gguf'))"`). The importance matrix is random. Programs run in turns; `llama-quantize`
is timed from start to exit, `write_model` as `build` calls it, in a running Python. A plan that mixes Q8_0 and Q4_K half and half is
compared with the mean of llama-quantize's two one-type files, which takes as many rows of each. Ratios above 1: rq-gguf is faster. Error
feedback, which plans ask for where a calibration knows the inputs' correlations, is arithmetic that llama-quantize does not do.
Files go to a temporary directory beside BASE.gguf. Quiet the machine first; processor seconds (user + system) show if it was.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.file import write_calibration
from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import Instances, LayerPlan, Plan
from rq_gguf.runtime import tools
from rq_gguf.writing.source import LayerShape, Source
from rq_gguf.writing.write import write_model


def random_calibration(source: Source) -> Calibration:
    rng = np.random.default_rng(0)
    n_embd = source.shape.layers[0].n_embd
    inputs = rng.standard_normal((2 * n_embd, n_embd), dtype=np.float32)
    moments = inputs.T @ inputs

    def layer(s: LayerShape) -> LayerCalibration:
        selections = rng.integers(1, 1000, s.n_expert)
        columns = {m: s.n_ff if m == "down" else s.n_embd for m in s.matrices}
        sums = {m: rng.random((s.n_expert, c), dtype=np.float32) * selections[:, None].astype(np.float32) for m, c in columns.items()}
        zero = np.zeros(s.n_expert)
        return LayerCalibration(s.layer, selections, zero, zero, 0.0, sums, np.zeros((s.n_expert, 2, 0)), zero, lambda: moments)

    s = source.shape.layers[0]
    layers = tuple(map(layer, source.shape.layers))
    return Calibration("random", "", source.shape.arch, (), 1000, "", 2, s.n_embd, s.n_ff, source.shape.merged_gate_up, layers)


def plan_for(source: Source, types: tuple[str, ...], feedback: bool) -> Plan:
    """No copies; experts take the types in turns."""

    def rows(s: LayerShape) -> Instances:
        return tuple((types[e % len(types)],) for e in range(s.n_expert))

    layers = tuple(LayerPlan(s.layer, rows(s), rows(s)) for s in source.shape.layers)
    return Plan("bench", "none", 1 << 62, 0, types, layers, "", 0, "bench", feedback=feedback)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that passed, and seconds of processor time, children included."""

    def cpu() -> float:
        return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    start, cpu_start = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - start, cpu() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ggml = Ggml(tools.library_path())
    one_type = ("q8_0", "q4_k")
    plans = {
        "q8_0": (("q8_0",), False),
        "q4_k": (("q4_k",), False),
        "half q8_0, half q4_k": (one_type, False),
        "q4_k, error feedback": (("q4_k",), True),
    }
    ours: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    theirs: dict[str, list[tuple[float, float]]] = {name: [] for name in one_type}
    with Source(args.base) as source, tempfile.TemporaryDirectory(dir=args.base.parent, prefix=".bench-") as name:
        folder = Path(name)
        calibration = random_calibration(source)
        imatrix = folder / "imatrix.gguf"
        write_calibration(imatrix, calibration)
        written = {name: plan_for(source, types, feedback) for name, (types, feedback) in plans.items()}
        for _ in range(args.rounds):
            for name, plan in written.items():
                options = {"ggml": ggml, "threads": args.threads, "progress": False}
                ours[name].append(timed(partial(write_model, args.base, plan, calibration, folder / "ours.gguf", **options)))
                (folder / "ours.gguf").unlink()
                if name in theirs:
                    command = ["llama-quantize", "--imatrix", imatrix, "--tensor-type", f"exps={name}"]
                    quantize = [*command, args.base, folder / "theirs.gguf", "Q8_0", str(args.threads)]
                    theirs[name].append(timed(partial(tools.run_tool, quantize)))
                    (folder / "theirs.gguf").unlink()
    print(f"{args.base.name}, {args.threads} threads, median of {args.rounds} rounds, seconds (processor seconds)\n")
    print(f"| {'experts':20} | {'write_model':>15} | {'llama-quantize':>15} | ratio (processor) |\n|:---|---:|---:|---:|")
    theirs["half q8_0, half q4_k"] = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in zip(theirs["q8_0"], theirs["q4_k"], strict=True)]
    theirs["q4_k, error feedback"] = theirs["q4_k"]
    for name in plans:
        (wall, cpu), (their_wall, their_cpu) = ([statistics.median(t[k] for t in runs[name]) for k in (0, 1)] for runs in (ours, theirs))
        cells = f"{wall:.2f} ({cpu:.2f})", f"{their_wall:.2f} ({their_cpu:.2f})"
        print(f"| {name:20} | {cells[0]:>15} | {cells[1]:>15} | {their_wall / wall:.2f} ({their_cpu / cpu:.2f}) |")
    print(f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
