"""`rq-gguf compare`: files of one model side by side. The base is run once for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq_gguf.bench.measure import Bench, Options, Variant, bench, variants_of
from rq_gguf.bench.spread import ratio, spread
from rq_gguf.bench.table import figures, notes, table
from rq_gguf.bench.table import to_json as bench_json
from rq_gguf.evaluation.balance import Balance
from rq_gguf.evaluation.evaluate import Evaluation, evaluate_all
from rq_gguf.evaluation.evaluate import to_json as evaluation_json
from rq_gguf.evaluation.quality import N_CTX, Figure
from rq_gguf.evaluation.tasks import Accuracy
from rq_gguf.size import Size, model_size


@dataclass(frozen=True)
class Comparison:
    """What `compare_files` found, in the order of the files."""

    variants: tuple[Variant, ...]
    """The base, then the files."""
    sizes: tuple[Size, ...]
    """Of the same."""
    evaluations: tuple[Evaluation, ...]
    """Of the files."""
    bench: Bench | None


def compare_files(
    files: Sequence[Path],
    base: Path,
    texts: Sequence[Path],
    tasks: Sequence[Path] = (),
    *,
    speed: Options | None,
    chunks: int,
    items: int | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Quality, balance and tasks of each file against the base, then the speed of all. Arguments: as of evaluate.evaluate.

    speed: None measures none. Ctrl-C while it is measured leaves what is done.
    Raises UserError.
    """
    variants = variants_of([base, *files])
    sizes = tuple(model_size(v.file) for v in variants)
    evaluations = evaluate_all(
        files, base, texts, tasks, chunks=chunks, file_chunks=0, items=items, threads=threads, progress=progress
    )  # fmt: skip
    measured = None if speed is None else bench(variants, speed, progress=progress)
    return Comparison(variants, sizes, evaluations, measured)


def describe(c: Comparison) -> list[str]:
    """Lines: the table, a row per figure and a column per file, then what the figures are."""
    base, *files = c.variants
    rows = [
        ["bytes", *(f"{s.file_bytes:,}" for s in c.sizes)],
        ["bits per weight", *(f"{s.bpw:.2f}" for s in c.sizes)],
    ]
    rows += _quality_rows(c.evaluations) + _balance_rows(c.evaluations) + _task_rows(c.evaluations)
    if c.bench is not None:
        rows += _speed_rows(c.bench)
    lines = [*table(["", f"{base.name} (base)", *(v.name for v in files)], rows), ""]
    quality = c.evaluations[0].quality
    if quality is not None:
        texts = c.evaluations[0].texts
        where = f"{len(texts)} texts mixed" if len(texts) > 1 else texts[0].name
        lines.append(f"PPL, KLD (nats, against the base) and LIS: {where}, {quality.chunks} chunks of {N_CTX} tokens, ± standard error.")
        lines.append(
            "LIS: the busiest expert's load over the mean load, mean over layers (1 is even); where there are copies, without -> with."
        )
    if c.evaluations[0].tasks:
        items = ", ".join(f"{len(r.task.items):,} of {r.task.name}" for r in c.evaluations[0].tasks)
        lines.append(f"Tasks: accuracy in points ({items}); in brackets the difference from the base, paired over items.")
    return lines + ([] if c.bench is None else ["Speed:", *notes(c.bench)])


def _quality_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    found = [e.quality for e in evaluations if e.quality is not None]
    if not found:
        return []
    wanted: list[tuple[str, Callable[[Any], Figure], int, str]] = [
        ("PPL", lambda q: q.ppl, 3, ""), ("Mean KLD", lambda q: q.kld, 5, ""), ("99.9% KLD", lambda q: q.kld_999, 4, ""),
        ("Same top p", lambda q: q.same_top, 2, " %"),
    ]  # fmt: skip
    base = {"PPL": _figure(found[0].ppl_base, 3), "Mean KLD": "0", "99.9% KLD": "0", "Same top p": "100 %"}
    return [[name, base[name], *(_figure(of(q), digits) + unit for q in found)] for name, of, digits, unit in wanted]


def _figure(f: Figure, digits: int) -> str:
    return f"{f.value:.{digits}f}" + ("" if f.error is None else f" ± {f.error:.{digits}f}")


def _balance_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    base = evaluations[0].balance_base
    if base is None:
        return []
    return [["LIS", _lis(base), *(_lis(e.balance) for e in evaluations if e.balance is not None)]]


def _lis(b: Balance) -> str:
    copied = any(x.n_phys > x.n_expert for x in b.layers)
    return f"{b.before:.2f} -> {b.after:.2f}" if copied else f"{b.before:.2f}"


def _task_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    rows = []
    for i, result in enumerate(evaluations[0].tasks):
        for j, a in enumerate(result.accuracies):
            ours = [e.tasks[i].accuracies[j] for e in evaluations]
            rows.append([f"{result.task.name} {a.metric}", f"{a.base.value:.2f}", *map(_accuracy, ours)])
    return rows


def _accuracy(a: Accuracy) -> str:
    return f"{a.out.value:.2f} ({_figure(a.difference, 2) if a.difference.value < 0 else '+' + _figure(a.difference, 2)})"


def _speed_rows(b: Bench) -> list[list[str]]:
    rows = []
    first = b.variants[0].name
    for test in b.tests:
        row = [f"{test}, t/s"]
        for v in b.variants:
            values = b.samples.get((v.name, test), ())
            against = ratio(values, b.samples.get((first, test), ()))
            text = figures(spread(values).median) if values else "-"
            row.append(text if v.name == first or against is None else f"{text} ({against.median:.2f}x)")
        rows.append(row)
    return rows


def to_json(c: Comparison) -> dict[str, Any]:
    """The comparison as plain data for json.dump: what `eval --json` gives per file, sizes, and what `bench --json` gives."""
    sizes = [
        {"name": v.name, "file": str(v.file), "file_bytes": s.file_bytes, "bpw": s.bpw, "weights": s.weights, "tiered": v.tiered}
        for v, s in zip(c.variants, c.sizes, strict=True)
    ]
    files = [size | {"evaluation": evaluation_json(e)} for size, e in zip(sizes[1:], c.evaluations, strict=True)]
    return {"rq_compare_version": 1, "base": sizes[0], "files": files, "bench": None if c.bench is None else bench_json(c.bench)}
