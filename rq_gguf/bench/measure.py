"""`rq-gguf bench`: files run in turns by llama.cpp's own programs.

llama-bench and llama-batched-bench make their tokens up at random. Routing of such tokens is not the model's: other experts are busy,
and a batch meets more of them. So llama-completion also reads a real text and continues it.
"""

import logging
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rq_gguf.bench.printed import batched_speeds, bench_records, bench_speeds, prompt_speeds
from rq_gguf.errors import UserError
from rq_gguf.evaluation.text import CHARACTERS_PER_CHUNK, read_text
from rq_gguf.format import KEY_FORMAT_VERSION
from rq_gguf.gguf_file import read_headers
from rq_gguf.progress import Bar
from rq_gguf.runtime.tools import Output, last_error, run_tool, tool_path

log = logging.getLogger(__name__)

TEXT_PROMPT, TEXT_REPLY = "text prompt", "text reply"
BATCHED_PROMPT, BATCHED_REPLY = 16, 48
"""Tokens of each sequence in llama-batched-bench, made up and decoded."""
_SEED = "1"
_TRIES = 12
"""Runs at most until a program's last lines arrive: it ends without waiting for the thread that prints them."""


@dataclass(frozen=True)
class Options:
    """What to measure. Make one with `check_options`."""

    prompt: tuple[int, ...] = (512,)
    """Tokens of llama-bench's prompts, and about those of the real one."""
    generate: tuple[int, ...] = (128,)
    """Tokens that llama-bench generates, and llama-completion behind the real prompt."""
    sequences: tuple[int, ...] = (4,)
    """Sequences that llama-batched-bench decodes together."""
    rounds: int = 5
    repetitions: int = 3
    """Of each of llama-bench's tests in each round."""
    threads: int | None = None
    text: Path | None = None
    """Begins with the real prompt; None leaves real text out."""
    extra: tuple[str, ...] = ()
    """Arguments for each of the three programs."""


@dataclass(frozen=True)
class Variant:
    """A file and the build that runs it."""

    name: str
    file: Path
    bytes: int
    tiered: bool
    unpatched: bool = False


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    options: Options
    variants: tuple[Variant, ...]
    samples: dict[tuple[str, str], tuple[float, ...]]
    """(variant's name, test) -> tokens per second, a value per round."""
    tests: tuple[str, ...]
    """In the order of the table."""
    text_tokens: tuple[int, int] | None
    """Of the real prompt and of what was generated behind its first token, by the first file."""
    machine: str
    """Processor, GPU and backends, as llama-bench names them."""
    interrupted: bool

    @property
    def rounds(self) -> int:
        """Rounds that were finished for all files and tests."""
        return min((len(self.samples.get((v.name, t), ())) for v in self.variants for t in self.tests), default=0)


def check_options(
    prompt: str = "512",
    generate: str = "128",
    sequences: str = "4",
    *,
    rounds: int = 5,
    repetitions: int = 3,
    threads: int | None = None,
    text: Path | None = None,
    extra: Sequence[str] = (),
) -> Options:
    """prompt, generate, sequences: numbers with commas between, 0 for none. Raises UserError for what cannot be understood or leaves
    nothing to measure."""
    p, n, b = (_numbers(name, value) for name, value in (("-p", prompt), ("-n", generate), ("-b", sequences)))
    if not (p or n or b):
        raise UserError("-p 0 -n 0 -b 0 leave nothing to measure; give a number of tokens or sequences")
    if rounds < 1 or repetitions < 1:
        raise UserError(f"--rounds {rounds} of {repetitions} repetitions measure nothing; give 1 or more")
    if not (p and n):
        text = None  # the real prompt and what follows are as long as llama-bench's
    return Options(p, n, b, rounds, repetitions, threads, text, tuple(extra))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise UserError(f"{name} {text} is not understood; give numbers with commas between, such as 128,512, or 0 for none")
    return tuple(dict.fromkeys(int(part) for part in parts if int(part)))


def variants_of(files: Sequence[Path], unpatched: bool = False) -> tuple[Variant, ...]:
    """The files under names of their own, on the patched build; with `unpatched`, stock files on the unpatched build too.

    Raises UserError for what is no GGUF, and where `unpatched` finds no stock file.
    """
    found: list[Variant] = []
    for path in files:
        headers = read_headers(path)
        taken = {v.name for v in found}
        name = next(n for n in _names(path) if n not in taken)
        found.append(Variant(name, path, sum(h.size for h in headers), KEY_FORMAT_VERSION in headers[0].values))
    stock = [v for v in found if not v.tiered]
    if unpatched and not stock:
        raise UserError("--unpatched runs stock files on the unpatched llama.cpp, and all files here have tiers; add a stock file")
    for v in stock if unpatched else []:
        found.insert(found.index(v) + 1, replace(v, name=f"{v.name}, unpatched", unpatched=True))
    return tuple(found)


def _names(path: Path) -> list[str]:
    """What a file may be called, the best first: the same file may come again, to show how much the machine scatters."""
    return [path.name, str(path), *(f"{path} ({i})" for i in range(2, 100))]


def names_of_tests(options: Options) -> tuple[str, ...]:
    """Names of the tests in the table's order."""
    tests = [f"pp{n}" for n in options.prompt] + ([TEXT_PROMPT] if options.text else [])
    tests += [f"tg{n}" for n in options.generate] + ([TEXT_REPLY] if options.text else [])
    return tuple(tests + [sequences_test(n) for n in options.sequences])


