"""Accuracy on tasks of a file and its base, paired over items, with lm-evaluation-harness's definitions of right and wrong."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rq_gguf
from rq_gguf.errors import UserError
from rq_gguf.evaluation.items import Item, Task
from rq_gguf.evaluation.quality import Figure, check_same_vocabulary
from rq_gguf.progress import Bar
from rq_gguf.runtime.tools import library_path, run_tool


@dataclass(frozen=True)
class Scores:
    """What a model makes of a task's items, a tuple entry per item."""

    logprobs: tuple[tuple[float, ...], ...]
    """[n_items][n_choices] log-probability of each continuation, in nats."""
    greedy: tuple[tuple[bool, ...], ...]
    """[n_items][n_choices] whether the continuation is the greedy one."""
    truncated: int
    """Items longer than the model's context, cut from the left."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy by one metric, in points (per cent of the items), each figure with its standard error."""

    metric: str
    base: Figure
    out: Figure
    difference: Figure
    """out - base; the error is of the paired differences, so that what both get right or wrong adds nothing to it."""
    lost: int
    """Items that are right in base only."""
    gained: int
    """Items that are right in out only."""


@dataclass(frozen=True)
class TaskResult:
    """Both models on one task."""

    task: Task
    base: Scores
    out: Scores
    accuracies: tuple[Accuracy, ...]


def measure_tasks(
    files: Sequence[Path],
    base: Path,
    tasks: Sequence[Task],
    *,
    threads: int | None = None,
    progress: bool = True,
) -> list[tuple[TaskResult, ...]]:
    """[files][tasks] Score tasks with a base and with files. An item longer than their context is cut from the left, as
    lm-evaluation-harness does.

    threads: one per processor core where None.
    Raises UserError for models that differ, files that llama.cpp refuses, and items that cannot be scored.
    """
    for out in files:
        check_same_vocabulary(out, base)
    theirs, *ours = (score_tasks(model, tasks, threads=threads, progress=progress) for model in (base, *files))
    return [tuple(compare(*scores) for scores in zip(tasks, theirs, found, strict=True)) for found in ours]


