"""`--verbose` and `--quiet`: options of rq-gguf and of each of its commands, so that they may stand anywhere."""

import logging
import sys

import click

from rq_gguf import verbosity

_LEVELS = {"verbose": verbosity.VERBOSE, "quiet": verbosity.QUIET}
_CHOSEN = "rq_gguf.verbosity"


class Group(click.Group):
    """A group that gives both options to every command added to it, and to the commands of groups among them."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(cmd, name)
        for command in (cmd, *(cmd.commands.values() if isinstance(cmd, click.Group) else ())):
            taken = {text for option in command.params for text in option.opts}
            command.params += [option for option in options() if not taken.intersection(option.opts)]


def options() -> list[click.Parameter]:
    """The two options; they act by themselves and reach no function."""
    texts = {
        "verbose": "Say what each step does: programs run, times.",
        "quiet": "Results, warnings and errors only: no progress bars, no step lines.",
    }
    return [
        click.Option([f"-{name[0]}", f"--{name}"], is_flag=True, expose_value=False, callback=_choose, help=text)
        for name, text in texts.items()
    ]


def start(ctx: click.Context) -> None:
    """Send the package's log to stderr, at the level chosen before the command's name; one behind it follows."""
    logger = logging.getLogger("rq_gguf")
    logger.handlers = [_Stderr()]
    logger.propagate = False
    verbosity.set_level(_LEVELS.get(ctx.meta.get(_CHOSEN, ""), verbosity.NORMAL))


def _choose(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if not value:
        return
    if ctx.meta.setdefault(_CHOSEN, option.name) != option.name:
        raise click.UsageError("--verbose and --quiet exclude each other", ctx)
    ctx.find_root().call_on_close(lambda: verbosity.set_level(verbosity.NORMAL))  # for what the program does next, if it is a test
    verbosity.set_level(_LEVELS[str(option.name)])


class _Stderr(logging.Handler):
    """Warnings as `Warning: ...`, details with the seconds since the start, above a progress bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.capitalize()}: {text}"
        elif record.levelno <= logging.DEBUG:
            text = f"[{record.relativeCreated / 1000:6.1f} s] {text}"
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                click.echo(text, err=True)
        else:
            click.echo(text, err=True)
