"""Measured errors against direct arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.imatrix import NEVER_HIT_SELECTIONS, imatrix_rows
from rq_gguf.calibration.measure import completed, expert_error, mean_gate_weights, measure_layer
from rq_gguf.calibration.moments import measure_from_imatrix
from rq_gguf.calibration.requantize import requantize
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml

N_EXPERT, N_EMBD, N_FF = 3, 256, 256
RNG = np.random.default_rng(5)
WEIGHTS = {m: (RNG.standard_normal((N_EXPERT, 256, 256)) / 16).astype(np.float32) for m in ("gate", "up", "down")}
X = RNG.standard_normal((40, N_EMBD)).astype(np.float32)
GATE_WEIGHT = RNG.uniform(0.1, 1, 40).astype(np.float32)
ONES = {m: np.ones(256, dtype=np.float32) for m in WEIGHTS}


def weights(layer: int, matrix: str, expert: int) -> np.ndarray:
    return WEIGHTS[matrix][expert]


def output(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    g = x.astype(np.float64) @ w["gate"].T
    return (g / (1 + np.exp(-g)) * (x @ w["up"].T)) @ w["down"].T


def test_expert_error_is_the_change_of_the_output(ggml: Ggml) -> None:
    w = {m: WEIGHTS[m][0] for m in WEIGHTS}
    got = expert_error(torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT), w, ONES, ("q4_k", "q8_0"), ggml)
    for t, name in enumerate(("q4_k", "q8_0")):
        q = {m: requantize(ggml, name, w[m], ONES[m]) for m in w}
        for g, changed in enumerate((w | {"gate": q["gate"], "up": q["up"]}, w | {"down": q["down"]})):
            change = GATE_WEIGHT[:, None] * (output(X, changed) - output(X, w))
            assert got[g, t] == pytest.approx(np.square(change).sum() / 40, rel=1e-3)
    assert (got[:, 1] < got[:, 0] / 50).all()


def test_exact_types_have_no_error(ggml: Ggml) -> None:
    w = {m: (np.round(WEIGHTS[m][0] * 256) / 256).astype(np.float32) for m in WEIGHTS}
    assert expert_error(torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT), w, ONES, ("f16", "bf16"), ggml).tolist() == [[0, 0], [0, 0]]


def test_fallback_where_rows_do_not_fit(ggml: Ggml) -> None:
    w, ones = WEIGHTS["gate"][0][:, :96], np.ones(96, dtype=np.float32)
    assert np.array_equal(requantize(ggml, "q4_k", w, ones), ggml.dequantize("q5_0", ggml.quantize("q5_0", w, ones), 96))


def layer_of(selections: list[int], gate_weight: list[float]) -> LayerCalibration:
    base = synthetic_calibration(1, N_EXPERT, n_embd=N_EMBD, n_ff=N_FF).layers[0]
    n = np.array(selections)
    return replace(
        base,
        selections=n,
        gate_weight=np.array(gate_weight),
        residual_energy=100.0,
        in_sum2={m: (n[:, None] * np.ones(256)).astype(np.float32) for m in WEIGHTS},
    )


def test_layer_scales_to_all_selections(ggml: Ggml) -> None:
    layer = layer_of([400, 7, 0], [200, 2, 0])
    asked = []

    def tokens(e: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(e)
        return torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT)

    ticks: list[int] = []
    got = measure_layer(layer, tokens, weights, ("q4_k",), ggml, threads=2, tick=lambda: ticks.append(1))
    assert sorted(asked) == [0, 1, 2] and len(ticks) == 3
    for e, n in enumerate((400, 7, NEVER_HIT_SELECTIONS)):
        w = {m: WEIGHTS[m][e] for m in WEIGHTS}
        expected = expert_error(torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT), w, ONES, ("q4_k",), ggml)
        assert got.error[e] == pytest.approx(expected * n / 100)
    assert got.wanda[0] > got.wanda[1] > got.wanda[2] == 0  # alike weights: the busier, the more important


def test_rare_experts_borrow_tokens() -> None:
    own, weight = completed(np.array([5]), np.array([0.5], dtype=np.float32), np.array([7, 8, 9]), 0.25, least=3)
    assert own.tolist() == [5, 7, 8] and weight.tolist() == [0.5, 0.25, 0.25] and weight.dtype == np.float32
    enough, _ = completed(np.arange(4), np.ones(4, dtype=np.float32), np.array([7]), 0.25, least=3)
    assert enough.tolist() == [0, 1, 2, 3]
    assert mean_gate_weights(np.array([4, 0, 2]), np.array([2.0, 0, 0.4])).tolist() == pytest.approx([0.5, 0.4, 0.2])


def imatrix_of(layer: LayerCalibration, merged: bool = False):  # type: ignore[no-untyped-def]
    base = synthetic_calibration(1, N_EXPERT, types=(), n_embd=N_EMBD, n_ff=N_FF, merged_gate_up=merged)
    return replace(base, types=(), layers=(replace(layer, residual_energy=0.0),))


def test_moments_by_direct_arithmetic(ggml: Ggml) -> None:
    layer = layer_of([400, 7, 0], [200, 2, 0])
    got = measure_from_imatrix(imatrix_of(layer), weights, ("q4_k", "q8_0"), ggml, threads=2)
    assert got.types == ("q4_k", "q8_0")
    result = got.layers[0]
    n = np.array([400, 7, NEVER_HIT_SELECTIONS])
    energy = n * np.array([np.square(WEIGHTS["down"][e]).sum() for e in range(3)])  # in_sum2 is n in every column
    assert result.output_energy == pytest.approx(energy / 4)  # two experts per token: gate weights of 1/2
    assert result.gate_weight == pytest.approx([200, 3.5, 0])
    for e in range(3):

        def change(m: str, e: int = e) -> float:
            return float(np.square(requantize(ggml, "q4_k", WEIGHTS[m][e], ONES[m]) - WEIGHTS[m][e]).sum())

        assert result.error[e, 1, 0] == pytest.approx(n[e] * change("down") / energy.sum(), rel=1e-4)
        relative = sum(change(m) / np.square(WEIGHTS[m][e]).sum() for m in ("gate", "up"))
        assert result.error[e, 0, 0] == pytest.approx(energy[e] * relative / energy.sum(), rel=1e-4)


def test_moments_are_exact_for_down_where_columns_are_uncorrelated(ggml: Ggml) -> None:
    """One-hot hidden inputs: the diagonal is all there is, so the estimate equals the sum over tokens."""
    hidden = np.diag(RNG.uniform(0.5, 2, N_FF)).astype(np.float32)
    layer = layer_of([N_FF, 0, 0], [N_FF / 2, 0, 0])
    sums = layer.in_sum2 | {"down": np.stack([np.square(hidden).sum(axis=0), np.zeros(N_FF), np.zeros(N_FF)]).astype(np.float32)}
    result = measure_from_imatrix(imatrix_of(replace(layer, in_sum2=sums)), weights, ("q4_k",), ggml).layers[0]
    importance = imatrix_rows(sums["down"], layer.selections)[0]
    change = hidden @ (requantize(ggml, "q4_k", WEIGHTS["down"][0], importance) - WEIGHTS["down"][0]).T
    total = 4 * result.output_energy.sum()
    assert result.error[0, 1, 0] == pytest.approx(np.square(change).sum() / total, rel=1e-4)


def test_moments_of_merged_gate_up(ggml: Ggml) -> None:
    layer = layer_of([40, 20, 1], [20, 10, 0.5])
    apart = measure_from_imatrix(imatrix_of(layer), weights, ("q4_k",), ggml)
    merged = replace(layer, in_sum2={"gate_up": layer.in_sum2["gate"], "down": layer.in_sum2["down"]})
    together = measure_from_imatrix(imatrix_of(merged, merged=True), weights, ("q4_k",), ggml)
    assert np.array_equal(apart.layers[0].error, together.layers[0].error)


def test_moments_need_the_number_of_experts_used(ggml: Ggml) -> None:
    with pytest.raises(UserError, match="how many experts"):
        measure_from_imatrix(replace(imatrix_of(layer_of([1, 1, 1], [1, 1, 1])), n_expert_used=0), weights, ("q4_k",), ggml)
