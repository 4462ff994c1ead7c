"""Is a file's output on a GPU what it is on the CPU: every placement, decode and prefill, counts of experts, and a server with 8 slots.

    python tools/check_cuda.py FILE.gguf --text HELDOUT.txt --bin DIR [--base BASE.gguf] [--stock-bin DIR] [--chunks 16] [--out DIR]

DIR: programs built with CUDA from the patched tree: llama-perplexity, and llama-server for that part. FILE should be a real model: with
random weights there is nothing to compare. Needs Python alone.

placement  llama-perplexity's KL divergence of the file on the GPU from the same file on the CPU, for each way to place it. The CPU rounds
           activations otherwise than the GPU, and a router that is near a tie then picks another expert: stock files show the same
--base     KL divergence of the file from the unquantized model on CPU and GPU, whose difference should be within the error
counts     LLAMA_EXPERT_COUNTS on CPU and GPU: for each layer, how many selections of logical and of physical experts differ
--stock-bin  programs of the unpatched tree, for a FILE without tiers: are the logits the same bytes
server     texts that llama-server gives with 8 slots at once and one by one, greedy
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPU = ["--device", "none"]
PLACEMENTS: dict[str, list[str]] = {
    "whole, -fa off": ["-ngl", "99", "-fa", "off"],
    "whole, -fa on": ["-ngl", "99", "-fa", "on"],
    **{f"whole, decode of {n}": ["-ngl", "99", "-b", str(n), "-ub", str(n)] for n in (1, 2, 4, 8, 32)},
    "-ngl 2": ["-ngl", "2"],
    "-ngl 2, decode of 8": ["-ngl", "2", "-b", "8", "-ub", "8"],
    "--n-cpu-moe 2": ["-ngl", "99", "--n-cpu-moe", "2"],
    "--n-cpu-moe 2, decode of 8": ["-ngl", "99", "--n-cpu-moe", "2", "-b", "8", "-ub", "8"],
    "--cpu-moe": ["-ngl", "99", "--cpu-moe"],
    "--cpu-moe, decode of 1": ["-ngl", "99", "--cpu-moe", "-b", "1", "-ub", "1"],
    "-ot down of two layers": ["-ngl", "99", "-ot", r"blk\.[01]\.ffn_down_exps=CPU"],
    "--cpu-moe --no-op-offload": ["-ngl", "99", "--cpu-moe", "--no-op-offload"],
}
AGAINST_BASE: dict[str, list[str]] = {"CPU": CPU, "GPU": ["-ngl", "99"], "GPU, decode of 1": ["-ngl", "99", "-b", "1", "-ub", "1"]}
DISPATCHES: dict[str, list[str]] = {"balanced": [], "primary": ["--override-kv", "rq.dispatch=str:primary"]}
BATCHES: dict[str, list[str]] = {"prefill": [], "decode of 1": ["-b", "1", "-ub", "1"], "decode of 4": ["-b", "4", "-ub", "4"]}
PORT = 8099


class Programs:
    """llama-perplexity over one text."""

    def __init__(self, folder: Path, text: Path, chunks: int) -> None:
        self.folder, self.options = folder, ["-f", text, "-c", "512", "--chunks", str(chunks)]

    def perplexity(self, file: Path, more: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
        """What it prints. Ends the program where it fails."""
        words = [str(w) for w in (self.folder / "llama-perplexity", "-m", file, *self.options, *more)]
        done = subprocess.run(words, env={**os.environ, **(env or {})}, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout + done.stderr

    def save(self, file: Path, logits: Path, more: list[str]) -> None:
        self.perplexity(file, [*more, "--kl-divergence-base", logits])

    def compare(self, file: Path, logits: Path, more: list[str]) -> str:
        """Columns of a table."""
        for _ in range(5):  # the program may exit before its last words are printed
            printed = self.perplexity(file, [*more, "--kl-divergence-base", logits, "--kl-divergence"])
            found = [re.search(pattern, printed) for pattern in (r"Mean +KLD: +(.*)", r"Maximum KLD: +(.*)", r"Same top p: +(.*)")]
            if all(found):
                break
        return " | ".join(m[1].strip() if m else "?" for m in found)

    def counts(self, file: Path, counts: Path, more: list[str]) -> list[dict[str, Any]]:
        self.perplexity(file, more, {"LLAMA_EXPERT_COUNTS": str(counts)})
        layers: list[dict[str, Any]] = json.loads(counts.read_text())["layers"]
        return layers


def flat(values: list[int] | list[list[int]]) -> list[int]:
    return [n for v in values for n in (v if isinstance(v, list) else [v])]


def serve(program: Path, file: Path, prompts: list[str]) -> str:
    """How many texts are the same from 8 slots at once as one by one."""

    def ask(prompt: str) -> str:
        data = json.dumps({"prompt": prompt, "n_predict": 48, "temperature": 0, "cache_prompt": False}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}/completion", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.load(reply)["content"])

    words = [str(program), "-m", str(file), "-ngl", "99", "-np", "8", "-c", "4096", "--port", str(PORT)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.25)
        alone = [ask(p) for p in prompts]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, prompts))
    finally:
        server.terminate()
        server.wait()
    return f"{sum(a == b for a, b in zip(alone, together, strict=True))} of {len(prompts)} texts the same"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--bin", type=Path, required=True)
    p.add_argument("--base", type=Path)
    p.add_argument("--stock-bin", type=Path)
    p.add_argument("--chunks", type=int, default=16)
    p.add_argument("--out", type=Path, default=Path())
    args = p.parse_args()
    programs, logits = Programs(args.bin, args.text, args.chunks), args.out / "logits.bin"

    if args.stock_bin:
        stock = Programs(args.stock_bin, args.text, args.chunks)
        for name, batch in BATCHES.items():
            programs.save(args.file, logits, ["-ngl", "99", *batch])
            stock.save(args.file, args.out / "logits-stock.bin", ["-ngl", "99", *batch])
            same = logits.read_bytes() == (args.out / "logits-stock.bin").read_bytes()
            print(
                f"{args.file.name}, {name}: logits of the patched and the unpatched build are {'the same bytes' if same else 'DIFFERENT'}",
                flush=True,
            )

    print("\n| GPU against CPU, the same file | mean KLD | maximum | Same top p, % |\n|:---|---:|---:|---:|")
    programs.save(args.file, logits, CPU)
    for name, more in PLACEMENTS.items():
        print(f"| {name} | {programs.compare(args.file, logits, more)} |", flush=True)

    if args.base:
        print("\n| against the unquantized model | mean KLD | maximum | Same top p, % |\n|:---|---:|---:|---:|")
        programs.save(args.base, logits, CPU)
        for dispatch, key in DISPATCHES.items():
            for name, more in AGAINST_BASE.items():
                print(f"| {name}, {dispatch} | {programs.compare(args.file, logits, [*more, *key])} |", flush=True)
    logits.unlink()

    print("\n| selections counted differently, CPU and GPU | logical | physical | of |\n|:---|---:|---:|---:|")
    for name, batch in list(BATCHES.items())[:2]:
        for dispatch, key in DISPATCHES.items():
            cpu = programs.counts(args.file, args.out / "counts.json", [*CPU, *batch, *key])
            gpu = programs.counts(args.file, args.out / "counts.json", ["-ngl", "99", *batch, *key])
            for a, b in zip(cpu, gpu, strict=True):
                logical, physical = (
                    sum(abs(x - y) for x, y in zip(flat(a.get(k, [])), flat(b.get(k, [])), strict=True)) // 2
                    for k in ("logical", "physical")
                )
                print(f"| {name}, {dispatch}, layer {a['layer']} | {logical} | {physical} | {sum(flat(a['logical']))} |")
    (args.out / "counts.json").unlink()

    paragraphs = [t[:160] for t in args.text.read_text(encoding="utf-8").split("\n\n") if len(t) > 160][:24]
    server = args.bin / "llama-server"
    print(f"\nllama-server, 8 slots: {serve(server, args.file, paragraphs) if server.exists() else 'not built'}")


if __name__ == "__main__":
    main()
