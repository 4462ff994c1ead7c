"""Simulate experts on several devices."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples, path_type

EXAMPLES = examples(
    "rq-gguf trace demo -o trace.npz --tokens 4096",
    "rq-gguf simulate trace.npz --devices 2..8 --batch 8,128 --copies 8 --plot simulator.svg",
)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)


@click.command(epilog=EXAMPLES)
@click.argument("source", type=INPUT, metavar="CALIBRATION_OR_TRACE")
@click.option("--evaluate", type=INPUT, metavar="TRACE", help="Draw batches from this trace, and plan on all of SOURCE.")
@click.option("--devices", default="2..64", show_default=True, metavar="LIST", help="Numbers of devices: 2,4,8, or 2..64 for doubling.")
@click.option("--batch", default="8..4096", show_default=True, metavar="LIST", help="Sequences that decode together, in the same form.")
@click.option("--copies", type=click.IntRange(min=0), metavar="N", help="Copies per layer, rounded up to equal slots.  [default: a plan's, "
              "or a quarter of the experts]")  # fmt: skip
@click.option("--bits", type=_ABOVE_0, default=16, show_default=True, metavar="N", help="Per expert weight.")
@click.option("--bandwidth", type=_ABOVE_0, default=3350, show_default=True, metavar="GB/S", help="Of a device's memory.")
@click.option("--compute", type=_ABOVE_0, default=989, show_default=True, metavar="TFLOPS", help="Of a device.")
@click.option("--link", type=_ABOVE_0, default=450, show_default=True, metavar="GB/S", help="What a device takes from all others.")
@click.option("--latency", type=click.FloatRange(min=0), default=10, show_default=True, metavar="US", help="Of an exchange; two a layer.")
@click.option("--exchange", type=click.Choice(["all-to-all", "partial-sums", "home"]), default="all-to-all", show_default=True,
              help="Tokens go to their experts; or all devices have all tokens and add up what comes out; or one device sends all "
              "tokens to the others and adds up.")  # fmt: skip
@click.option("--launch", type=click.FloatRange(min=0), default=0, show_default=True, metavar="US",
              help="Of a layer's experts on a device, beyond bytes and arithmetic.")  # fmt: skip
@click.option("--rest", type=click.FloatRange(min=0), default=0, show_default=True, metavar="US", help="Of all else in a layer.")
@click.option("--rereads", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Sequences up to which an expert is read anew for each of its tokens.")  # fmt: skip
@click.option("--tile", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Tokens that an expert is computed for at least, up to the batch's.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Experts per token, where SOURCE does not say.")
@click.option("--shape", metavar="INxINNER", help="Inputs and inner units of an expert (2048x768), where SOURCE does not say.")
@click.option("--plot", type=path_type(dir_okay=False), metavar="FILE.svg", help="Draw the busiest device over the mean.")
@JSON
def simulate(
    source: Path,
    evaluate: Path | None,
    devices: str,
    batch: str,
    copies: int | None,
    bits: float,
    bandwidth: float,
    compute: float,
    link: float,
    latency: float,
    exchange: str,
    launch: float,
    rest: float,
    rereads: int,
    tile: int,
    top_k: int | None,
    shape: str | None,
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """What packing experts onto devices, and copies of the busy ones, would do to decode.

    Takes a trace (one half is planned on, the other evaluated), a calibration, a plan, or SGLang's recorded expert distribution.
    """
    from rq_gguf.placement import make
    from rq_gguf.placement.machine import Machine
    from rq_gguf.placement.table import describe, to_json

    if plot is not None:
        make.check_plot(plot)
    seconds = {"latency": latency * 1e-6, "launch": launch * 1e-6, "rest": rest * 1e-6}
    machine = Machine(bandwidth * 1e9, compute * 1e12, link * 1e9, exchange=exchange, rereads=rereads, tile=tile, **seconds)
    found = make.make_simulation(
        source, evaluate, devices=devices, batches=batch, copies=copies, machine=machine, bits=bits, top_k=top_k, shape=shape
    )
    if plot is not None:
        make.write_plot(plot, found)
    emit(describe(found) + ([] if plot is None else ["", f"plot      {plot}"]), json_file, to_json(found))
