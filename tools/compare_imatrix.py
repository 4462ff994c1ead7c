"""Compare what `rq-gguf calibrate` writes, used as an imatrix by llama-quantize, with llama-imatrix's own on the same text.

    python tools/compare_imatrix.py MODEL --text CALIBRATION.txt --heldout FILE.txt [FILE.txt ...] [--chunks 40] [--threads 2] [--work DIR]

MODEL: a Hugging Face directory. llama-quantize makes one stock file per imatrix and type: a ggml type such as q3_k is that of the routed
experts beside Q8_0 for the rest; a type of whole files such as Q4_K_M is llama-quantize's own mixture. Each file is compared with the
unquantized model by llama-perplexity on the held-out texts, mixed. Imatrices: none; llama-imatrix on the whole text; calibrate on the whole
text; calibrate on the tokens that it takes by default. The table has the mean KL divergence and its ratio to llama-imatrix's. All files
see the same tokens, so a difference between two of them is much surer than the errors of the figures themselves.
With --work all inputs are kept in DIR (the converted model, its logits, llama-imatrix's file and the calibrations) and used again where
they are there: delete calibrate-*.gguf to compare another version of calibrate.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rq_gguf.calibration.file import write_calibration
from rq_gguf.calibration.run import calibrate
from rq_gguf.defaults import TOKENS
from rq_gguf.evaluation.quality import N_CTX, Figure, parse_estimate, parse_statistics, run_perplexity
from rq_gguf.evaluation.text import mix, read_text
from rq_gguf.ggml import Ggml
from rq_gguf.runtime.tools import library_path, run_tool
from rq_gguf.types import TYPES
from rq_gguf.writing.convert import convert_base

NONE, THEIRS, OURS, FEWER = "none", "llama-imatrix", "calibrate", f"calibrate, {TOKENS} tokens"


def imatrices(model: Path, base: Path, text: Path, folder: Path, threads: int) -> dict[str, Path | None]:
    """Name -> imatrix file, of every kind that is compared."""
    theirs = folder / "llama-imatrix.gguf"
    if not theirs.exists():
        partial = folder / "partial.gguf"
        options = ["-c", str(N_CTX), "-t", str(threads), "--no-ppl", "--output-frequency", "100000"]
        run_tool(["llama-imatrix", "-m", base, "-f", text, "-o", partial, *options])
        partial.rename(theirs)
    found: dict[str, Path | None] = {NONE: None, THEIRS: theirs}
    content = text.read_text(encoding="utf-8")
    ggml = Ggml(library_path("ggml-base"))
    for name, tokens in ((OURS, 1 << 40), (FEWER, TOKENS)):
        path = folder / f"calibrate-{'all' if name == OURS else tokens}.gguf"
        if not path.exists():
            made = calibrate(model, content, tokens=tokens, device="cpu", types=("q8_0",), samples=1, ggml=ggml, threads=threads)
            write_calibration(path, made)
        found[name] = path
    return found


def quantize(base: Path, out: Path, kind: str, imatrix: Path | None, threads: int) -> None:
    options: list[str | Path] = [] if imatrix is None else ["--imatrix", imatrix]
    if kind in TYPES:
        options += ["--tensor-type", f"_exps={kind}"]
    run_tool(["llama-quantize", *options, base, out, "Q8_0" if kind in TYPES else kind, str(threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--types", default="q4_k,q3_k,q2_k,Q4_K_M,Q3_K_M")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-imatrix-")))
        folder.mkdir(exist_ok=True)
        names = ("base.gguf", "heldout.txt", f"logits-{args.chunks}.bin", "quantized.gguf")
        base, heldout, logits, out = (folder / name for name in names)
        if not base.exists():
            convert_base(args.model, base)
        mixed = mix([read_text(path) for path in args.heldout])
        if not (heldout.exists() and heldout.read_text(encoding="utf-8") == mixed and logits.exists()):
            heldout.write_text(mixed, encoding="utf-8")
            logits.unlink(missing_ok=True)
            save: list[str | Path] = ["-f", heldout, "--kl-divergence-base", logits]
            parse_estimate(run_perplexity(base, save, chunks=args.chunks, threads=args.threads, what="base"), heldout)
        compare: list[str | Path] = ["-f", heldout, "--kl-divergence-base", logits, "--kl-divergence"]

        files = imatrices(args.model, base, args.text, folder, args.threads)
        print(f"{args.model.name}, {args.chunks} chunks of {N_CTX} held-out tokens, mean KLD (ratio to llama-imatrix)\n")
        print(f"| type | {' | '.join(files)} |\n|:---|{'---:|' * len(files)}")
        for kind in args.types.split(","):
            klds: dict[str, Figure] = {}
            for name, imatrix in files.items():
                quantize(base, out, kind, imatrix, args.threads)
                printed = run_perplexity(out, compare, chunks=args.chunks, threads=args.threads, what=f"{kind}, {name}")
                klds[name] = parse_statistics(printed).kld
            cells = (f"{k.value:.5f} ± {k.error or 0:.5f} ({k.value / klds[THEIRS].value:.3f})" for k in klds.values())
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
