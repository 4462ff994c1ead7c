"""What is missing, and the remedy."""

from pathlib import Path

import click

from rq_gguf.cli.options import JSON, emit, examples


@click.command(epilog=examples("rq-gguf doctor", "rq-gguf doctor --json"))
@click.option("--backend", metavar="NAME", help="What llama.cpp is to compute on (cuda); if not given, what is installed, or cpu.")
@JSON
def doctor(backend: str | None, json_file: Path | None) -> None:
    """Say what is needed, what is there, and how to get the rest. The exit status is 2 if something needed is missing."""
    from rq_gguf.runtime import doctor as room

    checks = room.diagnose(backend)
    emit(room.describe(checks), json_file, room.to_json(checks))
    if not room.is_well(checks):
        raise click.exceptions.Exit(2)
