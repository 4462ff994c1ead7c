"""Everything but the routed experts: stored as llama-quantize stores it in a file of the type that `--other` names.

Which tensors that quantizes, and to what, is for llama.cpp to say, so its own dry run is asked.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from rq_gguf import defaults
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, build_header, pad, scalar, string, strings
from rq_gguf.runtime.tools import run_tool
from rq_gguf.types import NEEDS_IMATRIX, QUANTIZABLE, fallback, row_bytes
from rq_gguf.writing.source import Source

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
"""Name of a type of whole files, as llama-quantize takes it -> its number in general.file_type (llama.h, enum llama_ftype)."""

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own
_NAMED_OTHERWISE = {"mxfp4": "MXFP4_MOE"}
_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[ \d,]*\], type = *(\S+), size = .*? MiB(?: -> .* MiB \((\S+)\))?\s*")
_PLAIN = ("f32", "f16", "bf16")
_WITHOUT_ROW = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")  # llama-quantize wants no importance row of these


@dataclass(frozen=True)
class Others:
    """A user's choice for all tensors but the routed experts. Make one with `parse_others`."""

    file_type: str = defaults.OTHER
    """A key of FILE_TYPES."""
    tensor_types: tuple[tuple[str, str], ...] = ()
    """(regular expression, ggml type): the first that is found in a tensor's name decides."""

    @property
    def texts(self) -> tuple[str, ...]:
        """tensor_types as the user writes them."""
        return tuple(f"{pattern}={kind}" for pattern, kind in self.tensor_types)


def parse_others(other: str = defaults.OTHER, tensor_types: Iterable[str] = ()) -> Others:
    """A user's `--other` and all `--tensor-type`. Raises UserError for what llama-quantize would not understand."""
    name = other.strip().upper()
    name = _ALIASES.get(name, name)
    if name not in FILE_TYPES:
        raise UserError(f"--other {other} is unknown; it can be {', '.join(FILE_TYPES)}")
    pairs = []
    for text in tensor_types:
        pattern, separator, kind = text.partition("=")
        pattern, kind = pattern.strip().lower(), kind.strip().lower()  # llama-quantize ignores the case too
        if not separator or not pattern:
            raise UserError(f"--tensor-type {text} is not understood; give REGEX=TYPE, such as attn_v=q6_k")
        if kind not in QUANTIZABLE:
            raise UserError(f"--tensor-type {text}: unknown type '{kind}'; allowed are {', '.join(sorted(QUANTIZABLE))}")
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"--tensor-type {text}: '{pattern}' is no regular expression: {e}") from e
        pairs.append((pattern, kind))
    return Others(name, tuple(pairs))


def file_type_of(tensors: Iterable[Tensor]) -> int | None:
    """general.file_type of a file with these tensors: that of the type which most weights have (llama.cpp guesses so where the key is
    missing, by tensors). None for a type that no file type is named after."""
    weights: Counter[str] = Counter()
    for t in tensors:
        weights[t.type] += t.cols * t.n_rows
    kind = weights.most_common(1)[0][0]
    name = _NAMED_OTHERWISE.get(kind, kind.upper())
    return FILE_TYPES.get(_ALIASES.get(name, name))


def stored_types(source: Source, others: Others | None = None) -> dict[str, str]:
    """Tensor name -> ggml type that it takes in the new file, for all tensors that are not routed experts' weights.

    Tensors that are quantized in the source stay as they are, as long as the user did not ask for another type than Q8_0.
    Raises UserError where llama-quantize cannot read the model, where a tensor would be quantized a second time, and for a --tensor-type
    that changes nothing or would change routed experts.
    """
    others = others or Others()
    wanted = _dry_run(source, others)
    named = _check_tensor_types(source, others, wanted)
    types = {}
    for name, tensor in source.tensors.items():
        if source.is_routed(name):
            continue
        kind = wanted[name]
        if tensor.type not in _PLAIN and kind != tensor.type:
            if others.file_type != defaults.OTHER or name in named:
                raise UserError(
                    f"{source.path}: {name} is {tensor.type} already and would be quantized a second time, to {kind}; give an F16, BF16 or "
                    f"F32 GGUF of the model, or leave the other tensors as they are (--other {defaults.OTHER})"
                )
            kind = tensor.type
        types[name] = kind
    return types


def _dry_run(source: Source, others: Others) -> dict[str, str]:
    options = [word for text in others.texts for word in ("--tensor-type", text)]
    with tempfile.TemporaryDirectory(prefix="rq-gguf-") as folder:
        # Some of llama-quantize's choices depend on there being an importance matrix at all, and the writer always has one.
        imatrix = Path(folder) / "imatrix.gguf"
        imatrix.write_bytes(_smallest_imatrix())
        lines = run_tool(["llama-quantize", "--dry-run", "--imatrix", imatrix, *options, source.path, others.file_type])
    wanted = parse_dry_run(lines.stdout + "\n" + lines.stderr)
    missing = source.tensors.keys() - wanted.keys()
    if missing:
        raise UserError(f"llama-quantize --dry-run {source.path} did not list {min(missing)}; run `rq-gguf doctor`")
    return wanted


