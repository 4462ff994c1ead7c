"""Measured errors against direct arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.gated import hidden_sensitivity
from rq_gguf.calibration.imatrix import expected_selections, imatrix_rows
from rq_gguf.calibration.measure import completed, expert_error, mean_gate_weights, measure_layer, rounded
from rq_gguf.calibration.moments import measure_from_imatrix
from rq_gguf.calibration.observe import Units
from rq_gguf.calibration.requantize import requantize
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.types import activation_block

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
            change = GATE_WEIGHT[:, None] * (output_rounded(X, changed, name, g) - output(X, w))
            assert got[g, t] == pytest.approx(np.square(change).sum() / 40, rel=1e-3)
    assert (got[:, 1] < got[:, 0] / 20).all()


def test_some_rows_stand_for_all(ggml: Ggml) -> None:
    """Rows that are alike give the same figure on some of them, whatever the families' biases are; random ones nearly the same."""
    rng = np.random.default_rng(3)
    few = {m: rng.standard_normal((64, 256)).astype(np.float32) / 16 for m in ("gate", "up")}
    w = {m: np.repeat(rows, 4, axis=0) for m, rows in few.items()}
    w["down"] = np.repeat(rng.standard_normal((64, 256)).astype(np.float32) / 16, 4, axis=0)
    x, weight = torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT)
    whole, some = (expert_error(x, weight, w, ONES, ("q2_k", "q6_k"), ggml, most_rows=n) for n in (256, 64))
    assert some[1] == pytest.approx(whole[1], rel=1e-4)
    w = {m: WEIGHTS[m][1] for m in WEIGHTS}
    whole, some = (expert_error(x, weight, w, ONES, ("q2_k", "q6_k"), ggml, most_rows=n) for n in (256, 128))
    assert some == pytest.approx(whole, rel=0.25) and (some != whole).all()


def test_biases_of_the_rows_taken(ggml: Ggml) -> None:
    """gpt-oss adds a bias to each hidden unit: with all rows or some, each gets its own."""
    bias = torch.linspace(-3, 3, 256)
    asked: list[int] = []

    def hidden(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, units: Units = None) -> torch.Tensor:
        own = bias if units is None else bias[units]
        asked.append(len(own))
        return torch.relu(x @ gate.T + own) + x @ up.T * 0

    w = {m: WEIGHTS[m][0] for m in WEIGHTS}
    x, weight = torch.from_numpy(X), torch.from_numpy(GATE_WEIGHT)
    exact = {m: (np.round(v * 256) / 256).astype(np.float32) for m, v in w.items()}
    assert expert_error(x, weight, exact, ONES, ("f16",), ggml, hidden=hidden, most_rows=100).tolist() == [[0], [0]]
    assert asked == [256, 100]


def output_rounded(x: np.ndarray, w: dict[str, np.ndarray], kind: str, group: int) -> np.ndarray:
    """`output` with the group's inputs rounded as for a type."""
    if group == 0:
        return output(rounded(torch.from_numpy(x), kind).numpy(), w)
    g = x @ w["gate"].T
    hidden = torch.from_numpy((g / (1 + np.exp(-g)) * (x @ w["up"].T)).astype(np.float32))
    return rounded(hidden, kind).numpy().astype(np.float64) @ w["down"].T


def test_inputs_are_rounded_in_the_blocks_of_the_type() -> None:
    x = torch.zeros(1, 256)
    x[0, :3] = torch.tensor([127.0, 1.4, -0.6])  # steps of 1 in the first 32 values
    x[0, 40:42] = torch.tensor([12.7, 0.26])  # steps of 0.1 in the next, of 1 where 256 share a scale
    assert rounded(x, "q8_0")[0, [0, 1, 2, 40, 41]].tolist() == pytest.approx([127, 1, -1, 12.7, 0.3], rel=1e-5)
    assert rounded(x, "q4_k")[0, [0, 1, 2, 40, 41]].tolist() == pytest.approx([127, 1, -1, 13, 0], rel=1e-5)
    assert rounded(x, "bf16") is x
    assert not rounded(torch.zeros(2, 256), "q6_k").any()


