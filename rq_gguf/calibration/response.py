"""What a change of one layer's experts does to the rest of the model: measured by making the change.

One layer and matrix group after the other takes a reference type, for all experts; some sequences pass the model, and two things are
recorded: how far the next-token probabilities move (Kullback-Leibler divergence), and how often a later layer's router picks other experts.
The second is needed because the two grow differently: what moves smoothly grows with the error, and choices that flip grow with its square
root (planning.error puts them together).

All changed models advance together, layer by layer: until their change comes they are the unchanged one, and behind it all that differs is
what passes from layer to layer. So a layer's weights are needed once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from rq_gguf.calibration.data import LayerCalibration, Response
from rq_gguf.calibration.families import MoeBlock
from rq_gguf.calibration.feedback import Feedback, layer_feedback
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.on_device import MATRICES, at_once, on_device, requantized
from rq_gguf.calibration.requantize import Tick, in_threads, requantize
from rq_gguf.calibration.spool import Spool
from rq_gguf.calibration.stream import Streamed
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.types import bits_per_weight

SEQUENCES = 8
"""Sequences that pass for each layer and group."""
_REFERENCE_BITS = 4.5  # as coarse as files usually are: finer types would leave too few flips to count
_MOST_LOGITS = 1 << 26
"""Next-token probabilities of all sequences, in one model: fewer positions are scored where the vocabulary is large."""


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


@dataclass
class _Variant:
    """A model in which one layer and group is changed."""

    error: float
    """As in Response.error."""
    flips: dict[int, float] = field(default_factory=dict)
    """Later layer -> share of tokens."""
    kld: float = 0.0


@dataclass(frozen=True)
class _Seen:
    """What a block did while the sequences passed."""

    chosen: list[Tensor]  # [tokens, top_k] each
    output: list[Tensor]  # [n, length, n_embd] each


class Variants:
    """The unchanged model and one for each layer and group that was passed, all with the same sequences on their way through."""

    def __init__(self, sequences: list[Tensor], kind: str, spool: Spool, ggml: Ggml, *, n_tokens: int, threads: int) -> None:
        """sequences: token ids [n, length] to pass at a time, of one length. kind: the ggml type that experts take.
        n_tokens: tokens that residual energies were observed on.
        """
        self._sequences, self._kind, self._spool, self._ggml = sequences, kind, spool, ggml
        self._n_tokens, self._threads = n_tokens, threads
        # Energies over tokens but each sequence's first: see LayerCalibration.residual_energy.
        self._passed = sum(s.shape[0] * (s.shape[1] - 1) for s in sequences)
        self._variants: dict[tuple[int, int], _Variant] = {}

    def pass_layer(
        self,
        model: Streamed,
        i: int,
        block: MoeBlock | None,
        layer: LayerCalibration | None,
        tick: Tick,
        feedback: Feedback | None = None,
    ) -> None:
        """Layer i, which is loaded. block, layer: its experts and what was observed of them, None where it has none.

        The weights of gate and up stay changed. tick: called for each model that passed. feedback: of layer_feedback, where it was made
        already.
        """
        with torch.inference_mode():
            here, behind = ("unchanged", i), ("unchanged", i + 1)
            before = self._pass(model, i, block, here, behind)
            tick()
            for key, variant in self._variants.items():
                after = self._pass(model, i, block, key, key)
                if block is not None:
                    variant.flips[i] = flip_rate(torch.cat(before.chosen), torch.cat(after.chosen))
                tick()
            if block is not None and layer is not None:
                # down first: gate and up need not be restored, nobody uses the layer again.
                for g in (1, 0):
                    kept = change(block, layer, GROUPS[g], self._kind, self._ggml, self._threads, feedback)
                    after = self._pass(model, i, block, here, (i, g))
                    energy = _energy(after.output, before.output) / self._passed
                    self._variants[i, g] = _Variant(energy * self._n_tokens / layer.residual_energy)
                    for weight, old in kept:
                        weight.copy_(old)
                    tick()
            for n in range(len(self._sequences)):
                self._spool.drop((*here, n))

    def _pass(self, model: Streamed, i: int, block: MoeBlock | None, source: tuple[Any, int], target: tuple[Any, int]) -> _Seen:
        """Pass layer i with the hidden states kept under `source`, and keep what comes out under `target`."""
        seen = _Seen([], [])
        with _watched(block, seen):
            for n, ids in enumerate(self._sequences):
                out = model.through(i, ids, self._spool.get((*source, n)) if i else None)
                self._spool.put((*target, n), out)
        return seen

    def finish(self, model: Streamed) -> Response:
        """All layers were passed, and the model's head is loaded."""
        n_sequences = sum(len(s) for s in self._sequences)
        length, vocabulary = self._sequences[0].shape[1], model.config.get_text_config().vocab_size
        positions = torch.from_numpy(scored_positions(length, n_sequences, vocabulary))
        with torch.inference_mode():
            # One sequence at a time: the probabilities of all would take gigabytes.
            for n, row in ((n, row) for n, ids in enumerate(self._sequences) for row in range(len(ids))):
                before = self._log_probs(model, ("unchanged", len(model)), n, row, positions)
                for key, variant in self._variants.items():
                    after = self._log_probs(model, key, n, row, positions)
                    variant.kld += divergence(before, after) / n_sequences
        return self._response()

    def _log_probs(self, model: Streamed, key: tuple[Any, int], n: int, row: int, positions: Tensor) -> Tensor:
        """[1, positions, vocabulary] of one sequence."""
        ids, hidden = self._sequences[n][row : row + 1], self._spool.get((*key, n))[row : row + 1]
        return model.logits(ids, hidden, positions).float().log_softmax(dim=-1)

    def _response(self) -> Response:
        layers = sorted({layer for layer, _ in self._variants})
        index = {layer: i for i, layer in enumerate(layers)}
        error, kld = np.zeros((2, len(layers), len(GROUPS)))
        flips = np.zeros((len(layers), len(GROUPS), len(layers)))
        for (layer, g), variant in self._variants.items():
            error[index[layer], g], kld[index[layer], g] = variant.error, max(0.0, variant.kld)
            for later, share in variant.flips.items():
                flips[index[layer], g, index[later]] = share
        return Response(self._kind, error, kld, flips)