def _smallest_imatrix() -> bytes:
    values = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings([""]),
        "imatrix.chunk_count": scalar(GGUFValueType.UINT32, 1),
        "imatrix.chunk_size": scalar(GGUFValueType.UINT32, 1),
    }
    header, tensors = build_header(values, [Tensor("x.in_sum2", "f32", (1, 1)), Tensor("x.counts", "f32", (1, 1))])
    return header + b"".join(np.float32(1).tobytes().ljust(pad(t.n_bytes), b"\0") for t in tensors)


def parse_dry_run(text: str) -> dict[str, str]:
    """Tensor name -> type after quantizing, lower case, from what `llama-quantize --dry-run` prints."""
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {m[1]: (m[3] or m[2]).lower() for m in found if m}


def _check_tensor_types(source: Source, others: Others, wanted: Mapping[str, str]) -> set[str]:
    """The tensors that --tensor-type decides. Raises UserError for an expression that matches nothing, routed experts, or in vain."""
    named: set[str] = set()
    for (pattern, kind), text in zip(others.tensor_types, others.texts, strict=True):
        matches = [name for name in source.tensors if re.search(pattern, name)]
        if not matches:
            raise UserError(f"--tensor-type {text} matches no tensor of {source.path}")
        expert = next((name for name in matches if source.is_routed(name)), None)
        if expert is not None:
            raise UserError(
                f"--tensor-type {text} matches {expert}: the plan decides the types of routed experts (--types, --plan); "
                "write an expression that only other tensors match"
            )
        first = [name for name in matches if name not in named]
        taken = [name for name in first if wanted[name] == fallback(kind, source.tensors[name].cols)]
        if not taken:
            name = (first or matches)[0]
            why = (
                "an earlier one matches it too"
                if not first
                else f"llama-quantize keeps it in {wanted[name]} in a file of {others.file_type}"
            )
            raise UserError(f"--tensor-type {text} changes nothing: it matches {name}, but {why}")
        named.update(taken)
    return named


def importance_rows(source: Source, types: Mapping[str, str], calibration: Calibration) -> dict[str, NDArray[np.float32]]:
    """Tensor name -> float32 [matrices, columns], mean squared inputs, for the tensors that are quantized and were observed.

    types: from `stored_types`. Means are computed as llama-quantize computes them. Raises UserError for inputs of another size than the
    tensor's, and where a type needs a row that the calibration lacks.
    """
    rows = {}
    for name, kind in types.items():
        tensor = source.tensors[name]
        if kind == tensor.type or kind in _PLAIN:
            continue
        sums = calibration.dense_in_sum2.get(name)
        if sums is not None and calibration.n_tokens > 0:
            matrices = tensor.n_rows // tensor.ne[1] if len(tensor.ne) > 1 else 1
            if sums.size == matrices * tensor.cols:
                rows[name] = (sums / np.float32(calibration.n_tokens)).reshape(matrices, tensor.cols)
                continue
            if name not in _WITHOUT_ROW:
                raise UserError(
                    f"the calibration has {sums.size} inputs of {name}, {source.path} needs {matrices * tensor.cols}; calibrate this model"
                )
        if kind in NEEDS_IMATRIX and name not in _WITHOUT_ROW:
            raise UserError(
                f"{name} cannot be {kind}, which needs an importance row, and the calibration has none of that tensor; "
                "choose another type with --other or --tensor-type"
            )
    return rows


def fixed_bytes(source: Source, types: Mapping[str, str], tiers: int = 2, others: Others | None = None) -> int:
    """Most bytes that a file takes besides tier tensors and maps: header, padding and all other tensors.

    types: from `stored_types`. tiers: most tiers a layer and matrix may get, for the header's size.
    """
    data = sum(pad(source.tensors[name].n_rows * row_bytes(kind, source.tensors[name].cols)) for name, kind in types.items())
    header = sum(8 + len(key) + 4 + len(value.raw) for key, value in source.header.values.items())
    header += sum(8 + len(t.name) + 4 + 8 * len(t.ne) + 12 for t in source.tensors.values())
    for layer in source.shape.layers:
        header += (1 + tiers * len(layer.matrices)) * 96  # a tensor's entry: name of at most 64 characters, three sizes
        header += 64 + 4 * layer.n_expert  # load
    header += sum(8 + len(text.encode()) for text in (others or Others()).texts)
    return data + header + PROVENANCE_BYTES


PROVENANCE_BYTES = 1 << 14
"""Room for the rq.* and quantize.* values but the loads and --tensor-type."""