def sequences_test(n: int) -> str:
    return f"{n} sequences" if n > 1 else "1 sequence"


def bench(variants: Sequence[Variant], options: Options, *, progress: bool = True) -> Bench:
    """Run all files in each round, in random order. Ctrl-C ends it: what was measured so far is returned.

    Raises UserError where a program is missing or fails.
    """
    with tempfile.TemporaryDirectory(prefix="rq-gguf-bench-") as folder:
        runs = _Runs(options, Path(folder))
        for v in variants:
            for program in runs.programs:
                tool_path(program, v.unpatched)
        samples: dict[tuple[str, str], list[float]] = {}
        order, interrupted = random.Random(0), False
        total = options.rounds * len(variants) * len(runs.programs)
        try:
            with Bar(total=total, desc="bench", unit="run", leave=False, disable=None if progress else True) as bar:
                for _ in range(options.rounds):
                    for v in order.sample(list(variants), len(variants)):
                        for run in runs.programs.values():
                            for test, speed in run(v).items():
                                samples.setdefault((v.name, test), []).append(speed)
                            bar.update()
        except KeyboardInterrupt:
            interrupted = True
    found = {key: tuple(values) for key, values in samples.items()}
    return Bench(options, tuple(variants), found, names_of_tests(options), runs.text_tokens, runs.machine, interrupted)


class _Runs:
    """Runs of each program that is needed: program -> a function that measures a variant, {test: tokens per second}."""

    def __init__(self, options: Options, folder: Path) -> None:
        """folder: for the prompt. Raises UserError for a text that cannot be read."""
        self.options = options
        self.machine = ""
        self.text_tokens: tuple[int, int] | None = None
        self.programs: dict[str, Callable[[Variant], dict[str, float]]] = {}
        if options.prompt or options.generate:
            self.programs["llama-bench"] = self.bench
        if options.sequences:
            self.programs["llama-batched-bench"] = self.batched
        if options.text is not None:
            self.prompt = folder / "prompt.txt"
            text = read_text(options.text)[: options.prompt[0] * CHARACTERS_PER_CHUNK // 512]
            self.prompt.write_text(text, encoding="utf-8")
            self.context = len(text.encode()) + options.generate[0] + 8  # no tokenizer makes more tokens than bytes, but for its own
            self.programs["llama-completion"] = self.completion

    def bench(self, v: Variant) -> dict[str, float]:
        sizes = [["-p", ",".join(map(str, self.options.prompt)) or "0"], ["-n", ",".join(map(str, self.options.generate)) or "0"]]
        command: list[str | Path] = ["llama-bench", *sizes[0], *sizes[1], "-r", str(self.options.repetitions), "-o", "json"]

        def read(printed: Output) -> dict[str, float]:
            first = bench_records(printed.stdout)[0]
            self.machine = ", ".join(str(first[key]) for key in ("cpu_info", "gpu_info", "backends") if first.get(key))
            return bench_speeds(printed.stdout)

        return self._measure(v, command, read)

    def batched(self, v: Variant) -> dict[str, float]:
        most = max(self.options.sequences)
        sizes = ["-npp", str(BATCHED_PROMPT), "-ntg", f"{BATCHED_REPLY},1", "-npl", ",".join(map(str, self.options.sequences))]
        # Each sequence has a part of the context, rounded up to 256 tokens.
        context = ["-c", str(256 * most * math.ceil((BATCHED_PROMPT + BATCHED_REPLY) / 256))]

        def read(printed: Output) -> dict[str, float]:
            speeds = batched_speeds(printed.stdout)
            return {sequences_test(n): speeds[n] for n in self.options.sequences}

        return self._measure(v, ["llama-batched-bench", *context, *sizes, "--output-format", "jsonl"], read)

    def completion(self, v: Variant) -> dict[str, float]:
        sizes = ["-c", str(self.context), "-n", str(self.options.generate[0])]
        options: list[str | Path] = ["-f", self.prompt, "-no-cnv", "--no-display-prompt", "--ignore-eos", "--perf", "--seed", _SEED]

        def read(printed: Output) -> dict[str, float]:
            prompt, reply = prompt_speeds(printed.stderr + "\n" + printed.stdout)
            self.text_tokens = self.text_tokens or (prompt[0], reply[0])
            return {TEXT_PROMPT: prompt[1], TEXT_REPLY: reply[1]}

        return self._measure(v, ["llama-completion", *sizes, *options], read)

    def _measure(self, v: Variant, command: list[str | Path], read: Callable[[Output], dict[str, float]]) -> dict[str, float]:
        """Run a program on a file until `read` finds in its output what it should print. Raises UserError."""
        threads = [] if self.options.threads is None else ["-t", str(self.options.threads)]
        for attempt in range(_TRIES):
            try:
                printed = run_tool([command[0], "-m", v.file, *command[1:], *threads, *self.options.extra], unpatched=v.unpatched)
            except UserError as e:
                raise UserError(f"{v.file}: {e}") from e
            try:
                return read(printed)
            except (ValueError, KeyError, IndexError) as e:
                log.debug("%s did not print all that it measured of %s (%s), run %d", command[0], v.file, e, attempt + 1)
        raise UserError(f"{command[0]} measured nothing of {v.file} in {_TRIES} runs; the last said: {last_error(printed)}")