def score_tasks(model: Path, tasks: Sequence[Task], *, threads: int | None = None, progress: bool = True) -> list[Scores]:
    """What a GGUF makes of each task's items, by running the scorer on the installed libllama. Raises UserError as measure_tasks does."""
    items = [(task, item) for task in tasks for item in task.items]
    request = {
        "library": str(library_path("llama")),
        "model": str(model),
        "threads": threads or default_threads(),
        "items": [(item.context, [" " + choice for choice in item.choices]) for _, item in items],
    }
    what = f"{model.name} on {tasks[0].name}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
    with tempfile.TemporaryDirectory(prefix="rq-gguf-tasks-") as directory, ItemBar(what, len(items), progress) as bar:
        request_file, answer_file = Path(directory, "request.json"), Path(directory, "answer.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # -P: no module of the user's working directory takes the place of one of Python's.
        command: list[str | Path] = [sys.executable, "-P", "-m", "rq_gguf.evaluation.scorer", request_file, answer_file]
        run_tool(command, env={"PYTHONPATH": search_path()}, on_output=bar.feed)
        answer = json.loads(answer_file.read_text(encoding="utf-8"))
    if "error" in answer:
        if "item" not in answer:
            raise UserError(answer["error"])
        task, item = items[answer["item"]]
        raise UserError(f"{task.path} line {item.line} cannot be scored: {answer['error']}")
    scores = []
    start = 0
    for task in tasks:
        end = start + len(task.items)
        logprobs, greedy = (tuple(map(tuple, answer[key][start:end])) for key in ("logprobs", "greedy"))
        scores.append(Scores(logprobs, greedy, sum(start <= i < end for i in answer["truncated"])))
        start = end
    return scores


def compare(task: Task, base: Scores, out: Scores) -> TaskResult:
    """Two models' scores of one task: a base's scores can be used again for further files."""
    ours, theirs = correct(task.items, out), correct(task.items, base)
    return TaskResult(task, base, out, tuple(pair(metric, theirs[metric], ours[metric]) for metric in ours))


def correct(items: Sequence[Item], scores: Scores) -> dict[str, NDArray[np.bool_]]:
    """Which items are right, bool [n_items] by metric.

    Of several choices `acc` takes the likeliest and `acc_norm` the likeliest per character, the first of equals. A single one is right
    by `acc` if each of its tokens is the most likely. (process_results in lm_eval/api/task.py, version 0.4.)
    """
    if len(items[0].choices) == 1:
        return {"acc": np.array([greedy[0] for greedy in scores.greedy])}
    labels = np.array([item.label for item in items])
    likeliest, normalized = np.zeros_like(labels), np.zeros_like(labels)
    for i, (item, logprobs) in enumerate(zip(items, scores.logprobs, strict=True)):
        likeliest[i] = np.argmax(logprobs)
        normalized[i] = np.argmax(np.array(logprobs) / [len(c) for c in item.choices])
    return {"acc": likeliest == labels, "acc_norm": normalized == labels}


def pair(metric: str, base: NDArray[np.bool_], out: NDArray[np.bool_]) -> Accuracy:
    """Accuracy of two models from which items they get right, bool [n_items] each, two items or more."""
    difference = out.astype(np.float64) - base
    return Accuracy(metric, _points(base), _points(out), _points(difference), int((difference < 0).sum()), int((difference > 0).sum()))


def _points(values: NDArray[Any]) -> Figure:
    """Mean and its standard error in points."""
    return Figure(100 * float(values.mean()), 100 * float(values.std(ddof=1)) / math.sqrt(len(values)))


def default_threads() -> int:
    """Processor cores that this process may use, each counted once where it runs two threads."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    try:
        return len({path.read_text() for path in siblings})
    except OSError:
        return len(cpus)


def search_path() -> str:
    """PYTHONPATH with which another process finds this package, installed or not."""
    return os.pathsep.join([str(Path(rq_gguf.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


class ItemBar:
    """A progress bar fed with what a program prints: how many items are done, a line each time."""

    def __init__(self, what: str, items: int, shown: bool, unit: str = "item") -> None:
        self._bar = Bar(total=items, desc=what, unit=unit, delay=0.5, leave=False, disable=None if shown else True)
        self._line = ""

    def __enter__(self) -> "ItemBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def feed(self, piece: str) -> None:
        *lines, self._line = (self._line + piece).split("\n")
        done = max((int(line) for line in lines if line.isdecimal()), default=0)
        self._bar.update(max(0, done - self._bar.n))


def describe(results: Sequence[TaskResult]) -> list[str]:
    """The results as a table for people, line by line."""
    lines = ["tasks     accuracy in points, difference paired over items, ± standard error; flipped: right in one file only"]
    rows = [("task", "metric", "items", "base", "file", "difference", "flipped")]
    for r in results:
        for i, a in enumerate(r.accuracies):
            first = ("", "") if i else (r.task.name, f"{len(r.task.items):,}")
            figures = (_text(a.base), _text(a.out), _text(a.difference, "+"), f"{a.lost + a.gained} (-{a.lost} +{a.gained})")
            rows.append((first[0], a.metric, first[1], *figures))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for row in rows:
        cells = [v.ljust(w) if c < 2 else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells))
    for r in results:
        n, total = len(r.task.items), r.task.n_in_file
        if n < total:
            lines.append(f"  {r.task.name}: only {n:,} of {total:,} items, evenly spaced over the file")
        if r.base.truncated:
            lines.append(f"  {r.task.name}: {r.base.truncated:,} items are longer than the model's context and were cut from the left")
    return lines


def _text(figure: Figure, sign: str = "") -> str:
    return f"{figure.value:{sign}.2f} ± {figure.error:.2f}"


def to_json(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """The results as plain data for json.dump."""
    return [
        {
            "task": r.task.name,
            "file": str(r.task.path),
            "items": len(r.task.items),
            "items_in_file": r.task.n_in_file,
            "truncated": r.base.truncated,
            "metrics": {a.metric: {key: value for key, value in asdict(a).items() if key != "metric"} for a in r.accuracies},
        }
        for r in results
    ]
