"""The error model against its formula and against responses made from it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration, Response
from rq_gguf.planning.error import OTHER_FLIPS, ErrorModel, error_model

# Two layers: an error of 1 in layer 0 flips a tenth (gate_up) or a fifth (down) of layer 1's choices.
FLIPS = np.zeros((2, 2, 2))
FLIPS[0, :, 1] = 0.01, 0.04
MODEL = ErrorModel(np.array([[1.0, 2.0], [3.0, 4.0]]), FLIPS, 0.5)


def test_by_hand() -> None:
    assert MODEL.kld(np.zeros((2, 2))) == 0
    assert MODEL.kld(np.array([[0, 0], [1.0, 1.0]])) == pytest.approx(7)  # the last layer flips nothing
    n0 = OTHER_FLIPS**2
    assert MODEL.kld(np.array([[1.0, 0.5], [0, 0]])) == pytest.approx(2 + 0.5 * (np.sqrt(n0 + 0.01 + 0.02) - np.sqrt(n0)))


@given(arrays(float, (2, 2), elements=st.floats(0, 10)), arrays(float, (2, 2), elements=st.floats(0, 10)))
def test_the_tangent_touches_and_lies_above(at: np.ndarray, elsewhere: np.ndarray) -> None:
    slope, constant = MODEL.tangent(at)
    assert constant + (slope * at).sum() == pytest.approx(MODEL.kld(at))
    assert constant + (slope * elsewhere).sum() >= MODEL.kld(elsewhere) - 1e-9


def test_a_response_gives_back_the_model_that_made_it() -> None:
    """Smooth parts alike in all layers, as the fit supposes; the flips of four layers."""
    n = 4
    error = np.linspace(1e-4, 8e-4, 2 * n).reshape(n, 2)
    flips = np.zeros((n, 2, n))
    for i in range(n):
        flips[i, :, i + 1 :] = np.sqrt(2 * error[i])[:, None]
    kld = error * np.array([1.5, 0.8]) + 0.005 * flips.sum(axis=2)
    model = error_model(calibration_with(Response("q4_k", error, kld, flips)))
    assert model.flip_cost == pytest.approx(0.005)
    assert np.allclose(model.smooth, [[1.5, 0.8]] * n)
    assert np.allclose(model.flips[0, :, 1:], 2)


def test_one_layer_has_no_flips() -> None:
    response = Response("q4_k", np.full((1, 2), 1e-3), np.array([[2e-3, 1e-3]]), np.zeros((1, 2, 1)))
    model = error_model(calibration_with(response))
    assert model.flip_cost == 0 and np.allclose(model.smooth, [[2, 1]])


def test_a_dead_layer_does_no_harm() -> None:
    response = Response("q4_k", np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2, 2)))
    model = error_model(calibration_with(response))
    assert model.kld(np.ones((2, 2))) == 0


def test_flips_never_explain_all_of_it() -> None:
    error = np.full((2, 2), 1e-3)
    flips = np.zeros((2, 2, 2))
    flips[0, :, 1] = 0.1
    model = error_model(calibration_with(Response("q4_k", error, np.array([[1e-3, 1e-3], [5e-4, 5e-4]]), flips)))
    assert (model.smooth * error >= 0.2 * np.array([[1e-3, 1e-3], [5e-4, 5e-4]]) - 1e-12).all()


def test_without_a_response_there_are_typical_figures() -> None:
    plain = error_model(synthetic_calibration(3, 4))
    assert plain.smooth.shape == (3, 2) and (plain.smooth > 0).all()
    assert plain.flips[0, 0].tolist()[0] == 0 and plain.flips[2].sum() == 0 and plain.flips[0, 0, 1] > 0


def calibration_with(response: Response) -> Calibration:
    return replace(synthetic_calibration(len(response.kld), 4), response=response)
