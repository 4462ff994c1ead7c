"""Measure a model."""

from pathlib import Path

import click

from rq_gguf import defaults
from rq_gguf.cli.options import INPUT, JSON, MEMORY, emit, examples, path_type
from rq_gguf.types import LADDER


@click.command(epilog=examples("rq-gguf calibrate demo -o calibration.gguf --tokens 2048 --types q4_k,q8_0"))
@click.argument("model")
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE", help="The calibration file to write.")
@click.option("--text", type=INPUT, metavar="FILE", help="Text to calibrate on; the project's own by default.")
@click.option("--tokens", type=click.IntRange(min=1), default=defaults.TOKENS, show_default=True, metavar="N", help="Tokens of it to use.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--types", default=",".join(LADDER), show_default=True, metavar="LIST", help="ggml types to measure.")
@click.option(
    "--trace", type=path_type(dir_okay=False), metavar="FILE.npz", help="Write which experts each token picked, too, for simulate."
)
@MEMORY
@JSON
def calibrate(
    model: str,
    out: Path,
    text: Path | None,
    tokens: int,
    device: str,
    types: str,
    trace: Path | None,
    max_memory: str | None,
    json_file: Path | None,
) -> None:
    """Measure MODEL's experts: how busy they are, and what each type does to them.

    The file is also an imatrix for llama-quantize.
    """
    from rq_gguf import verdict
    from rq_gguf.build import calibrate_model
    from rq_gguf.choices import parse_memory

    memory = parse_memory(max_memory)
    c = calibrate_model(model, out, text=text, tokens=tokens, device=device, types=types, max_memory=memory, trace=trace)
    emit([verdict.calibration_line(c, out)], json_file, verdict.calibration_json(c, out))
