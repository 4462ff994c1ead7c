"""How large a model's file is for what it holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rq_gguf.format import parse_expert_name, parse_map_name
from rq_gguf.gguf_file import Tensor, read_headers


@dataclass(frozen=True)
class Size:
    """Of a model, over all its files."""

    file_bytes: int
    tensor_bytes: int
    """Without header and padding, as llama.cpp counts."""
    weights: int
    """Of the model: copies and maps are none."""

    @property
    def bpw(self) -> float:
        """Bits per weight of the model; copies cost bits and add no weights."""
        return 8 * self.tensor_bytes / self.weights


def model_size(path: Path) -> Size:
    """The size of a tiered or stock GGUF, split or not. Raises UserError as read_headers does."""
    headers = read_headers(path)
    tensors = [t for h in headers for t in h.tensors.values()]
    return Size(sum(h.size for h in headers), sum(t.n_bytes for t in tensors), count_weights(tensors))


def count_weights(tensors: Iterable[Tensor]) -> int:
    """Weights of the model that these tensors store: of an expert's instances only one counts."""
    tensors = list(tensors)
    logical = {layer: t.ne[1] for t in tensors if (layer := parse_map_name(t.name)) is not None}
    total = 0
    experts: dict[tuple[int, str], int] = {}
    for t in tensors:
        expert = parse_expert_name(t.name)
        if expert is not None and expert[0] in logical:
            experts[expert[:2]] = t.ne[0] * t.ne[1] * logical[expert[0]]
        elif parse_map_name(t.name) is None:
            total += t.cols * t.n_rows
    return total + sum(experts.values())
