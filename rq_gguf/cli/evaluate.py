"""Compare a file with its model."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples

EXAMPLES = examples(
    "rq-gguf eval demo-rq.gguf",
    "rq-gguf eval demo-rq.gguf --base demo-rq.gguf.rq/base.gguf --chunks 8 --json eval.json",
)


@click.command("eval", epilog=EXAMPLES)
@click.argument("out", type=INPUT)
@click.argument("more", type=INPUT, nargs=-1, metavar="")
@click.option("--base", type=INPUT, metavar="GGUF", help="The model that OUT was made from; found by itself where build left it.")
@click.option(
    "--text",
    "texts",
    type=INPUT,
    multiple=True,
    metavar="FILE...",
    help="Texts to evaluate on; the project's own by default.",
)
@click.option(
    "--tasks", type=INPUT, multiple=True, metavar="FILE.jsonl...", help="Questions to answer, as JSON lines with context, choices, label "
    "(PIQA, ARC), with context and target, or with text, whose last word is asked for (LAMBADA)."
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), default=80, show_default=True, help="Chunks of 512 tokens, of all texts mixed.")
@click.option("--items", type=click.IntRange(min=2), metavar="N", help="Items of each task, evenly spaced; all if not given.")
@click.option("--threads", type=click.IntRange(min=1), help="llama.cpp's default if not given.")
@JSON
def evaluate(
    out: Path,
    more: tuple[Path, ...],
    base: Path | None,
    texts: tuple[Path, ...],
    tasks: tuple[Path, ...],
    chunks: int,
    items: int | None,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare OUT with its base: perplexity, KL divergence, the balance of the experts' load, and accuracy on tasks."""
    from rq_gguf.evaluation import evaluate as room

    # An option takes one value: what follows in `--text a.txt b.txt` arrives as further arguments behind OUT. With both options the
    # name tells which they belong to.
    more_tasks = tuple(path for path in more if tasks and (not texts or path.suffix == ".jsonl"))
    texts += tuple(path for path in more if path not in more_tasks)
    base, texts = base or room.base_of(out), texts if texts or tasks else room.own_text()
    found = room.evaluate(out, base, texts, tasks + more_tasks, chunks=chunks, items=items, threads=threads)
    emit(room.describe(found).splitlines(), json_file, room.to_json(found))
