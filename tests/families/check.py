"""A random model of a family, all the way: calibrated, built, run by llama.cpp, compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from families.cases import Case
from families.vocabulary import SIZES, save_vocabulary
from golden.llama_lib import Job, Result, Step, prompt, run
from golden.reference import nmse
from numpy.typing import NDArray
from tiny_models import tiny_model

from rq_gguf.build import build
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any
from rq_gguf.choices import check_choices
from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.runtime.tools import library_path, run_tool
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.others import parse_others
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model

HELD_OUT = Path(__file__).resolve().parents[2] / "rq_gguf" / "data" / "heldout.txt"
TEXT = 8000
"""Characters to calibrate on: enough for every path, too few for good statistics."""
TYPES = "q2_k,q4_k,q6_k,q8_0"
N_PROMPT = 24
MOST_DIFFERENT = 1e-6
"""nmse of a token's logits against transformers', everything in F32. The most that was seen is 1e-9, and another expert gives 0.1."""
MOST_CHANGED = 0.4
"""Median nmse of a token's logits when the experts go from F32 to a plan of Q4_K's bytes, the rest to Q8_0. Another expert's weights in the
place of the right ones give about 1."""


@dataclass(frozen=True)
class Found:
    """What was measured on a case."""

    arch: str
    copies: int
    """In the built file."""
    same_as_stock: bool
    """Copies and shuffled tiers in F16, and one tier in Q8_0: the logits of the unpatched llama.cpp, bit for bit."""
    from_transformers: float
    """Highest nmse of a token."""
    from_f32: float
    """Median nmse of a token in the built file."""


def save_model(case: Case, directory: Path) -> torch.nn.Module:
    """A checkpoint with its tokenizer: float32, with values that F16 holds too, so that experts in F16 are the same."""
    model = tiny_model(case.model_type, case.size, case.seed, **case.changes)
    for p in model.parameters():
        p.copy_(p.half().float())
    model.save_pretrained(directory)
    save_vocabulary(case.vocabulary, directory)
    return model


def stock_file(case: Case, folder: Path, type_name: str) -> Path:
    """A model of the case as llama-quantize makes it."""
    save_model(case, folder / "model")
    convert_base(folder / "model", folder / "base.gguf", progress=False)
    run_tool(["llama-quantize", folder / "base.gguf", folder / "stock.gguf", type_name, "2"])
    return folder / "stock.gguf"


def steps(vocabulary: int, seed: int) -> list[Step]:
    """Two prompts, then one token of the first sequence, then one of each: decode and prefill take different paths."""
    tokens = np.random.default_rng(seed).integers(3, vocabulary, 2 * N_PROMPT + 3).tolist()
    first, second = tokens[:N_PROMPT], tokens[N_PROMPT : 2 * N_PROMPT]
    a, b, c = tokens[2 * N_PROMPT :]
    return [prompt(first, 0), prompt(second, 1), Step((a,), (N_PROMPT,), (0,)), Step((b, c), (N_PROMPT + 1, N_PROMPT), (0, 1))]


def logits_of(model: torch.nn.Module, taken: list[Step]) -> list[NDArray[np.float32]]:
    """transformers' logits for the same steps."""
    sequences: dict[int, list[int]] = {}
    for step in taken:
        for token, s in zip(step.tokens, step.sequences, strict=True):
            sequences.setdefault(s, []).append(token)
    with torch.inference_mode():
        whole = {s: model(input_ids=torch.tensor([t]), use_cache=False).logits[0].numpy() for s, t in sequences.items()}
    return [np.stack([whole[s][p] for s, p in zip(step.sequences, step.positions, strict=True)]) for step in taken]


@contextmanager
def through(script: str) -> Iterator[None]:
    """The converter is run through a script of this folder, if one is named."""
    if not script:
        yield
        return

    def run_through(args: list[Any], **options: Any) -> Any:
        python, converter, *rest = args
        return run_tool([python, Path(__file__).with_name(script), converter, *rest], **options)

    with patch("rq_gguf.writing.convert.run_tool", run_through):
        yield


def plan_of(base: Path, seed: int, type_name: str, copies: int, calibration: Calibration) -> Plan:
    """All experts in one type, some of them several times."""
    rng = np.random.default_rng(seed)
    layers = []
    with Source(base) as source:
        for shape in source.shape.layers:
            instances = 1 + np.bincount(rng.integers(0, shape.n_expert, copies), minlength=shape.n_expert)
            rows = tuple((type_name,) * n for n in instances)
            layers.append(LayerPlan(shape.layer, rows, rows))
    return Plan("budget", "f16", 1 << 40, 0, (type_name,), tuple(layers), "c" * 64, calibration.n_tokens, "random", dispatch_block=1)


def check(case: Case, work: Path, runtime: Path, stock: Path) -> Found:
    """Build a file as a user would, and files that must compute what stock llama.cpp does; run them."""
    directory, text, out = work / "model", work / "text.txt", work / "out.gguf"
    model = save_model(case, directory)
    text.write_text(HELD_OUT.read_text(encoding="utf-8")[:TEXT], encoding="utf-8")
    with through(case.converter):
        report = build(str(directory), out, check_choices("q4_k", TYPES, "4", "budget"), calibration=text, say=lambda line: None)
    base, ggml = report.job / "base.gguf", Ggml(library_path("ggml-base"))
    calibration = read_any(report.job / "calibration.gguf")
    taken = steps(SIZES[case.vocabulary], case.seed)

    def run_file(path: Path, library: Path) -> Result:
        return run(Job(library / "libllama.so", path, taken, n_ctx=128, n_ubatch=64, repack=False, precise=True), work)

    def same(type_name: str, copies: int, file_type: str) -> bool:
        """Whether a tiered file and llama-quantize's of the same types give the same logits."""
        ours, theirs, plan = work / "ours.gguf", work / "theirs.gguf", plan_of(base, case.seed, type_name, copies, calibration)
        write_model(base, plan, calibration, ours, ggml=ggml, others=parse_others(file_type), progress=False)
        options = ["--imatrix", report.job / "calibration.gguf", "--tensor-type", f"_exps={type_name}"]
        run_tool(["llama-quantize", *options, base, theirs, file_type, "2"], unpatched=True)
        pairs = zip(run_file(ours, runtime).logits, run_file(theirs, stock).logits, strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    reference, built = run_file(base, stock), run_file(out, runtime)
    with Source(base) as source:
        arch = source.shape.arch
    return Found(
        arch=arch,
        copies=sum(sum(layer.copies) for layer in report.plan.layers),
        same_as_stock=same("f16", 5, "F16") and same("q8_0", 0, "Q8_0"),
        from_transformers=max(float(nmse(a, b).max()) for a, b in zip(reference.logits, logits_of(model, taken), strict=True)),
        from_f32=float(np.median(np.concatenate([nmse(a, b) for a, b in zip(built.logits, reference.logits, strict=True)]))),
    )
