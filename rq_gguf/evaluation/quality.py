"""Perplexity and divergence from a base model, by driving llama-perplexity. Figures keep that program's labels."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rq_gguf.errors import UserError
from rq_gguf.gguf_file import read_header
from rq_gguf.progress import Bar
from rq_gguf.runtime.tools import Output, last_error, run_tool

N_CTX = 512
"""Tokens of a chunk. llama-perplexity scores the second half of each."""

_STATISTIC = re.compile(r"(\S[^:]*?) *: *([-+]?[\w.]+)(?: *± *([-+]?[\w.]+))?(?: *%)?")


@dataclass(frozen=True)
class Figure:
    """A figure as llama-perplexity prints it, with its standard error where it prints one."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Quality:
    """How a file differs from its base on a text."""

    chunks: int
    ppl: Figure
    """Mean PPL(Q): perplexity of the file."""
    ppl_base: Figure
    """Mean PPL(base)"""
    kld: Figure
    """Mean KLD: Kullback-Leibler divergence from the base's next-token probabilities, in nats."""
    kld_999: Figure
    """99.9% KLD: the percentile."""
    rms_dp: Figure
    """RMS Δp: change of the right token's probability, in per cent."""
    same_top: Figure
    """Same top p: share of positions where both have the same most likely token, in per cent."""


LABELS = {
    "ppl": "Mean PPL(Q)",
    "ppl_base": "Mean PPL(base)",
    "kld": "Mean KLD",
    "kld_999": "99.9% KLD",
    "rms_dp": "RMS Δp",
    "same_top": "Same top p",
}
"""Field of Quality -> llama-perplexity's label, spaces run together."""


def save_logits(
    base: Path,
    text: Path,
    logits: Path,
    *,
    chunks: int,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Run the base on the first chunks of a text and keep its logits in a file.

    Raises UserError for a text too short, too little space, and whatever llama-perplexity refuses.
    """
    check_space(logits.parent, logits_bytes(vocabulary_size(base), chunks))
    args: list[str | Path] = ["-f", text, "--kl-divergence-base", logits]
    printed = run_perplexity(base, args, chunks=chunks, threads=threads, env=env, what=f"base on {text.stem}", progress=progress)
    parse_estimate(printed, text)


def compare(
    out: Path,
    text: Path,
    logits: Path,
    *,
    chunks: int,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Quality:
    """Compare a file with a base's logits from `save_logits` of the same text and chunks. env: environment variables for the run."""
    args: list[str | Path] = ["-f", text, "--kl-divergence-base", logits, "--kl-divergence"]
    what = f"{out.name} on {text.stem}"
    return parse_statistics(run_perplexity(out, args, chunks=chunks, threads=threads, env=env, what=what, progress=progress))


def run_perplexity(
    model: Path,
    args: list[str | Path],
    *,
    chunks: int,
    what: str,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Output:
    """Run llama-perplexity on a model with a bar of its chunks. Raises UserError where it fails."""
    command: list[str | Path] = ["llama-perplexity", "-m", model, *args, "-c", str(N_CTX), "--chunks", str(chunks)]
    if threads is not None:
        command += ["-t", str(threads)]
    with _ChunkBar(what, chunks, progress) as bar:
        return run_tool(command, env=env, on_output=bar.feed)


def parse_statistics(printed: Output) -> Quality:
    """The final statistics of a run with --kl-divergence. Raises UserError where one is missing or not finite."""
    found = {}
    for line in printed.stdout.splitlines():
        if match := _STATISTIC.fullmatch(line.strip()):
            found[" ".join(match[1].split())] = (match[2], match[3])
    figures = {}
    for field, label in LABELS.items():
        if label not in found:
            raise UserError(f"llama-perplexity printed no '{label}': {last_error(printed)}")
        value, error = found[label]
        figures[field] = Figure(_number(label, value), None if error is None else _number(label, error, finite=False))
    chunks = re.findall(r"computing over (\d+) chunks", printed.stdout + printed.stderr)
    if not chunks:
        raise UserError(f"llama-perplexity did not say how many chunks it ran: {last_error(printed)}")
    return Quality(chunks=int(chunks[0]), **figures)


def parse_estimate(printed: Output, text: Path) -> Figure:
    """The perplexity of a plain run. Raises UserError where there is none, as with a text that is too short."""
    match = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", printed.stdout + printed.stderr)
    if match is None:
        raise UserError(
            f"llama-perplexity scored nothing of {text.name}: give a text of at least {2 * N_CTX} tokens ({last_error(printed)})"
        )
    return Figure(_number("PPL", match[1]), _number("PPL", match[2], finite=False))


def _number(label: str, text: str, finite: bool = True) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"llama-perplexity printed '{text}' for '{label}', which is no number") from None
    if finite and not math.isfinite(value):
        raise UserError(f"llama-perplexity printed '{text}' for '{label}': the model gives probabilities that are not finite")
    # The error of a difference that is zero everywhere comes out as nan.
    return value if math.isfinite(value) else 0.0


def check_same_vocabulary(out: Path, base: Path) -> None:
    """Raise UserError unless two GGUFs are of one architecture, shape and vocabulary: llama-perplexity would compare them anyway."""
    ours, theirs = read_header(out), read_header(base)
    arch = ours.get("general.architecture")
    if theirs.get("general.architecture") != arch:
        raise UserError(f"{base} is no base of {out}: its architecture is {theirs.get('general.architecture')}, not {arch}")
    for key in ("block_count", "embedding_length", "expert_count", "expert_used_count"):
        a, b = ours.get(f"{arch}.{key}"), theirs.get(f"{arch}.{key}")
        if a != b:
            raise UserError(f"{base} is no base of {out}: its {arch}.{key} is {b}, not {a}")
    tokens = "tokenizer.ggml.tokens"
    if tokens in ours.values and tokens in theirs.values and ours.values[tokens].raw != theirs.values[tokens].raw:
        raise UserError(f"{base} is no base of {out}: it has another vocabulary; give the file that {out.name} was made from")


def vocabulary_size(model: Path) -> int:
    """Tokens in a GGUF's vocabulary. Raises UserError where it has none."""
    embedding = read_header(model).tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{model} has no token_embd.weight, so it is no language model")
    return embedding.n_rows


def logits_bytes(n_vocab: int, chunks: int) -> int:
    """Most bytes that llama-perplexity writes as a base's logits: 16 bits per token of the vocabulary and scored position."""
    scored = N_CTX - 1 - N_CTX // 2
    return 20 + chunks * (4 * N_CTX + 2 * scored * (2 * ((n_vocab + 1) // 2) + 4))


def check_space(directory: Path, needed: int) -> None:
    """Raise UserError where a directory has not the space."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"the base's logits take {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free: set TMPDIR to a larger disk, or "
            "use fewer chunks"
        )


class _ChunkBar:
    """A progress bar fed with what llama-perplexity prints: `[n]ppl,` per chunk, or a table with a line per chunk."""

    _DONE = re.compile(r"\[(\d+)\]-?[\dn]|^ *(\d+) .*±.*\n", re.MULTILINE)

    def __init__(self, what: str, chunks: int, shown: bool) -> None:
        self._bar = Bar(total=chunks, desc=what, unit="chunk", delay=0.5, leave=False, disable=None if shown else True)
        self._tail = ""

    def __enter__(self) -> "_ChunkBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def feed(self, piece: str) -> None:
        self._tail = (self._tail + piece)[-4096:]
        done = max((int(m[1] or m[2]) for m in self._DONE.finditer(self._tail)), default=0)
        self._bar.update(max(0, min(done, self._bar.total) - self._bar.n))
