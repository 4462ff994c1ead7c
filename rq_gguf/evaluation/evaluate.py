"""`rq-gguf eval`: quality against the base model and balance of the experts' load, on the user's texts, and accuracy on tasks."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rq_gguf
from rq_gguf.errors import UserError
from rq_gguf.evaluation.balance import COUNTS_VARIABLE, Balance, measure_balance, read_counts
from rq_gguf.evaluation.items import read_task
from rq_gguf.evaluation.quality import (
    LABELS,
    N_CTX,
    Figure,
    Quality,
    check_same_vocabulary,
    compare,
    parse_estimate,
    run_perplexity,
    save_logits,
)
from rq_gguf.evaluation.tasks import TaskResult, measure_tasks
from rq_gguf.evaluation.tasks import describe as task_lines
from rq_gguf.evaluation.tasks import to_json as tasks_json
from rq_gguf.evaluation.text import BLOCK, CHARACTERS_PER_CHUNK, mix, read_text
from rq_gguf.gguf_file import total_size
from rq_gguf.job import job_directory

log = logging.getLogger(__name__)

CHUNKS = 80
FILE_CHUNKS = 30
"""Chunks per text when each is run on its own, for its balance."""


@dataclass(frozen=True)
class TextBalance:
    """Balance on one text."""

    text: str
    balance: Balance
    ppl: Figure


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    out: Path
    base: Path
    out_bytes: int
    base_bytes: int
    texts: tuple[Path, ...]
    quality: Quality | None
    """On the mix of all texts; None where there are none."""
    balance: Balance | None
    """In the same run."""
    by_text: tuple[TextBalance, ...]
    """Each text by itself; empty where there is only one."""
    tasks: tuple[TaskResult, ...] = ()
    balance_base: Balance | None = None
    """Of the base, on the mix."""


@dataclass(frozen=True)
class _OnTexts:
    """What the texts say of one file."""

    quality: Quality | None = None
    balance: Balance | None = None
    by_text: tuple[TextBalance, ...] = ()
    balance_base: Balance | None = None


def evaluate(
    out: Path,
    base: Path,
    texts: Sequence[Path],
    tasks: Sequence[Path] = (),
    *,
    chunks: int = CHUNKS,
    file_chunks: int = FILE_CHUNKS,
    items: int | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run `out` and `base` on the texts, mixed evenly, `out` on each text by itself, and both on the tasks.

    out: a tiered or a stock GGUF. base: the GGUF that it was made from, or another of the same model. texts, tasks: one at least of
    either; tasks as tasks.measure_tasks takes them. chunks, file_chunks: chunks of 512 tokens at most, of the mix and of each text.
    items: how many of each task, evenly spaced; all where None. threads: llama.cpp's default where None.
    Raises UserError for files that are missing, no GGUFs or of different models, texts too short to be scored and malformed tasks.
    """
    (found,) = evaluate_all(
        [out], base, texts, tasks, chunks=chunks, file_chunks=file_chunks, items=items, threads=threads, progress=progress
    )
    return found


def evaluate_all(
    files: Sequence[Path],
    base: Path,
    texts: Sequence[Path],
    tasks: Sequence[Path] = (),
    *,
    chunks: int = CHUNKS,
    file_chunks: int = FILE_CHUNKS,
    items: int | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> tuple[Evaluation, ...]:
    """`evaluate` for several files of one base, which is run only once. file_chunks: 0 runs no text by itself. Raises UserError."""
    if chunks < 1:
        raise UserError(f"--chunks {chunks} leaves nothing to evaluate; give 1 or more")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} cannot run anything; give 1 or more")
    if not texts and not tasks:
        raise UserError("nothing to evaluate on; give at least one --text FILE or --tasks FILE")
    contents = [read_text(path) for path in texts]
    read = [read_task(path, items) for path in tasks]
    for out in files:
        check_same_vocabulary(out, base)
    found = _run_texts(files, base, texts, contents, chunks, file_chunks, threads, progress) if texts else [_OnTexts()] * len(files)
    answered = measure_tasks(files, base, read, threads=threads, progress=progress) if tasks else [()] * len(files)
    return tuple(
        Evaluation(out, base, total_size(out), total_size(base), tuple(texts), t.quality, t.balance, t.by_text, a, t.balance_base)
        for out, t, a in zip(files, found, answered, strict=True)
    )


def base_of(out: Path) -> Path:
    """The base model of a file that `build` wrote, where build left it. Raises UserError where it is not there."""
    base = job_directory(out) / "base.gguf"
    if not base.is_file():
        raise UserError(f"{base} is not there; name the GGUF that {out.name} was made from with --base")
    return base


def own_text() -> tuple[Path, ...]:
    """The project's held-out text, with a warning."""
    log.warning("no text given: using the project's own held-out text (public-domain prose); a text of your own kind says more")
    return (Path(rq_gguf.__file__).parent / "data" / "heldout.txt",)


