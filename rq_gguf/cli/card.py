"""Write a model card."""

from pathlib import Path

import click

from rq_gguf.cli.failures import Failure
from rq_gguf.cli.options import INPUT, examples, path_type

EXAMPLES = examples(
    "rq-gguf card demo-rq.gguf -o README.md",
    "rq-gguf card demo-rq.gguf --eval eval.json --license mit --base-model OWNER/NAME",
)


@click.command(epilog=EXAMPLES)
@click.argument("files", type=INPUT, nargs=-1, required=True, metavar="OUT.gguf...")
@click.option("--eval", "evals", type=INPUT, multiple=True, metavar="FILE", help="JSON of `rq-gguf eval` or `compare`; may be repeated.")
@click.option("--bench", "benches", type=INPUT, multiple=True, metavar="FILE", help="JSON of `rq-gguf bench`; may be repeated.")
@click.option("--repo", metavar="OWNER/NAME", help="Where on the hub you will publish, for the commands in the card.")
@click.option("--base-model", metavar="OWNER/NAME", help="The model on the hub; taken from the file where it says so.")
@click.option("--license", metavar="ID", help="The model's licence, such as apache-2.0; taken from the file where it says so.")
@click.option("--quantized-by", metavar="NAME", help="You, if you want to be named.")
@click.option("--install", default=None, metavar="COMMAND", help="How readers get rq-gguf.  [default: pip install rq-gguf]")
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), metavar="FILE", help="README.md; stdout if not given.")
@click.option("--force", is_flag=True, help="Replace a FILE that is no card of rq-gguf.")
def card(
    files: tuple[Path, ...],
    evals: tuple[Path, ...],
    benches: tuple[Path, ...],
    repo: str | None,
    base_model: str | None,
    license: str | None,
    quantized_by: str | None,
    install: str | None,
    out: Path | None,
    force: bool,
) -> None:
    """A model card for files that build wrote, and the command that uploads them.

    It says what the files hold and what was measured on them, and nothing else.
    """
    from rq_gguf.atomic import replacing
    from rq_gguf.card import facts, page
    from rq_gguf.verbosity import say

    if out is not None and out.exists() and not force and not page.is_card(out.read_text(encoding="utf-8", errors="replace")):
        raise Failure(f"{out} is no card that rq-gguf wrote; use --force to replace it, or choose another name")
    found = facts.gather(
        files, evals=evals, benches=benches, base_model=base_model, license=license, quantized_by=quantized_by
    )  # fmt: skip
    text = page.card(found, install or page.INSTALL, repo or page.REPOSITORY)
    if out is None:
        click.echo(text, nl=False)
    else:
        with replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(f"card      {out}")
    say("publish it with")
    for command in page.upload_commands(found, out, repo or page.REPOSITORY):
        say(f"  {command}")
