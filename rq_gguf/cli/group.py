"""The command line: one module per command. Rooms are imported inside the commands, so that --help is quick."""

import logging

import click

from rq_gguf import __version__
from rq_gguf.cli.build import build
from rq_gguf.cli.calibrate import calibrate
from rq_gguf.cli.evaluate import evaluate
from rq_gguf.cli.failures import Commands
from rq_gguf.cli.inspect import inspect
from rq_gguf.cli.plan import plan
from rq_gguf.cli.report import report
from rq_gguf.cli.runtime import runtime


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="rq-gguf")
def main() -> None:
    """Copies of busy experts and per-expert types for mixture-of-experts GGUFs, under one byte budget."""
    logger = logging.getLogger("rq_gguf")
    logger.handlers = [_Stderr()]
    logger.propagate = False


class _Stderr(logging.Handler):
    """Warnings as `Warning: ...` on stderr, whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)


for command in (build, calibrate, plan, inspect, report, evaluate, runtime):
    main.add_command(command)
