"""Running cases in the harness: lines of key=value in, measurements or the reason of a failure out."""

import concurrent.futures
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 120
"""Seconds for a case on a busy machine."""


@dataclass(frozen=True)
class Run:
    """A case under one schedule."""

    schedule: int
    nmse_cpu: float
    """Against ggml-cpu, which rounds activations to 8 bits for most types."""
    nmse_exact: float
    """Against the product in double precision of the same weights."""
    bad: int
    """Values that are no numbers: never written, or made of what was not written."""
    not_zero: int
    """Values of experts that are not held and are not 0."""
    wrong: int
    """Results that must equal the CPU's bit by bit and do not (ids)."""
    hash: str
    encoded: tuple[tuple[str, int], ...]
    """Names of the kernels that were dispatched, with their number of threadgroups, and "barrier"."""

    def count(self, kernel: str) -> int:
        return sum(name.startswith(kernel) for name, _ in self.encoded)


@dataclass
class Outcome:
    """A case under all its schedules."""

    line: str
    runs: list[Run] = field(default_factory=list)
    error: str = ""
    """What the harness refused; empty if it ran through."""

    def failure(self, most_cpu: float, most_exact: float) -> str:
        """Why the case fails, or an empty string."""
        if self.error:
            return f"{self.line}: {self.error}"
        for run in self.runs:
            where = f"{self.line}: schedule {run.schedule}"
            if run.bad or run.not_zero or run.wrong:
                return f"{where}: {run.bad} values are no numbers, {run.not_zero} not 0, {run.wrong} results wrong"
            if not (run.nmse_cpu < most_cpu and run.nmse_exact < most_exact):
                return f"{where}: NMSE {run.nmse_cpu:.1e} against ggml-cpu, {run.nmse_exact:.1e} exact"
        if len({run.hash for run in self.runs}) > 1:
            return f"{self.line}: the result depends on the schedule"
        return ""


def spec(**values: Any) -> str:
    """A line of the harness."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def parse(text: str) -> Run:
    values = json.loads(text)
    values["encoded"] = tuple((name, n) for name, n in values["encoded"])
    return Run(**values)


def run_some(program: Path, lines: Sequence[str]) -> list[Outcome]:
    """One process after the other: after a failure a new one goes on with the next case."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(lines):
        rest = lines[len(outcomes) :]
        expected = [len(dict(w.partition("=")[::2] for w in line.split()).get("schedules", "0").split(",")) for line in rest]
        try:
            done = subprocess.run([program], input="\n".join(rest) + "\n", capture_output=True, text=True, timeout=LIMIT + len(rest))
            output, errors, status = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as e:
            output, errors, status = (e.stdout or b"").decode() if isinstance(e.stdout, bytes) else e.stdout or "", "it does not end", 1
        runs = [parse(text) for text in output.splitlines() if text.endswith("}")]
        for line, n in zip(rest, expected, strict=True):
            if len(runs) < n:
                if status == 0:
                    raise RuntimeError(f"the harness did not answer to '{line}'")
                outcomes.append(Outcome(line, runs, errors.strip() or f"exit status {status}"))
                break
            outcomes.append(Outcome(line, runs[:n]))
            runs = runs[n:]
    return outcomes


def run_cases(program: Path, lines: Sequence[str], workers: int = 2) -> list[Outcome]:
    """In the order of the lines."""
    parts = [lines[i::workers] for i in range(workers)]
    with concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool:
        done = list(pool.map(lambda part: run_some(program, part), parts))
    outcomes: list[Outcome | None] = [None] * len(lines)
    for i, part in enumerate(done):
        outcomes[i::workers] = part
    return [o for o in outcomes if o is not None]
