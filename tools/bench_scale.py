"""Time and peak memory of every step on a model larger than memory should have to be, beside llama-imatrix and llama-quantize.

    python tools/bench_scale.py DIR [--layers 4 8 16] [--tokens 4096] [--device cpu] [--types LIST] [--steps model,calibrate,...]

DIR: gets a checkpoint of OLMoE-1B-7B's shape (64 experts, 8 per token, 2048 wide, 1024 inside; of Mixtral's family, whose tokenizer
llama.cpp can convert) with random weights, one file a layer, and for each smaller number of layers a folder of links to it. Steps:

model      the checkpoint: 0.85 GB a layer
calibrate  `rq-gguf calibrate` on the given device
convert    the checkpoint as a GGUF in BF16, of the same size
imatrix    llama-imatrix on that, as many tokens
plan       `rq-gguf plan` at Q4_K's bytes, without copies
write      `rq-gguf build` with that calibration and plan, with the plan's error feedback turned off, and with all experts in Q4_K without
           feedback, which is what llama-quantize then does with the same imatrix. Of the files written only one at a time is kept

Peak memory is the system's count for the process and its children (ru_maxrss); it includes pages of mapped files, and llama.cpp's programs
map the whole model. A GPU's is the most that nvidia-smi saw in use, looked at four times a second, over what was in use before. Processor
seconds tell more than seconds where the machine does other work. Everything goes to DIR/bench_scale.json; the table is printed. What is in
the file is not run again; `--steps ""` only prints.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rq_gguf.runtime.tools import tool_path
from rq_gguf.threads import available_threads
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
_CHARACTERS = 8
"""Of the text for each token that is to be passed: more than enough with the demo model's tokenizer."""


def make_layer(i: int, device: str) -> dict[str, torch.Tensor]:
    """Random weights of decoder layer i. The routers are wide enough to prefer some experts."""
    random = torch.Generator(device).manual_seed(i)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random, device=device) * gain / columns**0.5).bfloat16().cpu()

    p = f"model.layers.{i}."
    tensors = {f"{p}self_attn.{x}_proj.weight": matrix(N_EMBD, N_EMBD) for x in "qkvo"}
    tensors |= {f"{p}{x}_layernorm.weight": torch.ones(N_EMBD, dtype=torch.bfloat16) for x in ("input", "post_attention")}
    tensors[f"{p}block_sparse_moe.gate.weight"] = matrix(N_EXPERT, N_EMBD, 3.0)
    for e in range(N_EXPERT):
        for name, rows, columns in (("w1", N_FF, N_EMBD), ("w3", N_FF, N_EMBD), ("w2", N_EMBD, N_FF)):
            tensors[f"{p}block_sparse_moe.experts.{e}.{name}.weight"] = matrix(rows, columns)
    return tensors


