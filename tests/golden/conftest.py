"""Files that the golden tests share: the demo model as GGUFs, tokens, and what llama.cpp and the reference make of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from golden.llama_lib import Job, Result, Step, prompt, run
from golden.reference import Model, Reference, load, nmse

from rq_gguf.runtime.tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
N_SEQUENCES = 8
PREFIX = 24
PREFILL = 512


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="session")
def stock_file(demo_base, work) -> Callable[..., Path]:
    """Makes what llama-quantize makes of the demo model: experts in a type, the rest in Q8_0."""
    made: dict[tuple[str, Path | None], Path] = {}

    def make(type_name: str, imatrix: Path | None = None) -> Path:
        if (type_name, imatrix) not in made:
            path = work / f"stock-{type_name}{'-imatrix' if imatrix else ''}.gguf"
            options = ["--imatrix", imatrix] if imatrix else []
            run_tool(["llama-quantize", *options, "--tensor-type", f"_exps={type_name}", demo_base, path, "Q8_0", "2"])
            made[type_name, imatrix] = path
        return made[type_name, imatrix]

    return make


@pytest.fixture(scope="session")
def tokens(demo_model) -> list[int]:
    """English, as the demo model's vocabulary splits it."""
    vocabulary = sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model"))
    text = (ROOT / "rq_gguf" / "data" / "heldout.txt").read_text(encoding="utf-8")
    return vocabulary.encode(text[:20000])


@pytest.fixture(scope="session")
def steps(tokens) -> list[Step]:
    """Prompts of 8 sequences, then decoding of 1, 2, 4 and 8 of them at a time, then a prefill of 512 tokens of a ninth."""
    bos, made, at = 1, [], 0
    for s in range(N_SEQUENCES):
        made.append(prompt([bos, *tokens[at : at + PREFIX]], s))
        at += PREFIX + 8
    length = [PREFIX + 1] * N_SEQUENCES
    for n in (1, 2, 4, 8):
        chosen = tuple(range(n))
        made.append(Step(tuple(tokens[32 * s + length[s] - 1] for s in chosen), tuple(length[s] for s in chosen), chosen))
        for s in chosen:
            length[s] += 1
    made.append(prompt([bos, *tokens[at : at + PREFILL - 1]], N_SEQUENCES))
    return made


@dataclass(frozen=True)
class Compared:
    """A file's run and the reference's, step by step."""

    result: Result
    errors: list[np.ndarray]
    """nmse of each token"""
    regret: float
    """Reference.regret, the most over steps."""
    physical_equal: bool
    """Whether all ids of physical experts are those that the reference expects; True where a layer has no map."""


def compare(model: Model, result: Result, steps: list[Step]) -> Compared:
    """What the reference makes of a run of llama.cpp, given the logical experts that llama.cpp chose."""
    reference, errors, regret, equal = Reference(model), [], 0.0, True
    # Small matrices: torch's threads cost more than they bring, ten times as much where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step, logits, captured in zip(steps, result.logits, result.captured, strict=True):
        forced = [captured[f"ffn_moe_topk-{i}"].astype(np.int64) for i in range(model.n_layer)]
        expected = reference.step(np.array(step.tokens), np.array(step.positions), np.array(step.sequences), forced)
        errors.append(nmse(logits, expected.numpy()))
        regret = max(regret, reference.regret)
        for i, routed in enumerate(reference.routed):
            physical = captured.get(f"ffn_moe_phys-{i}")
            equal = equal and (physical is None or np.array_equal(physical, routed["physical"]))
    torch.set_num_threads(threads)
    return Compared(result, errors, regret, equal)


@pytest.fixture(scope="session")
def compared(runtime, steps, work) -> Callable[..., Compared]:
    """Runs a file on the patched llama.cpp and compares it with the reference."""
    cached = lru_cache(maxsize=1)(load)

    def make(path: Path, **options) -> Compared:
        result = run(Job(runtime / "libllama.so", path, steps, capture=True, **options), work)
        model, overrides = cached(path), options.get("overrides", {})
        model = replace(
            model,
            dispatch=overrides.get("rq.dispatch", model.dispatch),
            block=overrides.get("rq.dispatch_block", model.block),
        )
        return compare(model, result, steps)

    return make