def test_rounding_is_that_of_the_cpu_kernels() -> None:
    """What ggml-cpu.c names as vec_dot_type."""
    for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"):
        assert activation_block(kind) == 32
    for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"):
        assert activation_block(kind) == 256


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
    for e, n in enumerate(expected_selections(layer.selections)):
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
    n = expected_selections(layer.selections)
    energy = n * np.array([np.square(WEIGHTS["down"][e]).sum() for e in range(3)])  # in_sum2 is n in every column
    assert result.output_energy == pytest.approx(energy / 4)  # two experts per token: gate weights of 1/2
    assert result.gate_weight == pytest.approx([200, 3.5, 0])
    for e in range(3):

        def change(m: str, e: int = e) -> float:
            return float(np.square(requantize(ggml, "q4_k", WEIGHTS[m][e], ONES[m]) - WEIGHTS[m][e]).sum())

        assert result.error[e, 1, 0] == pytest.approx(n[e] * change("down") / energy.sum(), rel=1e-4)
        ones = np.ones(N_FF)
        of_gate, of_up = hidden_sensitivity(*(np.square(WEIGHTS[m][e]).sum(axis=1, dtype=np.float64) for m in ("gate", "up")), ones)
        moved = sum(k * np.square(requantize(ggml, "q4_k", WEIGHTS[m][e], ONES[m]) - WEIGHTS[m][e]).sum(axis=1)
                    for k, m in ((of_gate, "gate"), (of_up, "up")))  # fmt: skip
        columns = np.square(WEIGHTS["down"][e]).sum(axis=0)
        assert result.error[e, 0, 0] == pytest.approx(n[e] * (columns @ moved) / energy.sum(), rel=1e-4)


def test_moments_are_exact_for_down_where_columns_are_uncorrelated(ggml: Ggml) -> None:
    """One-hot hidden inputs: the diagonal is all there is, so the estimate equals the sum over tokens."""
    hidden = np.diag(RNG.uniform(0.5, 2, N_FF)).astype(np.float32)
    layer = layer_of([N_FF, 0, 0], [N_FF / 2, 0, 0])
    sums = layer.in_sum2 | {"down": np.stack([np.square(hidden).sum(axis=0), np.zeros(N_FF), np.zeros(N_FF)]).astype(np.float32)}
    result = measure_from_imatrix(imatrix_of(replace(layer, in_sum2=sums)), weights, ("q4_k",), ggml).layers[0]
    importance = imatrix_rows(sums["down"], layer.selections)[0]
    change = hidden @ (requantize(ggml, "q4_k", WEIGHTS["down"][0], importance) - WEIGHTS["down"][0]).T
    total = 4 * result.output_energy.sum()
    assert result.error[0, 1, 0] == pytest.approx(
        expected_selections(layer.selections)[0] / N_FF * np.square(change).sum() / total, rel=1e-4
    )


def test_moments_of_merged_gate_up(ggml: Ggml) -> None:
    layer = layer_of([40, 20, 1], [20, 10, 0.5])
    apart = measure_from_imatrix(imatrix_of(layer), weights, ("q4_k",), ggml)
    merged = replace(layer, in_sum2={"gate_up": layer.in_sum2["gate"], "down": layer.in_sum2["down"]})
    together = measure_from_imatrix(imatrix_of(merged, merged=True), weights, ("q4_k",), ggml)
    assert np.array_equal(apart.layers[0].error, together.layers[0].error)


def test_moments_need_the_number_of_experts_used(ggml: Ggml) -> None:
    with pytest.raises(UserError, match="how many experts"):
        measure_from_imatrix(replace(imatrix_of(layer_of([1, 1, 1], [1, 1, 1])), n_expert_used=0), weights, ("q4_k",), ggml)


def test_types_that_fall_together_are_measured_once(ggml: Ggml) -> None:
    """Rows of 96 can be neither q2_k nor q3_k: both are stored, and measured, as q4_0."""
    w = {m: RNG.standard_normal(shape).astype(np.float32) for m, shape in (("gate", (96, 256)), ("up", (96, 256)), ("down", (256, 96)))}
    ones = {m: np.ones(t.shape[1], dtype=np.float32) for m, t in w.items()}
    asked: list[str] = []

    class Recording:
        def quantize(self, type_name: str, rows: np.ndarray, importance: np.ndarray) -> np.ndarray:
            asked.append(f"{type_name} in {rows.shape[1]}")
            return ggml.quantize(type_name, rows, importance)

        dequantize = staticmethod(ggml.dequantize)

    x, weight = torch.from_numpy(X[:, :256]), torch.from_numpy(GATE_WEIGHT)
    error = expert_error(x, weight, w, ones, ("q2_k", "q3_k", "q4_0", "q8_0"), Recording())  # type: ignore[arg-type]
    assert asked.count("q4_0 in 96") == 1 and asked.count("q4_0 in 256") == 2 and len(asked) == 2 * 4 + 2
    assert error[1, 0] == error[1, 1] == error[1, 2] > error[1, 3] and error[0, 0] > error[0, 1] > error[0, 2]
