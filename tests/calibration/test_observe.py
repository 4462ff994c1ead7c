"""Two experts, three tokens, by hand."""

import math

import numpy as np
import torch

from rq_gguf.calibration.observe import input_energy, observe_block, residual_energy

# One hidden unit, so that an expert computes down * silu(gate . x) * (up . x).
EXPERTS = [
    (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [1.0]])),
    (torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [0.0]])),
]
X = torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 2.0]])
IDS = torch.tensor([[0], [1], [0]])
WEIGHTS = torch.tensor([[0.5], [0.25], [1.0]])


def silu(v: float) -> float:
    return v / (1 + math.exp(-v))


def test_sums_by_hand() -> None:
    sums = observe_block(X, IDS, WEIGHTS, EXPERTS.__getitem__, n_expert=2, n_ff=1)
    h0, h2 = silu(1) * 4, silu(2) * 4  # tokens 0 and 2 in expert 0
    assert sums.selections.tolist() == [2, 1]
    assert sums.gate_weight.tolist() == [1.5, 0.25]
    assert np.allclose(sums.in_gate_up, [[1 + 4, 4 + 4], [0, 1]])
    assert np.allclose(sums.in_down, [[h0**2 + h2**2], [0]])  # token 1 has up . x = 0
    assert np.allclose(sums.output_energy, [2 * (0.5 * h0) ** 2 + 2 * h2**2, 0])


def test_padding_counts_nowhere() -> None:
    mask = torch.tensor([True, True, False])
    sums = observe_block(X, IDS, WEIGHTS, EXPERTS.__getitem__, n_expert=2, n_ff=1, mask=mask)
    assert sums.selections.tolist() == [1, 1]
    assert sums.gate_weight.tolist() == [0.5, 0.25]
    assert np.allclose(sums.in_gate_up, [[1, 4], [0, 1]])
    assert np.allclose(sums.output_energy, [2 * (0.5 * silu(1) * 4) ** 2, 0])
    assert residual_energy(X, mask) == 6
    assert input_energy(X, mask).tolist() == [1, 5]


def test_all_padding() -> None:
    sums = observe_block(X, IDS, WEIGHTS, EXPERTS.__getitem__, n_expert=2, n_ff=1, mask=torch.zeros(3, dtype=torch.bool))
    assert sums.selections.tolist() == [0, 0] and sums.in_down.shape == (2, 1) and sums.output_energy.sum() == 0


def test_batches_add_up() -> None:
    ids, weights = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    whole = observe_block(X, ids, weights, EXPERTS.__getitem__, n_expert=2, n_ff=1)
    first = observe_block(X[:1], ids[:1], weights[:1], EXPERTS.__getitem__, n_expert=2, n_ff=1)
    parts = first + observe_block(X[1:], ids[1:], weights[1:], EXPERTS.__getitem__, n_expert=2, n_ff=1)
    assert parts.selections.tolist() == whole.selections.tolist() == [3, 3]
    for field in ("gate_weight", "output_energy", "in_gate_up", "in_down"):
        assert np.allclose(getattr(parts, field), getattr(whole, field))


def test_energies() -> None:
    assert residual_energy(X) == 14
    assert input_energy(X).tolist() == [5, 9]
