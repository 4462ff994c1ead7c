"""Speeds from what llama.cpp's benchmark programs print. Nothing but Python's own modules: tools/bench_cuda.py runs on this alone."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

_PERF = re.compile(r"^.*?(prompt eval|(?<!prompt )eval) time = +([\d.]+) ms / +(\d+) (?:tokens|runs)\b", re.MULTILINE)


def bench_records(printed: str) -> list[dict[str, Any]]:
    """The records of `llama-bench -o json`. Raises ValueError for anything else."""
    records = json.loads(printed)
    if not isinstance(records, list) or not all(isinstance(r, dict) and r.get("samples_ts") for r in records):
        raise ValueError("llama-bench printed no list of measurements")
    return records


def bench_speeds(printed: str) -> dict[str, float]:
    """Tokens per second by test (pp512, tg128) of `llama-bench -o json`, the median of its repetitions. Raises ValueError."""
    return {f"tg{r['n_gen']}" if r["n_gen"] else f"pp{r['n_prompt']}": statistics.median(r["samples_ts"]) for r in bench_records(printed)}


def batched_options(sequences: Sequence[int], prompt: int, decoded: int) -> list[str]:
    """Of llama-batched-bench, for batched_speeds: numbers of sequences, tokens that each is given and decodes.

    A short run follows the one that counts (-ntg 48,1): llama.cpp's programs end without waiting for the thread that prints, so that their
    last lines are lost now and then.
    """
    options = ["-c", str(max(sequences) * (prompt + decoded)), "-npp", str(prompt), "-ntg", f"{decoded},1"]
    return [*options, "-npl", ",".join(map(str, sequences)), "--output-format", "jsonl"]


def batched_speeds(printed: str) -> dict[int, float]:
    """Tokens per second of decode, all sequences together, by their number, of llama-batched-bench with batched_options.

    Of several lengths the longest counts.
    """
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    longest = max((r["tg"] for r in records), default=0)
    return {r["pl"]: r["speed_tg"] for r in records if r["tg"] == longest}


def prompt_speeds(printed: str) -> tuple[tuple[int, float], tuple[int, float]]:
    """((tokens of the prompt, tokens per second), (tokens generated behind the first, tokens per second)) of llama-completion.

    Raises ValueError where they were not printed.
    """
    found = {m[1]: (int(m[3]), float(m[2])) for m in _PERF.finditer(printed)}
    if found.keys() != {"prompt eval", "eval"} or any(milliseconds <= 0 for _, milliseconds in found.values()):
        raise ValueError("llama-completion printed no times")
    (prompt, prompt_ms), (reply, reply_ms) = found["prompt eval"], found["eval"]
    return (prompt, 1000 * prompt / prompt_ms), (reply, 1000 * reply / reply_ms)


def in_order(tests: Iterable[str]) -> list[str]:
    """Names of tests as tables have them: decode of one sequence (tg), of several, prompts (pp)."""
    return sorted(tests, key=lambda test: (test.startswith("pp"), not test.startswith("tg")))