def make_model(folder: Path, layers: int, device: str) -> Path:
    """The checkpoint with so many layers; what is there is not made again. device: what draws the random numbers."""
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
        if not path.exists():
            print(f"making {path.name}", file=sys.stderr)
            tensors = {name: make() for name, make in ends.items()} if i < 0 else make_layer(i, device)
            save_file(tensors, path.with_suffix(".partial"), {"format": "pt"})
            path.with_suffix(".partial").rename(path)
        with safe_open(path, "pt") as f:
            index |= dict.fromkeys(f.keys(), path.name)
        (out / path.name).symlink_to(os.path.relpath(path, out))
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in TOKENIZER:
        (out / name).write_bytes((ROOT / "rq_gguf" / "data" / "demo" / name).read_bytes())
    (out / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    return out


def write_text(path: Path, given: Path | None, tokens: int) -> None:
    """A text of at least so many tokens: the given one, or the project's, as often as it takes."""
    texts = [given] if given else sorted((ROOT / "rq_gguf" / "data" / "calibration").glob("*.txt"))
    text = "\n".join(t.read_text(encoding="utf-8") for t in texts)
    path.write_text(text * (1 if given else 1 + tokens * _CHARACTERS // len(text)), encoding="utf-8")


class GpuMemory:
    """The most memory in use on the GPUs, while inside, over what was before; None without nvidia-smi."""

    def __init__(self) -> None:
        self.peak_gb: float | None = None
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._run, args=(self._used(),), daemon=True)

    @staticmethod
    def _used() -> float | None:
        if shutil.which("nvidia-smi") is None:
            return None
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        printed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        with contextlib.suppress(ValueError):
            return sum(float(line) for line in printed.split()) * 2**20 / 1e9
        return None

    def _run(self, before: float | None) -> None:
        while before is not None and not self._done.wait(0.25):
            self.peak_gb = max(self.peak_gb or 0.0, (self._used() or before) - before)

    def __enter__(self) -> "GpuMemory":
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def measured(command: Sequence[str | Path]) -> dict[str, float]:
    """Seconds, processor seconds and peak GB of a command. Its output goes to stderr; what fails ends the program."""
    start = time.perf_counter()
    with GpuMemory() as gpu:
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=sys.stderr, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed with status {os.waitstatus_to_exitcode(status)}: {' '.join(map(str, command))}")
    scale = 1 if sys.platform == "darwin" else 1024
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * scale / 1e9, 2),
    }
    return figures | ({} if gpu.peak_gb is None else {"gpu_gb": round(gpu.peak_gb, 2)})


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
        self.figures[key] = {"layers": layers, "step": name, "threads": available_threads(), **measured(command)}
        self.file.write_text(json.dumps(self.figures, indent=2) + "\n")

    def steps(self, layers: int) -> None:
        args, folder = self.args, self.args.folder
        steps = args.steps.split(",")
        base, calibration = folder / f"layers-{layers}.gguf", folder / f"calibration-{layers}.gguf"
        plan, plain, same = (folder / f"plan-{layers}{name}.json" for name in ("", "-plain", "-q4_k"))
        imatrix, out, text = folder / f"imatrix-{layers}.gguf", folder / "out.gguf", folder / "text.txt"
        limit = ["--max-memory", args.max_memory] if args.max_memory else []
        ours = [sys.executable, "-m", "rq_gguf"]
        if "model" in steps:
            make_model(folder, layers, args.device)
        model = folder / f"layers-{layers}"
        write_text(text, args.text, args.tokens)
        if "calibrate" in steps:
            options = ["--text", text, "--tokens", str(args.tokens), "--device", args.device, "--types", args.types, *limit]
            name = f"calibrate, {args.tokens} tokens" + ("" if args.device == "cpu" else f", {args.device}")
            name += "" if args.types == ",".join(LADDER) else f", {args.types}"
            self.run(layers, name, [*ours, "calibrate", "--verbose", model, "-o", calibration, *options])
        if "convert" in steps:
            code = (
                "import sys; from pathlib import Path; from rq_gguf.writing.convert import convert_base as c; c(*map(Path, sys.argv[1:]))"
            )
            self.run(layers, "convert", [sys.executable, "-c", code, model, base])
        if "imatrix" in steps:
            options = ["-c", "512", "--chunks", str(max(1, args.tokens // 512)), "-t", str(args.threads)]
            command = [tool_path("llama-imatrix"), "-m", base, "-f", text, "-o", imatrix, *options]
            self.run(layers, f"llama-imatrix, {args.tokens} tokens", command)
        if "plan" in steps:
            options = ["--budget", "q4_k", "--replicas", "0"]
            self.run(layers, "plan", [*ours, "plan", calibration, "-o", plan, *options])
            subprocess.run([*ours, "plan", calibration, "-o", same, *options, "--types", "q4_k"], cwd=ROOT, check=True, stdout=sys.stderr)
            for path, source in ((plain, plan), (same, same)):
                path.write_text(source.read_text().replace('"feedback": true', '"feedback": false'))
        if "write" in steps:
            for name, given in (("write", plan), ("write, no error feedback", plain), ("write, Q4_K alone, no error feedback", same)):
                self.run(layers, name, [*ours, "build", base, out, "--calibration", calibration, "--plan", given, "--force", *limit])
            out.unlink(missing_ok=True)
            options = ["--imatrix", calibration, "--tensor-type", "exps=q4_k"]
            self.run(layers, "llama-quantize, Q4_K", [tool_path("llama-quantize"), *options, base, out, "Q8_0", str(args.threads)])
            out.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text", type=Path, help="the project's calibration texts where not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for model and calibrate")
    parser.add_argument("--threads", type=int, default=available_threads(), help="of llama.cpp's programs")
    parser.add_argument("--max-memory")
    parser.add_argument("--types", default=",".join(LADDER))
    parser.add_argument("--steps", default="model,calibrate,convert,imatrix,plan,write")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for layers in args.layers:
        bench.steps(layers)
    print(table(list(bench.figures.values())))


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the runs."""
    columns = {"layers": "layers", "step": "step", "seconds": "seconds", "processor_seconds": "processor seconds", "peak_gb": "peak GB"}
    if any("gpu_gb" in f for f in figures):
        columns["gpu_gb"] = "peak GB on the GPU"
    rows = [[str(f.get(key, "")) for key in columns] for f in figures]
    marks = [":---" if key == "step" else "---:" for key in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(columns.values()), marks, *rows])


if __name__ == "__main__":
    main()
