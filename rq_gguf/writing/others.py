"""Everything but the routed experts: stored as llama-quantize stores it in a Q8_0 file.

Which tensors that quantizes is for llama.cpp to say, so its own dry run is asked.
"""

import re
from collections.abc import Mapping

from rq_gguf.errors import UserError
from rq_gguf.format import parse_expert_name
from rq_gguf.runtime.tools import run_tool
from rq_gguf.writing.gguf_file import pad, row_bytes
from rq_gguf.writing.source import Source

_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[ \d,]*\], type = *(\S+), size = .*? MiB(?: -> .* MiB \((\S+)\))?\s*")
_PLAIN = ("f32", "f16", "bf16")


def stored_types(source: Source) -> dict[str, str]:
    """Tensor name -> ggml type that it takes in the new file, for all tensors that are not routed experts' weights.

    Tensors that are quantized in the source stay as they are. Raises UserError where llama-quantize cannot read the model.
    """
    lines = run_tool(["llama-quantize", "--dry-run", source.path, "Q8_0"])
    wanted = parse_dry_run(lines.stdout + "\n" + lines.stderr)
    missing = source.tensors.keys() - wanted.keys()
    if missing:
        raise UserError(f"llama-quantize --dry-run {source.path} did not list {min(missing)}; run `rq-gguf runtime doctor`")
    return {
        name: wanted[name] if tensor.type in _PLAIN else tensor.type
        for name, tensor in source.tensors.items()
        if parse_expert_name(name) is None
    }


def parse_dry_run(text: str) -> dict[str, str]:
    """Tensor name -> type after quantizing, lower case, from what `llama-quantize --dry-run` prints."""
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {m[1]: (m[3] or m[2]).lower() for m in found if m}


def fixed_bytes(source: Source, types: Mapping[str, str], tiers: int = 2) -> int:
    """Most bytes that a file takes besides tier tensors and maps: header, padding and all other tensors.

    types: from `stored_types`. tiers: most tiers a layer and matrix may get, for the header's size.
    """
    data = sum(pad(source.tensors[name].n_rows * row_bytes(kind, source.tensors[name].cols)) for name, kind in types.items())
    header = sum(8 + len(key) + 4 + len(value.raw) for key, value in source.header.values.items())
    header += sum(8 + len(t.name) + 4 + 8 * len(t.ne) + 12 for t in source.tensors.values())
    for layer in source.shape.layers:
        header += (1 + tiers * len(layer.matrices)) * 96  # a tensor's entry: name of at most 64 characters, three sizes
        header += 64 + 4 * layer.n_expert  # load
    return data + header + PROVENANCE_BYTES


PROVENANCE_BYTES = 1 << 14
"""Room for the rq.* and quantize.* values but the loads."""
