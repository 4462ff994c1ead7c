"""Shell completion."""

import click
from click.shell_completion import get_completion_class

from rq_gguf.cli.options import examples

_SHELLS = ("bash", "zsh", "fish")


@click.command(epilog=examples('eval "$(rq-gguf completion bash)"', "rq-gguf completion fish"))
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and files.

    For bash and zsh, put the first example's line, with the shell's name, into ~/.bashrc or ~/.zshrc; for fish,
    `rq-gguf completion fish | source` into ~/.config/fish/config.fish.
    """
    script = get_completion_class(shell)
    assert script is not None  # the choices are click's own
    click.echo(script(ctx.find_root().command, {}, "rq-gguf", "_RQ_GGUF_COMPLETE").source())
