"""Time and peak resident memory of every step on a model larger than memory should have to be, beside llama-imatrix and llama-quantize.

    python tools/bench_scale.py DIR [--layers 4 8 16] [--tokens 4096] [--types LIST] [--steps model,calibrate,...]

DIR: gets a checkpoint of OLMoE-1B-7B's shape (64 experts, 8 per token, 2048 wide, 1024 inside; of Mixtral's family, whose tokenizer
llama.cpp can convert) with random weights, one file a layer, and for each smaller number of layers a folder of links to it. Steps:

model      the checkpoint: 0.85 GB a layer
calibrate  `rq-gguf calibrate`
convert    the checkpoint as a GGUF in BF16, of the same size
imatrix    llama-imatrix on that, as many tokens
plan       `rq-gguf plan` at Q4_K's bytes, without copies
write      `rq-gguf build` with that calibration and plan, and with the plan's error feedback turned off; llama-quantize to Q4_K with the
           same imatrix. Of the files written only one at a time is kept

Peak memory is the system's count for the process and its children (ru_maxrss); it includes pages of mapped files, and llama.cpp's programs
map the whole model. Processor seconds tell more than seconds where the machine does other work. Everything goes to DIR/bench_scale.json;
the table is printed. What is in the file is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rq_gguf.runtime.tools import tool_path
from rq_gguf.types import LADDER

ROOT = Path(__file__).resolve().parents[1]
N_EMBD, N_FF, N_EXPERT, TOP_K, N_HEADS, VOCABULARY = 2048, 1024, 64, 8, 16, 50304
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCABULARY, "hidden_size": N_EMBD,
    "intermediate_size": N_FF, "num_local_experts": N_EXPERT, "num_experts_per_tok": TOP_K, "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS, "head_dim": N_EMBD // N_HEADS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def make_layer(i: int) -> dict[str, torch.Tensor]:
    """Random weights of decoder layer i. The routers are wide enough to prefer some experts."""
    random = torch.Generator().manual_seed(i)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * gain / columns**0.5).bfloat16()

    p = f"model.layers.{i}."
    tensors = {f"{p}self_attn.{x}_proj.weight": matrix(N_EMBD, N_EMBD) for x in "qkvo"}
    tensors |= {f"{p}{x}_layernorm.weight": torch.ones(N_EMBD, dtype=torch.bfloat16) for x in ("input", "post_attention")}
    tensors[f"{p}block_sparse_moe.gate.weight"] = matrix(N_EXPERT, N_EMBD, 3.0)
    for e in range(N_EXPERT):
        for name, rows, columns in (("w1", N_FF, N_EMBD), ("w3", N_FF, N_EMBD), ("w2", N_EMBD, N_FF)):
            tensors[f"{p}block_sparse_moe.experts.{e}.{name}.weight"] = matrix(rows, columns)
    return tensors


def make_model(folder: Path, layers: int) -> Path:
    """The checkpoint with so many layers; what is there is not made again."""
    out = folder / f"layers-{layers}"
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights"
    weights.mkdir(exist_ok=True)
    ends = {
        "model.embed_tokens.weight": lambda: torch.randn(VOCABULARY, N_EMBD).bfloat16(),
        "lm_head.weight": lambda: (torch.randn(VOCABULARY, N_EMBD) / N_EMBD**0.5).bfloat16(),
        "model.norm.weight": lambda: torch.ones(N_EMBD, dtype=torch.bfloat16),
    }
    index: dict[str, str] = {}
    for i in range(-1, layers):
        path = weights / ("ends.safetensors" if i < 0 else f"layer-{i:02}.safetensors")
        tensors = {name: make() for name, make in ends.items()} if i < 0 else make_layer(i)
        if not path.exists():
            print(f"making {path.name}", file=sys.stderr)
            save_file(tensors, path.with_suffix(".partial"), {"format": "pt"})
            path.with_suffix(".partial").rename(path)
        index |= dict.fromkeys(tensors, path.name)
        (out / path.name).symlink_to(os.path.relpath(path, out))
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in TOKENIZER:
        (out / name).write_bytes((ROOT / "rq_gguf" / "data" / "demo" / name).read_bytes())
    (out / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    return out


def measured(command: Sequence[str | Path]) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak GB) of a command. Its output goes to stderr; what fails ends the program."""
    start = time.perf_counter()
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed with status {os.waitstatus_to_exitcode(status)}: {' '.join(map(str, command))}")
    scale = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale / 1e9


