"""What is counted while tokens pass a MoE block. Pure functions on tensors: no hooks, no IO."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Expert = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""Expert index -> (gate [n_ff, n_embd], up [n_ff, n_embd], down [n_embd, n_ff])."""
Units = NDArray[np.int64] | None
"""Indices of an expert's hidden units, None for all."""


class Hidden(Protocol):
    """What an expert computes before `down`."""

    def __call__(self, x: Tensor, gate: Tensor, up: Tensor, units: Units = None) -> Tensor:
        """[n, units] for x [n, n_embd]. units: those that the rows of gate and up belong to."""


@dataclass(frozen=True)
class BlockSums:
    """Sums over tokens for one MoE block; float64 or int64 on the host, so that batches add up exactly enough."""

    selections: NDArray[np.int64]  # [n_expert]
    gate_weight: NDArray[np.float64]  # [n_expert]
    output_energy: NDArray[np.float64]  # [n_expert] |gate weight x expert output|^2
    in_gate_up: NDArray[np.float64]  # [n_expert, n_embd] squared inputs of gate and up
    in_down: NDArray[np.float64]  # [n_expert, n_ff] squared inputs of down
    moments: NDArray[np.float32]  # [n_embd, n_embd] products of inputs of the block

    def __add__(self, other: "BlockSums") -> "BlockSums":
        return BlockSums(
            self.selections + other.selections,
            self.gate_weight + other.gate_weight,
            self.output_energy + other.output_energy,
            self.in_gate_up + other.in_gate_up,
            self.in_down + other.in_down,
            self.moments + other.moments,
        )


def expert_hidden(x: Tensor, gate: Tensor, up: Tensor, units: Units = None) -> Tensor:
    """silu(gate x) * (up x), the input of down: [n, n_ff] for x [n, n_embd]."""
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)


def _silu_without_biases(_: int) -> Hidden:
    return expert_hidden


def _no_bias(_: int) -> None:
    return None


def observe_block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    expert: Expert,
    *,
    n_expert: int,
    n_ff: int,
    mask: Tensor | None = None,
    hidden: Callable[[int], Hidden] = _silu_without_biases,
    output_bias: Callable[[int], Tensor | None] = _no_bias,
    weighs_inputs: bool = False,
) -> BlockSums:
    """Sums over one batch.

    x: [n, n_embd] block inputs. ids: [n, top_k] chosen experts. weights: [n, top_k] their gate weights. expert: weights by index.
    mask: bool [n], False for padding, which counts nowhere. hidden, output_bias: by index, what an expert does before and after `down`.
    weighs_inputs: gate weights scale the experts' inputs, not their outputs.
    """
    if mask is not None:
        x, ids, weights = x[mask], ids[mask], weights[mask]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    tokens, gates = order // ids.shape[1], weights.reshape(-1)[order].float()
    selections = np.bincount(flat.cpu().numpy(), minlength=n_expert).astype(np.int64)

    # Filled on the device and fetched once: a fetch per expert would make a GPU wait.
    gate_weight, energy = x.new_zeros(2, n_expert, dtype=torch.float32)
    in_gate_up = x.new_zeros(n_expert, x.shape[1], dtype=torch.float32)
    in_down = x.new_zeros(n_expert, n_ff, dtype=torch.float32)
    stop = 0
    for e, n in enumerate(selections.tolist()):
        start, stop = stop, stop + n
        if n == 0:
            continue
        gate, up, down = expert(e)
        xe, ge = x[tokens[start:stop]], gates[start:stop]
        if weighs_inputs:
            xe = xe * ge[:, None].to(xe.dtype)
        inner = hidden(e)(xe, gate, up)
        out, bias = inner @ down.T, output_bias(e)
        if bias is not None:
            out = out + bias.to(out.device, out.dtype)
        gate_weight[e] = ge.sum()
        energy[e] = (out.float() if weighs_inputs else out.float() * ge[:, None]).square().sum()
        in_gate_up[e] = xe.float().square().sum(dim=0)
        in_down[e] = inner.float().square().sum(dim=0)
    inputs = x.float()
    moments = (inputs.T @ inputs).cpu().numpy()
    return BlockSums(selections, _host(gate_weight), _host(energy), _host(in_gate_up), _host(in_down), moments)


def _host(t: Tensor) -> NDArray[np.float64]:
    return t.cpu().double().numpy()


def residual_energy(hidden: Tensor, mask: Tensor | None = None) -> float:
    """Sum of |residual stream|^2 over tokens: hidden [n, n_embd], mask bool [n]."""
    if mask is not None:
        hidden = hidden[mask]
    return float(hidden.float().square().sum(dim=1).sum().item())


def input_energy(x: Tensor, mask: Tensor | None = None) -> NDArray[np.float64]:
    """[cols] sums of squared inputs of an ordinary linear layer: x [n, cols], mask bool [n]."""
    if mask is not None:
        x = x[mask]
    return _host(x.float().square().sum(dim=0))
