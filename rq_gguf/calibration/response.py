"""What a change of one layer's experts does to the rest of the model: measured by making the change.

One layer and matrix group after the other takes a reference type, for all experts; some sequences pass the model, and two things are
recorded: how far the next-token probabilities move (Kullback-Leibler divergence), and how often a later layer's router picks other experts.
The second is needed because the two grow differently: what moves smoothly grows with the error, and choices that flip grow with its square
root (planning.error puts them together).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rq_gguf.calibration.data import LayerCalibration, Response
from rq_gguf.calibration.families import MoeBlock
from rq_gguf.calibration.feedback import layer_feedback
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.requantize import Tick, in_threads, requantize
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.types import bits_per_weight

SEQUENCES = 8
"""Sequences that pass for each layer and group."""
_REFERENCE_BITS = 4.5  # as coarse as files usually are: finer types would leave too few flips to count
_MOST_LOGITS = 1 << 26
"""Probabilities kept of the unchanged model, 4 bytes each: fewer positions are scored where the vocabulary is large."""


def reference_type(types: tuple[str, ...]) -> str:
    """The measured type that layers are changed to: the nearest to 4.5 bits per weight."""
    return min(types, key=lambda t: (abs(bits_per_weight(t) - _REFERENCE_BITS), t))


def scored_positions(length: int, sequences: int, vocabulary: int) -> NDArray[np.int64]:
    """Positions of a sequence whose next-token probabilities are compared: of the second half (llama-perplexity scores it too), all or
    every so many."""
    second_half = np.arange(length // 2, length)
    most = max(1, _MOST_LOGITS // (sequences * vocabulary))
    return second_half[:: -(-len(second_half) // most)]


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of `after` from `before`: log-probabilities [..., vocabulary]."""
    return float((before.exp() * (before - after)).sum(dim=-1).mean(dtype=torch.float64).item())


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of tokens for which other experts were chosen. ids: [n, top_k] each, in any order."""
    return float((before.sort(dim=1).values != after.sort(dim=1).values).any(dim=1).float().mean().item())


def measure_response(
    model: Any,
    blocks: list[MoeBlock],
    layers: list[LayerCalibration],
    sequences: Tensor,
    types: tuple[str, ...],
    ggml: Ggml,
    *,
    n_tokens: int,
    threads: int,
    tick: Tick,
) -> Response:
    """Change every layer and group in turn and see what follows.

    model: the causal LM, whose weights are changed in place and restored. blocks, layers: its MoE blocks and what was observed of them.
    sequences: token ids [n, length] on the model's device. types: measured types. n_tokens: tokens that `layers` were observed on.
    tick: called per layer and group.
    """
    kind = reference_type(types)
    positions = torch.from_numpy(scored_positions(sequences.shape[1], len(sequences), model.config.vocab_size)).to(sequences.device)
    error, kld = np.zeros((2, len(blocks), len(GROUPS)))
    # Energies over tokens but each sequence's first: see LayerCalibration.residual_energy.
    passed = sequences.shape[0] * (sequences.shape[1] - 1)
    flips = np.zeros((len(blocks), len(GROUPS), len(blocks)))
    with _recorder(model, blocks, sequences, positions) as run:
        before = run(None, None)
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            for g, group in enumerate(GROUPS):
                with _changed(block, layer, group, kind, ggml, threads):
                    after = run(block.layer, before)
                change = (after.output[block.layer] - before.output[block.layer])[:, 1:].float()
                error[i, g] = change.square().sum(dtype=torch.float64).item() / passed * n_tokens / layer.residual_energy
                kld[i, g] = max(0.0, divergence(before.log_probs, after.log_probs))
                for j in range(i + 1, len(blocks)):
                    flips[i, g, j] = flip_rate(before.chosen[blocks[j].layer], after.chosen[blocks[j].layer])
                tick()
    return Response(kind, error, kld, flips)


@dataclass(frozen=True)
class _Pass:
    """What was seen while sequences passed."""

    log_probs: Tensor  # [sequences, positions, vocabulary]
    chosen: dict[int, Tensor]  # layer -> [tokens, top_k]
    output: dict[int, Tensor]  # layer -> [sequences, length, n_embd] of its MoE block
    into: dict[int, Any]  # layer -> the output of the layer before it


_Run = Callable[[int | None, _Pass | None], _Pass]


@contextmanager
def _recorder(model: Any, blocks: list[MoeBlock], sequences: Tensor, positions: Tensor) -> Iterator[_Run]:
    """A function that passes the sequences, scoring `positions`. Called with a layer and an earlier pass, it skips all layers before that
    one, whose outputs are those of the earlier pass."""
    decoder: nn.ModuleList = model.model.layers
    chosen: dict[int, Tensor] = {}
    output: dict[int, Tensor] = {}
    into: dict[int, Any] = {}

    def on_block(block: MoeBlock) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            chosen[block.layer] = block.route(args[0].reshape(-1, args[0].shape[-1]))[0]

        return hook

    def on_output(block: MoeBlock) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, result: Any) -> None:
            output[block.layer] = result[0] if isinstance(result, tuple) else result

        return hook

    def on_layer(i: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, result: Any) -> None:
            into[i + 1] = result

        return hook

    handles = [b.module.register_forward_pre_hook(on_block(b)) for b in blocks]
    handles += [b.module.register_forward_hook(on_output(b)) for b in blocks]
    first = {b.layer for b in blocks}
    handles += [decoder[i].register_forward_hook(on_layer(i)) for i in range(len(decoder)) if i + 1 in first]

    def run(layer: int | None, earlier: _Pass | None) -> _Pass:
        for seen in (chosen, output, into):
            seen.clear()
        skipped = range(0)
        if layer is not None and earlier is not None and layer in earlier.into:
            skipped, result = range(layer), earlier.into[layer]
            for i in skipped:
                decoder[i].forward = lambda *args, **kwargs: result
        try:
            logits = model(input_ids=sequences, use_cache=False, logits_to_keep=positions).logits
        finally:
            for i in skipped:
                del decoder[i].forward
        return _Pass(logits.float().log_softmax(dim=-1), dict(chosen), dict(output), dict(into))

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _changed(block: MoeBlock, layer: LayerCalibration, group: str, kind: str, ggml: Ggml, threads: int) -> Iterator[None]:
    """All experts of a block with the matrices of a group as they come back from a type."""
    names = ("down",) if group == "down" else ("gate", "up")
    importance, feedback = {m: matrix_rows(layer, m) for m in names}, None if group == "down" else layer_feedback(layer)
    index = {"gate": 0, "up": 1, "down": 2}
    kept: list[list[Tensor]] = [[] for _ in range(block.n_expert)]

    def change(e: int) -> None:
        with torch.inference_mode():
            for m in names:
                weight = block.expert(e)[index[m]]
                kept[e].append(weight.cpu().clone())
                back = requantize(ggml, kind, weight.float().cpu().numpy(), importance[m][e], feedback)
                weight.copy_(torch.from_numpy(back))

    try:
        in_threads(change, block.n_expert, threads, lambda: None)
        yield
    finally:
        for e, before in enumerate(kept):
            for m, weight in zip(names, before, strict=False):
                block.expert(e)[index[m]].copy_(weight)
