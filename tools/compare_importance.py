"""What makes a good importance of experts: plans made from one figure per expert each, compared by measured KL divergence.

    python tools/compare_importance.py WORK [--budget q4_k] [--chunks 120] [--threads 2]

WORK: the folder of an earlier tools/compare_quantize.py, whose base model, calibration and logits are used. Every plan spreads the same
errors by layer, matrix group and type over a layer's experts, in proportion to the figure; only the last uses each expert's own measured
errors. So the table shows what the figure knows about the experts. Types: the default ladder; no copies; the bytes of `--budget`.
Also printed: rank correlation of each figure with the measured error, mean over layers, and of frequency with it.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.file import read_calibration
from rq_gguf.evaluation.quality import compare
from rq_gguf.ggml import Ggml
from rq_gguf.planning.policy import make_plan
from rq_gguf.rank_correlation import rank_correlation
from rq_gguf.runtime.tools import library_path
from rq_gguf.types import LADDER
from rq_gguf.writing.write import write_model

Figure = Callable[[LayerCalibration], NDArray[np.float64]]


def saliency(layer: LayerCalibration) -> NDArray[np.float64]:
    """REAP's, with the root of the mean square for the mean: of |gate weight x output| over the expert's own tokens."""
    return np.asarray(np.sqrt(layer.output_energy / np.maximum(layer.selections, 1)))


FIGURES: dict[str, Figure] = {
    "the same for all": lambda layer: np.ones(layer.n_expert),
    "frequency": lambda layer: layer.selections.astype(np.float64),
    "gate-weighted frequency": lambda layer: layer.gate_weight,
    "REAP saliency": saliency,
    "REAP saliency x frequency": lambda layer: saliency(layer) * layer.selections,
    "output energy": lambda layer: layer.output_energy,
    "Wanda score (the paper's)": lambda layer: layer.wanda,
}


def spread(calibration: Calibration, figure: Figure) -> Calibration:
    """The calibration with each layer's errors spread over its experts in proportion to a figure."""
    layers = []
    for layer in calibration.layers:
        share = figure(layer) + 1e-9 * figure(layer).sum()
        layers.append(replace(layer, error=layer.error.sum(axis=0) * (share / share.sum())[:, None, None]))
    return replace(calibration, layers=tuple(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--budget", default="q4_k")
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    job, out = args.work / "ours.gguf.rq", args.work / "importance.gguf"
    calibration, ggml = read_calibration(job / "calibration.gguf"), Ggml(library_path("ggml-base"))
    at = calibration.types.index("q4_k")
    print(f"{calibration.model}, experts in the bytes of {args.budget}, {args.chunks} chunks\n")
    print("| importance of an expert | mean KLD | 99.9% KLD | rank correlation with the measured error | with frequency |")
    print("|:---|---:|---:|---:|---:|")
    for name, figure in [*FIGURES.items(), ("measured error", None)]:
        known = calibration if figure is None else spread(calibration, figure)
        plan = make_plan(
            known, budget=args.budget, types=LADDER, replicas=0, policy="budget", other_bytes=0, calibration_sha256="", max_tiers=7
        )
        write_model(job / "base.gguf", plan, calibration, out, ggml=ggml, progress=False)
        q = compare(out, args.work / "heldout.txt", args.work / f"logits-{args.chunks}.bin", chunks=args.chunks, threads=args.threads)
        errors = [layer.error[:, :, at].sum(axis=1) for layer in calibration.layers]
        values = errors if figure is None else [figure(layer) for layer in calibration.layers]
        with_error = np.mean([rank_correlation(v, e) for v, e in zip(values, errors, strict=True)])
        with_load = np.mean([rank_correlation(v, c.selections.astype(float)) for v, c in zip(values, calibration.layers, strict=True)])
        print(
            f"| {name} | {q.kld.value:.5f} ± {q.kld.error:.5f} | {q.kld_999.value:.4f} | {with_error:.2f} | {with_load:.2f} |", flush=True
        )
    out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