def _energy(after: list[Tensor], before: list[Tensor]) -> float:
    """Sum of the squared differences of [n, length, n_embd] each, without each sequence's first token."""
    changes = ((a - b)[:, 1:].float() for a, b in zip(after, before, strict=True))
    return sum(change.square().sum(dtype=torch.float64).item() for change in changes)


@contextmanager
def _watched(block: MoeBlock | None, seen: _Seen) -> Iterator[None]:
    """What a block does is added to `seen`; nothing without a block."""
    if block is None:
        yield
        return

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.chosen.append(block.route(args[0].reshape(-1, args[0].shape[-1]))[0])

    def after(_: nn.Module, __: Any, result: Any) -> None:
        seen.output.append(result[0] if isinstance(result, tuple) else result)

    handles = [block.module.register_forward_pre_hook(before), block.module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def change(
    block: MoeBlock, layer: LayerCalibration, group: str, kind: str, ggml: Ggml, threads: int, feedback: Feedback | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Give all experts of a block the matrices of a group as they come back from a type. (weight, what it was before) each; nothing for
    gate and up. feedback: of layer_feedback, where it was made already."""
    names = ("down",) if group == "down" else ("gate", "up")
    importance = {m: matrix_rows(layer, m) for m in names}
    feedback = None if group == "down" else feedback or layer_feedback(layer)
    if on_device(block.router.device):
        return _change_there(block, importance, kind, ggml, threads, feedback)
    kept: list[tuple[Tensor, Tensor]] = []

    def one(e: int) -> None:
        with torch.inference_mode():
            for m in names:
                weight = block.expert(e)[MATRICES.index(m)]
                if group == "down":
                    kept.append((weight, _smallest(weight.cpu())))
                back = requantize(ggml, kind, weight.float().cpu().numpy(), importance[m][e], feedback)
                weight.copy_(torch.from_numpy(back))

    with threadpool_limits(1):  # numpy's products run in threads already
        in_threads(one, block.n_expert, threads, lambda: None)
    return kept


def _change_there(
    block: MoeBlock, importance: dict[str, NDArray[np.float32]], kind: str, ggml: Ggml, threads: int, feedback: Feedback | None
) -> list[tuple[Tensor, Tensor]]:
    """`change` on the device of the weights. importance: of the matrices that change."""
    kept: list[tuple[Tensor, Tensor]] = []
    for m, rows in importance.items():
        weights = [block.expert(e)[MATRICES.index(m)] for e in range(block.n_expert)]
        if m == "down":
            kept += [(w, w.clone()) for w in weights]
        step = at_once(weights[0].shape)
        for start in range(0, len(weights), step):
            here = slice(start, start + step)
            some = torch.stack(weights[here])
            back = requantized(ggml, kind, some, torch.from_numpy(rows[here]).to(some.device), feedback, threads=threads)
            for weight, changed in zip(weights[here], back, strict=True):
                weight.copy_(changed)
    return kept


def _smallest(weight: Tensor) -> Tensor:
    """A copy, in half the memory where the checkpoint's weights were bfloat16."""
    half = weight.bfloat16()
    return half if torch.equal(half.to(weight.dtype), weight) else weight.clone()