def _run_texts(
    files: Sequence[Path],
    base: Path,
    texts: Sequence[Path],
    contents: Sequence[str],
    chunks: int,
    file_chunks: int,
    threads: int | None,
    progress: bool,
) -> list[_OnTexts]:
    """Per file, with the base run once."""
    found = []
    with tempfile.TemporaryDirectory(prefix="rq-gguf-eval-") as directory:
        work = Path(directory)
        mixed = work / ("mix.txt" if len(texts) > 1 else texts[0].name)
        block = min(BLOCK, max(256, chunks * CHARACTERS_PER_CHUNK // len(texts)))
        mixed.write_text(mix(contents, block), encoding="utf-8")
        logits, counts = work / "base-logits.bin", work / "counts.json"
        env = {COUNTS_VARIABLE: str(counts)}
        save_logits(base, mixed, logits, chunks=chunks, threads=threads, env=env, progress=progress)
        balance_base = measure_balance(read_counts(counts))
        for out in files:
            counts.unlink()  # a run that writes none must not pass for the one before
            quality = compare(out, mixed, logits, chunks=chunks, threads=threads, env=env, progress=progress)
            balance = measure_balance(read_counts(counts))
            alone = texts if file_chunks and len(texts) > 1 else []
            by_text = tuple(_run_text(out, path, file_chunks, threads, work, progress) for path in alone)
            found.append(_OnTexts(quality, balance, by_text, balance_base))
    return found


def _run_text(out: Path, text: Path, chunks: int, threads: int | None, work: Path, progress: bool) -> TextBalance:
    counts = work / "counts.json"
    counts.unlink(missing_ok=True)
    what = f"{out.name} on {text.stem}"
    env = {COUNTS_VARIABLE: str(counts)}
    printed = run_perplexity(out, ["-f", text], chunks=chunks, threads=threads, env=env, what=what, progress=progress)
    return TextBalance(text.name, measure_balance(read_counts(counts)), parse_estimate(printed, text))


def describe(e: Evaluation) -> str:
    """The evaluation as tables for people: quality on the mix, balance on the mix and on each text, accuracy on tasks."""
    lines = [f"{e.out} ({e.out_bytes:,} bytes) against {e.base} ({e.base_bytes:,} bytes)"]
    if e.quality is not None and e.balance is not None:
        lines += ["", *_text_lines(e, e.quality, e.balance)]
    if e.tasks:
        lines += ["", *task_lines(e.tasks)]
    return "\n".join(lines)


def _text_lines(e: Evaluation, q: Quality, balance: Balance) -> list[str]:
    n = len(e.texts)
    where = f"{n} texts mixed" if n > 1 else e.texts[0].name
    change = 100 * (q.ppl.value / q.ppl_base.value - 1)
    lines = [
        f"quality   {where}, {q.chunks} chunks of {N_CTX} tokens",
        *(f"  {label:<14}  {text}" for label, text in _quality_rows(q)),
        f"  {'PPL change':<14}  {change:+.2f} %",
        "",
        "balance   LIS as llama.cpp counted it, mean over layers (1 is even); reduction: mean over layers of before / after",
    ]
    rows = [("text", "tokens", "before", "after", "reduction", "per physical expert"), _balance_row(where, balance)]
    rows += [_balance_row(t.text, t.balance) for t in e.by_text]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for row in rows:
        lines.append("  " + "  ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True))))
    worst = balance.worst
    lines.append(
        f"  worst layer {worst.layer}: LIS {worst.before:.2f} -> {worst.after:.2f}; ratio of the means {balance.reduction_of_means:.2f}x"
    )
    if e.by_text:
        mean = sum(t.balance.reduction for t in e.by_text) / n
        lines.append(f"  mean reduction over the {n} texts, each by itself: {mean:.2f}x")
    return lines


def _quality_rows(q: Quality) -> list[tuple[str, str]]:
    digits = {"ppl": 4, "ppl_base": 4, "kld": 6, "kld_999": 6, "rms_dp": 3, "same_top": 3}
    rows = []
    for field, label in LABELS.items():
        figure: Figure = getattr(q, field)
        text = f"{figure.value:.{digits[field]}f}"
        if figure.error is not None:
            text += f" ± {figure.error:.{digits[field]}f}"
        rows.append((label, text + (" %" if field in ("rms_dp", "same_top") else "")))
    return rows


def _balance_row(name: str, b: Balance) -> tuple[str, ...]:
    return (name, f"{b.n_tokens:,}", f"{b.before:.2f}", f"{b.after:.2f}", f"{b.reduction:.2f}x", f"{b.over_physical:.2f}")


def to_json(e: Evaluation) -> dict[str, Any]:
    """The evaluation as plain data for json.dump."""
    data: dict[str, Any] = {
        "file": str(e.out),
        "base": str(e.base),
        "file_bytes": e.out_bytes,
        "base_bytes": e.base_bytes,
        "texts": [str(t) for t in e.texts],
    }
    if e.quality is not None and e.balance is not None:
        data |= {
            "quality": {"chunks": e.quality.chunks, **{label: asdict(getattr(e.quality, field)) for field, label in LABELS.items()}},
            "balance": _balance_json(e.balance),
            "by_text": [{"text": t.text, "PPL": asdict(t.ppl), "balance": _balance_json(t.balance)} for t in e.by_text],
        }
    if e.tasks:
        data["tasks"] = tasks_json(e.tasks)
    return data


def _balance_json(b: Balance) -> dict[str, Any]:
    return {
        "tokens": b.n_tokens,
        "lis_before": b.before,
        "lis_after": b.after,
        "lis_over_physical": b.over_physical,
        "reduction": b.reduction,
        "reduction_of_means": b.reduction_of_means,
        "layers": [asdict(x) for x in b.layers],
    }
