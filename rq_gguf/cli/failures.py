"""Exceptions as one line and an exit status."""

import os
from typing import Any

import click

from rq_gguf import extras
from rq_gguf.atomic import FULL
from rq_gguf.cli.json_option import with_value
from rq_gguf.cli.verbosity import Group
from rq_gguf.errors import UserError

DEBUG = "RQ_GGUF_DEBUG"


class Failure(click.ClickException):
    """`Error: one sentence` on stderr."""

    exit_code = 2


class Bug(click.ClickException):
    exit_code = 1


class Commands(Group):
    """Turns exceptions into one line and an exit status: 2 for a bad input, 130 for Ctrl-C, 1 for a bug."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, with_value(args))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted: finished steps are kept, nothing half-made was left behind", err=True)
            ctx.exit(130)
        except Exception as e:
            if os.environ.get(DEBUG) == "1":
                raise
            raise failure(e) from e


def failure(e: Exception) -> click.ClickException:
    if isinstance(e, UserError):
        return Failure(str(e))
    if isinstance(e, ModuleNotFoundError) and (extra := extras.of_module(e.name)):
        return Failure(f"this needs {e.name}, which is not installed; run: {extras.command(extra)}")
    if isinstance(e, OSError) and e.errno in FULL:
        return Failure(f"the disk is full{f' ({e.filename})' if e.filename else ''}; free some space and run the command again")
    if isinstance(e, FileNotFoundError) and "temporary directory" in str(e):  # tempfile's own words
        return Failure("no temporary file can be written: the disk is full, or TMPDIR names no directory that can be written")
    if isinstance(e, OSError) and e.filename:
        return Failure(f"{e.filename}: {e.strerror}")
    if isinstance(e, MemoryError):
        return Failure("out of memory; close other programs or use a machine with more")
    text = " ".join(str(e).split()) or "no message"
    return Bug(f"unexpected {type(e).__name__}: {text} ({DEBUG}=1 shows where)")