class Bench:
    """Figures by name, kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.file = args.folder / "bench_scale.json"
        self.figures: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, layers: int, name: str, command: Sequence[str | Path]) -> None:
        key = f"{layers} layers, {name}"
        if key in self.figures:
            return
        print(f"--- {key}", file=sys.stderr)
        seconds, processor, peak = measured(command)
        figures = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1), "peak_gb": round(peak, 2)}
        self.figures[key] = {"layers": layers, "step": name, **figures}
        self.file.write_text(json.dumps(self.figures, indent=2) + "\n")

    def steps(self, layers: int) -> None:
        args, folder = self.args, self.args.folder
        steps = args.steps.split(",")
        base, calibration = folder / f"layers-{layers}.gguf", folder / f"calibration-{layers}.gguf"
        plan, plain = folder / f"plan-{layers}.json", folder / f"plan-{layers}-plain.json"
        imatrix, out, text = folder / f"imatrix-{layers}.gguf", folder / "out.gguf", folder / "text.txt"
        limit = ["--max-memory", args.max_memory] if args.max_memory else []
        ours = [sys.executable, "-m", "rq_gguf"]
        if "model" in steps:
            make_model(folder, layers)
        model = folder / f"layers-{layers}"
        if "calibrate" in steps:
            options = ["--text", args.text, "--tokens", str(args.tokens), "--device", args.device, "--types", args.types, *limit]
            self.run(layers, f"calibrate, {args.tokens} tokens", [*ours, "calibrate", model, "-o", calibration, *options])
        if "convert" in steps:
            code = (
                "import sys; from pathlib import Path; from rq_gguf.writing.convert import convert_base as c; c(*map(Path, sys.argv[1:]))"
            )
            self.run(layers, "convert", [sys.executable, "-c", code, model, base])
        if "imatrix" in steps:
            text.write_text(args.text.read_text(encoding="utf-8")[: args.tokens * 5], encoding="utf-8")
            options = ["-c", "512", "--chunks", str(max(1, args.tokens // 512)), "-t", str(args.threads)]
            command = [tool_path("llama-imatrix"), "-m", base, "-f", text, "-o", imatrix, *options]
            self.run(layers, f"llama-imatrix, {args.tokens} tokens", command)
        if "plan" in steps:
            self.run(layers, "plan", [*ours, "plan", calibration, "-o", plan, "--budget", "q4_k", "--replicas", "0"])
            plain.write_text(plan.read_text().replace('"feedback": true', '"feedback": false'))
        if "write" in steps:
            for name, given in (("write", plan), ("write, no error feedback", plain)):
                self.run(layers, name, [*ours, "build", base, out, "--calibration", calibration, "--plan", given, "--force", *limit])
            out.unlink(missing_ok=True)
            options = ["--imatrix", calibration, "--tensor-type", "exps=q4_k"]
            self.run(layers, "llama-quantize", [tool_path("llama-quantize"), *options, base, out, "Q8_0", str(args.threads)])
            out.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text", type=Path, default=ROOT / "rq_gguf" / "data" / "calibration" / "books.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory")
    parser.add_argument("--types", default=",".join(LADDER))
    parser.add_argument("--steps", default="model,calibrate,convert,imatrix,plan,write")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for layers in args.layers:
        bench.steps(layers)
    print("| layers | step | seconds | processor seconds | peak GB |\n|---:|:---|---:|---:|---:|")
    for f in bench.figures.values():
        print(f"| {f['layers']} | {f['step']} | {f['seconds']} | {f['processor_seconds']} | {f['peak_gb']} |")


if __name__ == "__main__":
    main()
