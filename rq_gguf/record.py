"""`rq-gguf trace`: record which experts a text's tokens pick, in torch or in llama.cpp."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rq_gguf.calibration.trace import Trace, is_zip, read_trace, write_trace
from rq_gguf.errors import UserError
from rq_gguf.evaluation.tasks import ItemBar, default_threads, search_path
from rq_gguf.extras import need
from rq_gguf.inputs import gguf_of, model_directory, model_name, read_text
from rq_gguf.progress import Bar
from rq_gguf.runtime.tools import library_path, run_tool
from rq_gguf.vram.hits import PARTS, Hits, study_halves


def record_routing(model: str, out: Path, *, text: Path | None, tokens: int, device: str, max_memory: int | None) -> Trace:
    """Record a model's routing on a text and write the trace. max_memory: bytes. Raises UserError."""
    content, gguf = read_text(text), gguf_of(model)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: {'it is a directory' if out.is_dir() else 'its directory does not exist'}")
    if gguf is not None:
        if max_memory is not None or device not in ("auto", "cpu"):
            raise UserError(f"--device and --max-memory are for models in torch; {model} is a GGUF, which llama.cpp runs")
        made = _with_llama(gguf, content, tokens)
    else:
        need("calibrate", f"recording the routing of {model}")
        directory = model_directory(model)
        from rq_gguf.calibration.record import record

        made = record(directory, content, tokens=tokens, device=device, work=out.absolute().parent, max_memory=max_memory)
    made = replace(made, model=model_name(model))
    write_trace(out, made)
    return made


def _with_llama(model: Path, text: str, tokens: int) -> Trace:
    request = {
        "library": str(library_path("llama")),
        "ggml": str(library_path("ggml-base")),
        "model": str(model),
        "text": text,
        "tokens": tokens,
        "threads": default_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="rq-gguf-trace-") as directory, ItemBar(model.name, tokens, True, "tok") as bar:
        request_file, answer_file = Path(directory, "request.json"), Path(directory, "answer.npz")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # -P: no module of the user's working directory takes the place of one of Python's.
        command: list[str | Path] = [sys.executable, "-P", "-m", "rq_gguf.evaluation.routing", request_file, answer_file]
        run_tool(command, env={"PYTHONPATH": search_path()}, on_output=bar.feed)
        if not is_zip(answer_file):
            raise UserError(json.loads(answer_file.read_text(encoding="utf-8"))["error"])
        return read_trace(answer_file)


def hot_experts(trace: Trace) -> list[Hits]:
    """What busy experts in VRAM would catch of a trace; nothing where it is too short to tell."""
    with Bar(total=len(PARTS), desc="counting", leave=False, disable=None, delay=1) as bar:
        try:
            return study_halves(trace, bar.update)
        except ValueError:
            return []


def to_json(trace: Trace, out: Path) -> dict[str, Any]:
    """Figures for programs."""
    return {
        "file": str(out),
        "model": trace.model,
        "tokens": trace.n_tokens,
        "sequences": len(trace.starts) - 1,
        "layers": list(trace.layers),
        "experts": trace.n_expert,
        "experts_used": trace.n_expert_used,
    }
