"""Measure speed."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples

EXAMPLES = examples(
    "rq-gguf bench demo-rq.gguf demo-rq.gguf.rq/base.gguf -p 64 -n 16 -b 2 --rounds 2",
    "rq-gguf bench demo-rq.gguf -p 64 -n 16 -b 0 --rounds 1 --json bench.json -- -ngl 99",
)


@click.command(epilog=EXAMPLES)
@click.argument("arguments", nargs=-1, required=True, metavar="FILE.gguf... [-- ARGUMENTS]", type=click.UNPROCESSED)
@click.option("-p", "prompt", default="512", show_default=True, metavar="N,...", help="Tokens of prompts; 0 for none.")
@click.option("-n", "generate", default="128", show_default=True, metavar="N,...", help="Tokens to generate; 0 for none.")
@click.option("-b", "sequences", default="4", show_default=True, metavar="N,...", help="Sequences to decode together; 0 for none.")
@click.option("--text", type=INPUT, metavar="FILE", help="Begins with the real prompt; the project's own held-out text by default.")
@click.option("--no-text", is_flag=True, help="Leave the real prompt out.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often each file has its turn.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Of llama-bench's tests in each turn.")
@click.option("--threads", type=click.IntRange(min=1), help="llama.cpp's default if not given.")
@click.option("--unpatched", is_flag=True, help="Run stock files on the unpatched llama.cpp too (runtime install --unpatched).")
@JSON
def bench(
    arguments: tuple[str, ...],
    prompt: str,
    generate: str,
    sequences: str,
    text: Path | None,
    no_text: bool,
    rounds: int,
    repetitions: int,
    threads: int | None,
    unpatched: bool,
    json_file: Path | None,
) -> None:
    """Speed of files, in turns: prompts, generation, several sequences, and a real text; ratios to the first file.

    Arguments behind -- (such as -ngl 99) go to llama-bench, llama-batched-bench and llama-completion alike. Ctrl-C prints what was
    measured so far.
    """
    from rq_gguf.bench import measure, table
    from rq_gguf.inputs import DATA

    files, extra = _split(arguments)
    options = measure.check_options(
        prompt,
        generate,
        sequences,
        rounds=rounds,
        repetitions=repetitions,
        threads=threads,
        text=None if no_text else text or DATA / "heldout.txt",
        extra=extra,
    )
    found = measure.bench(measure.variants_of(files, unpatched), options)
    if not found.samples:
        raise KeyboardInterrupt
    emit(table.describe(found), json_file, table.to_json(found))
    if found.interrupted:
        raise click.exceptions.Exit(130)


def _split(arguments: tuple[str, ...]) -> tuple[list[Path], tuple[str, ...]]:
    """(files, what stood behind --): click takes the -- away, so the first that looks like an option tells."""
    n = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if not n:
        raise click.UsageError("name at least one GGUF before the arguments behind --")
    return [Path(word) for word in arguments[:n]], arguments[n:]
