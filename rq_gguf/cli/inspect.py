"""Show a file."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples


@click.command(epilog=examples("rq-gguf inspect demo-rq.gguf", "rq-gguf inspect demo-rq.gguf --json"))
@click.argument("file", type=INPUT)
@JSON
def inspect(file: Path, json_file: Path | None) -> None:
    """Validate FILE and show its tiers, copies, bytes, maps and provenance."""
    from rq_gguf.writing import inspect as room

    found = room.inspect(file)
    emit(room.describe(found).splitlines(), json_file, room.to_json(found))
