"""The command line: one module per command. Rooms are imported inside the commands, so that --help is quick."""

import click

from rq_gguf import __version__
from rq_gguf.cli.bench import bench
from rq_gguf.cli.build import build
from rq_gguf.cli.calibrate import calibrate
from rq_gguf.cli.card import card
from rq_gguf.cli.compare import compare
from rq_gguf.cli.completion import completion
from rq_gguf.cli.doctor import doctor
from rq_gguf.cli.evaluate import evaluate
from rq_gguf.cli.export import export
from rq_gguf.cli.failures import Commands
from rq_gguf.cli.inspect import inspect
from rq_gguf.cli.plan import plan
from rq_gguf.cli.report import report
from rq_gguf.cli.runtime import runtime
from rq_gguf.cli.simulate import simulate
from rq_gguf.cli.trace import trace
from rq_gguf.cli.verbosity import options, start

EPILOG = """\b
Exit status:
  0    done
  1    a bug in rq-gguf; please report it, with what RQ_GGUF_DEBUG=1 shows
  2    a bad input, or something is missing: one sentence says what and what to do
  130  Ctrl-C; nothing half-made is left behind

\b
First steps:
  rq-gguf runtime install
  rq-gguf build demo demo-rq.gguf
  rq-gguf report demo-rq.gguf -o report.html
"""


@click.group(
    cls=Commands,
    params=options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=EPILOG,
)
@click.version_option(__version__, prog_name="rq-gguf")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Copies of busy experts and per-expert types for mixture-of-experts GGUFs, under one byte budget."""
    start(ctx)


COMMANDS = (build, calibrate, plan, inspect, report, evaluate, compare, bench, card, trace, simulate, export, runtime, doctor, completion)
for command in COMMANDS:
    main.add_command(command)
