"""Compare plans with what llama-quantize makes of the same model in the same bytes: KL divergence on held-out text, predicted and measured.

    python tools/compare_quantize.py MODEL --text CALIBRATION.txt --heldout FILE.txt [FILE.txt ...] --work DIR [--chunks 240] [--threads 2]

MODEL: a Hugging Face directory. Stock files: the routed experts in one type beside Q8_0 for the rest, and llama-quantize's own mixtures
Q4_K_M and Q3_K_M, all with llama-imatrix's imatrix of the whole calibration text. Ours: `rq-gguf build --budget like:STOCK.gguf` (at Q2_K
its bytes plus 10 %), all other tensors in Q8_0, beside a mixture also in the types that it gives them (`--other`); without copies, from one
calibration on the same text. Then more plans with copies and with fewer types or tiers, to see how predictions hold, and one from llama-
imatrix's file alone. Each file is compared with the unquantized model by llama-perplexity on the held-out texts, mixed. Everything is kept
in DIR, and what is there is not made again. The table goes to stdout, all figures to DIR/results.json; `--plot FILE.svg` draws predicted
against measured KL divergence of all plans that DIR has (needs matplotlib).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from rq_gguf.build import build
from rq_gguf.choices import check_choices
from rq_gguf.defaults import OTHER
from rq_gguf.evaluation.quality import N_CTX, compare, save_logits
from rq_gguf.evaluation.text import mix, read_text
from rq_gguf.rank_correlation import rank_correlation
from rq_gguf.runtime.tools import run_tool
from rq_gguf.writing.others import parse_others

ONE_TYPE = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
MIXTURES = ("Q4_K_M", "Q3_K_M")
K_QUANTS = "q2_k,q3_k,q4_k,q5_k,q6_k,q8_0"
# Beside the plans at the stock files' bytes: budget, replicas, types (None: the default ladder), tiers.
FURTHER = (
    ("q8_0", "8", None, None), ("q6_k", "4", None, None), ("q5_k", "8", None, None), ("q4_k", "4", None, None), ("q3_k", "2", None, None),
    ("q5_k", "0", K_QUANTS, None), ("q4_k", "0", K_QUANTS, None), ("q3_k", "0", K_QUANTS, None), ("q4_k", "0", None, "2"),
    ("6.0bpw", "0", "q4_k,q8_0", None), ("3.0bpw", "0", None, None), ("7.5bpw", "0", None, None),
)  # fmt: skip


class Bench:
    """A folder of what was made and measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text, self.logits = self.folder / "heldout.txt", self.folder / f"logits-{args.chunks}.bin"
        self.results_file = self.folder / "results.json"
        self.results: dict[str, Any] = json.loads(self.results_file.read_text()) if self.results_file.exists() else {}
        self.base, self.calibration = self.folder / "ours.gguf.rq" / "base.gguf", self.folder / "ours.gguf.rq" / "calibration.gguf"

    def prepare(self) -> None:
        """The converted model, the calibration, llama-imatrix's file and the model's logits."""
        choices = check_choices("q8_0", None, "0", "budget")
        build(str(self.args.model), self.folder / "ours.gguf", choices, calibration=self.args.text, say=print)
        imatrix = self.folder / "imatrix.gguf"
        if not imatrix.exists():
            run_tool(["llama-imatrix", "-m", self.base, "-f", self.args.text, "-o", imatrix, "-c", str(N_CTX), *self.threads])
        if not self.logits.exists():
            self.text.write_text(mix([read_text(path) for path in self.args.heldout]), encoding="utf-8")
            save_logits(self.base, self.text, self.logits, chunks=self.args.chunks, threads=self.args.threads)

    @property
    def threads(self) -> list[str]:
        return ["-t", str(self.args.threads)]

    def measure(self, name: str, file: Path, **more: Any) -> dict[str, Any]:
        quality = compare(file, self.text, self.logits, chunks=self.args.chunks, threads=self.args.threads)
        figures = {key: getattr(quality, key).value for key in ("kld", "kld_999", "same_top", "ppl", "ppl_base")}
        self.results[name] = {"bytes": file.stat().st_size, **figures, "kld_error": quality.kld.error, **more}
        self.results_file.write_text(json.dumps(self.results, indent=1) + "\n")
        return dict(self.results[name])

    def stock(self, kind: str) -> dict[str, Any]:
        """llama-quantize's file of a type of experts, or of a mixture."""
        file = self.folder / f"stock-{kind}.gguf"
        if not file.exists():
            one = ["--tensor-type", f"_exps={kind}"] if kind in ONE_TYPE else []
            run_tool(["llama-quantize", "--imatrix", self.folder / "imatrix.gguf", *one, self.base, file, "Q8_0" if one else kind])
        return self.results.get(f"stock {kind}") or self.measure(f"stock {kind}", file)

    def ours(
        self,
        name: str,
        budget: str,
        replicas: str = "0",
        types: str | None = None,
        tiers: str | None = None,
        other: str = OTHER,
        statistics: Path | None = None,
    ) -> dict[str, Any]:
        """A plan's file; overwritten by the next. statistics: an imatrix instead of the calibration."""
        if name in self.results:
            return dict(self.results[name])
        out = self.folder / "plan.gguf"
        choices = check_choices(budget, types, replicas, "budget", tiers)
        others = parse_others(other)
        source = statistics or self.calibration
        report = build(str(self.base), out, choices, calibration=source, others=others, force=True, say=lambda line: None)
        s = report.plan.summary
        figures = {"predicted": s["predicted_kld"], "copies": s["copies"], "types": s["instances_by_type"], "budget": budget}
        return self.measure(name, out, **figures)


