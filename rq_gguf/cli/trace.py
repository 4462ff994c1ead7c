"""Record routing."""

from pathlib import Path

import click

from rq_gguf import defaults
from rq_gguf.cli.options import INPUT, JSON, MEMORY, emit, examples, path_type


@click.command(epilog=examples("rq-gguf trace demo -o trace.npz --tokens 4096"))
@click.argument("model")
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE.npz", help="The trace to write.")
@click.option("--text", type=INPUT, metavar="FILE", help="Text to pass; the project's own by default.")
@click.option("--tokens", type=click.IntRange(min=1), default=defaults.TOKENS, show_default=True, metavar="N", help="Tokens of it to use.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@MEMORY
@JSON
def trace(model: str, out: Path, text: Path | None, tokens: int, device: str, max_memory: str | None, json_file: Path | None) -> None:
    """Record which experts MODEL's tokens pick, for simulate: a byte per token, layer and chosen expert.

    Prints what share of the selections busy experts in VRAM would catch: those of one half of the text, on the other half.

    MODEL is demo, a Hugging Face directory or hub id, or a GGUF, which the patched llama.cpp runs.
    """
    from rq_gguf.choices import parse_memory
    from rq_gguf.record import hot_experts, record_routing, to_json
    from rq_gguf.vram import table

    made = record_routing(model, out, text=text, tokens=tokens, device=device, max_memory=parse_memory(max_memory))
    line = f"{out}: {made.n_tokens} tokens, {len(made.layers)} layers, {made.n_expert_used} of {made.n_expert} experts each"
    hits = hot_experts(made)
    lines = [line] if not hits else [line, *table.hits_lines(hits, made.n_expert)]
    emit(lines, json_file, to_json(made, out) | {"hits": table.hits_json(hits)})
