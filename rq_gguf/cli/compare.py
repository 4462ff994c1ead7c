"""Put files side by side."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples

EXAMPLES = examples(
    "rq-gguf compare demo-rq.gguf --chunks 4 --rounds 0",
    "rq-gguf compare demo-rq.gguf --base demo-rq.gguf.rq/base.gguf --chunks 4 --rounds 1 --json compare.json",
)


@click.command(epilog=EXAMPLES)
@click.argument("files", type=INPUT, nargs=-1, required=True, metavar="FILE.gguf...")
@click.option("--base", type=INPUT, metavar="GGUF", help="The model that they were made from; found by itself where build left it.")
@click.option("--text", "texts", type=INPUT, multiple=True, metavar="FILE...", help="Texts; the project's own held-out text by default.")
@click.option("--tasks", type=INPUT, multiple=True, metavar="FILE.jsonl...", help="Questions, as in `rq-gguf eval`.")
@click.option("--chunks", type=click.IntRange(min=1), default=80, show_default=True, help="Chunks of 512 tokens, of all texts mixed.")
@click.option("--items", type=click.IntRange(min=2), metavar="N", help="Items of each task, evenly spaced; all if not given.")
@click.option("--rounds", type=click.IntRange(min=0), default=3, show_default=True, help="Of measuring speed; 0 leaves it out.")
@click.option("--threads", type=click.IntRange(min=1), help="llama.cpp's default if not given.")
@JSON
def compare(
    files: tuple[Path, ...],
    base: Path | None,
    texts: tuple[Path, ...],
    tasks: tuple[Path, ...],
    chunks: int,
    items: int | None,
    rounds: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Bytes, quality, balance, tasks and speed of files of one model, in one table. Stock files may be among them."""
    from rq_gguf.bench.measure import check_options
    from rq_gguf.evaluation import compare as room
    from rq_gguf.evaluation.evaluate import base_of, own_text
    from rq_gguf.inputs import DATA

    # An option takes one value: what follows in `--text a.txt b.txt` arrives among the files.
    models = [path for path in files if path.suffix == ".gguf"]
    if not models:
        raise click.UsageError("name at least one .gguf file")
    tasks += tuple(path for path in files if path.suffix == ".jsonl")
    texts += tuple(path for path in files if path.suffix not in (".gguf", ".jsonl"))
    speed = check_options(rounds=rounds, threads=threads, text=texts[0] if texts else DATA / "heldout.txt") if rounds else None
    found = room.compare_files(
        models,
        base or base_of(models[0]),
        texts or own_text(),
        tasks,
        speed=speed,
        chunks=chunks,
        items=items,
        threads=threads,
    )
    emit(room.describe(found), json_file, room.to_json(found))
    if found.bench is not None and found.bench.interrupted:
        raise click.exceptions.Exit(130)