def plot(results: dict[str, Any], file: Path) -> None:
    """Predicted against measured, and the line on which the rest of a file costs what the stock Q8_0 file's tensors cost."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"

    plans = {name: r for name, r in results.items() if name.startswith("ours") and "others alike" not in name}
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="predicted for the experts, nats", ylabel="measured, nats")
    for label, copies, marker in (("no copies", False, "o"), ("with copies", True, "^")):
        some = [r for r in plans.values() if bool(r["copies"]) == copies]
        axes.errorbar(
            [r["predicted"] for r in some], [r["kld"] for r in some], [r["kld_error"] for r in some], fmt=marker, markersize=5, label=label
        )
    rest = results["stock q8_0"]["kld"]
    at = np.geomspace(min(r["predicted"] for r in plans.values()), max(r["predicted"] for r in plans.values()))
    axes.plot(at, at + rest, "k:", linewidth=1, label=f"predicted + {rest:.5f} (all in Q8_0)")
    axes.legend()
    axes.set_title(f"KL divergence of {len(plans)} plans, held-out text", fontsize=10)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=240)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only the plans at the stock files' bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    bench = Bench(parser.parse_args())
    bench.prepare()
    print(f"{bench.args.model.name}, {bench.args.chunks} chunks of {N_CTX} held-out tokens\n")
    print("| bytes of | stock bytes | ours | stock KLD | ours | ratio | 99.9% KLD | Same top p | predicted, experts |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for kind in (*ONE_TYPE, *MIXTURES):
        stock = bench.stock(kind)
        if kind == "q8_0":
            continue  # nothing is more precise
        size = str(int(stock["bytes"] * (1.1 if kind == "q2_k" else 1)))
        rows = {f"{kind} + 10 %" if kind == "q2_k" else kind: bench.ours(f"ours at {kind}", size)}
        if kind in MIXTURES:
            rows[f"{kind}, others alike"] = bench.ours(f"ours at {kind}, others alike", size, other=kind)
        for label, ours in rows.items():
            print(
                f"| {label} | {stock['bytes']:,} | {ours['bytes']:,} | {stock['kld']:.5f} ± {stock['kld_error']:.5f} | {ours['kld']:.5f} | "
                f"{ours['kld'] / stock['kld']:.3f} | {stock['kld_999']:.3f} → {ours['kld_999']:.3f} | {stock['same_top']:.2f} → "
                f"{ours['same_top']:.2f} | {ours['predicted']:.5f} |",
                flush=True,
            )
    if bench.args.quick:
        if bench.args.plot:
            plot(bench.results, bench.args.plot)
        return
    for budget, replicas, types, tiers in FURTHER:
        bench.ours(f"ours {budget}, {replicas} copies, {types or 'ladder'}, {tiers or 'default'} tiers", budget, replicas, types, tiers)
    alone = bench.ours("imatrix alone at q4_k", str(bench.stock("q4_k")["bytes"]), types=K_QUANTS, statistics=bench.folder / "imatrix.gguf")
    plans = {name: r for name, r in bench.results.items() if name.startswith("ours") and "others alike" not in name}
    predicted, measured = ([r[key] for r in plans.values()] for key in ("predicted", "kld"))
    print("\n| plan | bytes | copies | predicted, experts | measured |\n|:---|---:|---:|---:|---:|")
    for name, r in plans.items():
        print(f"| {name.removeprefix('ours ')} | {r['bytes']:,} | {r['copies']} | {r['predicted']:.5f} | {r['kld']:.5f} |")
    rank = rank_correlation(predicted, measured)
    print(
        f"\nAt Q4_K's bytes, K-quants only, from llama-imatrix's file alone (--imatrix): {alone['kld']:.5f} in {alone['bytes']:,} bytes"
        f"\n{len(plans)} plans: rank correlation of predicted and measured KLD {rank:.3f}; stock Q8_0 has {bench.stock('q8_0')['kld']:.5f}"
    )
    if bench.args.plot:
        plot(bench.results, bench.args.plot)


if __name__ == "__main__":
    main()
