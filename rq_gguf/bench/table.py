"""A bench as a table for people, and as plain data. Pure."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rq_gguf.bench.measure import BATCHED_PROMPT, BATCHED_REPLY, TEXT_PROMPT, TEXT_REPLY, Bench
from rq_gguf.bench.spread import Spread, ratio, spread


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Markdown lines, padded so that they read well as text too. words: columns of text at the left; the others hold numbers."""
    widths = [max(3, *(len(row[c]) for row in (header, *rows))) for c in range(len(header))]
    rule = [":" + "-" * (w - 1) if c < words else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
    lines = [rule if row is None else [v.ljust(w) if c < words else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True))]
             for row in (header, None, *rows)]  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def describe(b: Bench) -> list[str]:
    """Lines: the table, a row per test and file, then what the tests are."""
    first = b.variants[0].name
    rows = []
    for test in b.tests:
        for v in b.variants:
            values = b.samples.get((v.name, test), ())
            against = None if v.name == first else ratio(values, b.samples.get((first, test), ()))
            rows.append((test, v.name, f"{v.bytes:,}", *_speed(values), *_ratio(against)))
    lines = table(("test", "file", "bytes", "t/s", "quartiles", "ratio", "quartiles"), rows, words=2)
    return [*lines, "", *notes(b)]


def notes(b: Bench) -> list[str]:
    """What the figures are, in sentences."""
    arguments = [] if b.options.threads is None else ["-t", str(b.options.threads)]
    how = f" with {shlex.join([*arguments, *b.options.extra])}" if arguments or b.options.extra else ""
    rounds = f"{b.rounds} of {b.options.rounds} rounds (interrupted)" if b.interrupted else _count(b.rounds, "round")
    lines = [f"Medians over {rounds} in random order, tokens per second{how}. Ratios: to {b.variants[0].name} in the same round."]
    random_tests = []
    if b.options.prompt or b.options.generate:
        random_tests.append("pp (prompt) and tg (generation): llama-bench")
    if b.options.sequences:
        sizes = f"{BATCHED_REPLY} tokens each behind {BATCHED_PROMPT}"
        random_tests.append(f"sequences decoded together, {sizes}, speed of all: llama-batched-bench")
    lines.append(f"On random tokens, whose routing is not the model's: {'; '.join(random_tests)}.")
    if b.text_tokens is not None and b.options.text is not None:
        prompt, reply = b.text_tokens
        lines.append(f"On real text ({b.options.text.name}): a prompt of {prompt} tokens and {reply} behind it, llama-completion.")
    return lines + ([f"Machine: {b.machine}."] if b.machine else [])


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _speed(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return ("-", "-")
    s = spread(values)
    return (figures(s.median), f"{figures(s.low)} to {figures(s.high)}")


def _ratio(r: Spread | None) -> tuple[str, str]:
    return ("", "") if r is None else (f"{r.median:.3f}", f"{r.low:.2f} to {r.high:.2f}")


def figures(speed: float) -> str:
    """Three figures or all before the point."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def to_json(b: Bench) -> dict[str, Any]:
    """The bench as plain data for json.dump."""
    first = b.variants[0].name
    files = []
    for v in b.variants:
        tests = {}
        for test in b.tests:
            values = b.samples.get((v.name, test), ())
            if values:
                against = ratio(values, b.samples.get((first, test), ()))
                tests[test] = {
                    **asdict(spread(values)),
                    "ratio": None if against is None else asdict(against),
                    "samples": list(values),
                }
        files.append({
            "name": v.name, "file": str(v.file), "file_bytes": v.bytes, "tiered": v.tiered, "unpatched": v.unpatched, "tests": tests
        })  # fmt: skip
    text = None
    if b.text_tokens is not None and b.options.text is not None:
        text = {"file": str(b.options.text), TEXT_PROMPT: b.text_tokens[0], TEXT_REPLY: b.text_tokens[1]}
    return {
        "rq_bench_version": 1,
        "unit": "tokens per second",
        "rounds": b.rounds,
        "interrupted": b.interrupted,
        "repetitions": b.options.repetitions,
        "prompt": list(b.options.prompt),
        "generate": list(b.options.generate),
        "sequences": list(b.options.sequences),
        "threads": b.options.threads,
        "arguments": list(b.options.extra),
        "machine": b.machine,
        "text": text,
        "files": files,
    }
