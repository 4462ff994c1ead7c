"""Predicted error: what quantized experts cost in KL divergence of the next-token probabilities from the unquantized model's.

Two things happen when experts err. What follows smoothly is quadratic in the change of a layer's output, so it adds up over experts and
layers. But a change in one layer also makes routers behind it pick other experts, for a token or two in a hundred, and each such flip
costs the same, however small the change that caused it: their number grows with the size of the change, the square root of its energy, and
energies of independent changes add. With x[l, g] the error of layer l's matrix group g (sum over experts), in units of its error with all
experts in the reference type:

    KLD(x) = sum_lg smooth[l, g] x[l, g]  +  flip_cost  sum_m ( sqrt(N0 + sum_{l < m, g} flips[l, g, m]^2 x[l, g]) - sqrt(N0) )

smooth, flips and flip_cost come from what calibration.response measured at x = 1 of one layer and group at a time. The sum is concave, so a
plan is found on its tangent (`ErrorModel.tangent`), which lies above it everywhere: each round of choosing and moving it can only gain.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.types import typical_error

Floats = NDArray[np.float64]

OTHER_FLIPS = 0.01
"""sqrt(N0): share of a router's choices that everything but the experts (other tensors, activations rounded to 8 bits) changes anyway."""

_LEAST_SMOOTH = 0.2  # of a layer's measured divergence: what is left for flips is an estimate

# Where nothing was passed through the model (an imatrix): typical figures, from two models.
_TYPICAL_SMOOTH = (1.0, 0.6)  # divergence per unit of relative error, by group
_TYPICAL_FLIPS = 2.0  # squared flip rate per unit of relative error
_TYPICAL_FLIP_COST = 0.005
_TYPICAL_GROUP_SHARE = (1 / 3, 2 / 3)  # where errors were not measured either: `down` carries two thirds
_TYPICAL_OUTPUT = 0.1  # energy of the experts' output over the residual stream's


@dataclass(frozen=True)
class ErrorModel:
    """KL divergence as a function of the layers' errors. Errors are as in LayerCalibration.error, summed over experts: [layers, group]."""

    smooth: Floats
    """[layers, group] nats per unit of error."""
    flips: Floats
    """[layers, group, layers] squared flip rate of the layer of the last axis per unit of error."""
    flip_cost: float
    """Nats per flip: a token for which a layer chose other experts."""

    def kld(self, error: Floats) -> float:
        """Nats, for errors [layers, group] of all layers together."""
        rates = np.sqrt(OTHER_FLIPS**2 + self._flips2(error)) - OTHER_FLIPS
        return float((self.smooth * error).sum() + self.flip_cost * rates.sum())

    def tangent(self, error: Floats) -> tuple[Floats, float]:
        """(nats per unit of error [layers, group], constant): the function's tangent at `error`, above it elsewhere."""
        rates = np.sqrt(OTHER_FLIPS**2 + self._flips2(error))
        slope = self.smooth + self.flip_cost * np.einsum("lgm,m->lg", self.flips, 1 / (2 * rates))
        return slope, self.kld(error) - float((slope * error).sum())

    def _flips2(self, error: Floats) -> Floats:
        return np.asarray(np.einsum("lgm,lg->m", self.flips, error))


def error_model(calibration: Calibration) -> ErrorModel:
    """The model of a calibration's response; a typical one where it has none."""
    n = len(calibration.layers)
    response = calibration.response
    if response is None:
        scale = _TYPICAL_OUTPUT if calibration.types else 1.0
        behind = np.triu(np.ones((n, n)), 1)[:, None, :]
        smooth = np.tile(np.array(_TYPICAL_SMOOTH) * scale, (n, 1))
        return ErrorModel(smooth, np.broadcast_to(_TYPICAL_FLIPS * scale * behind, (n, len(GROUPS), n)).copy(), _TYPICAL_FLIP_COST)
    reference = response.error
    per_error = np.where(reference > 0, 1 / np.where(reference > 0, reference, 1), 0.0)
    counted = response.flips.sum(axis=2)
    cost = _flip_cost(response.kld, counted, reference)
    smooth = np.maximum(response.kld - cost * counted, _LEAST_SMOOTH * response.kld)
    return ErrorModel(smooth * per_error, response.flips**2 * per_error[:, :, None], cost)


def _flip_cost(kld: Floats, flips: Floats, reference: Floats) -> float:
    """Nats per flip: kld = a[group] reference + cost flips, least squares of the relative deviations, nothing negative.

    All [layers, group]; flips summed over layers.
    """
    use = kld > 0
    columns = [np.where(np.arange(len(GROUPS)) == g, reference, 0.0)[use] / kld[use] for g in range(len(GROUPS))]
    a = np.stack([*columns, flips[use] / kld[use]], axis=1)
    free = [i for i in range(a.shape[1]) if a[:, i].any()]
    while free:
        solution = np.linalg.lstsq(a[:, free], np.ones(len(a)), rcond=None)[0]
        if (solution >= 0).all():
            return float(solution[free.index(a.shape[1] - 1)]) if a.shape[1] - 1 in free else 0.0
        free.pop(int(solution.argmin()))
    return 0.0


def measured_error(calibration: Calibration, types: tuple[str, ...]) -> Floats:
    """Error [layers, n_expert, group, type] of each expert when all its instances take a type.

    The calibration's measurements. Where it measured nothing (a plain imatrix): each expert's share of the selections times the type's
    typical error; an expert that no token picked counts for half a selection, as it does in measuring. UserError where a type was not
    measured or a value is not a finite number of at least 0.
    """
    if not calibration.types:
        selections = np.stack([layer.selections for layer in calibration.layers]).astype(np.float64)
        share = np.maximum(selections, 0.5) / np.maximum(selections.sum(axis=1, keepdims=True), 1)
        typical = np.array(_TYPICAL_GROUP_SHARE)[:, None] * np.array([typical_error(t) for t in types])
        return share[:, :, None, None] * typical
    missing = [t for t in types if t not in calibration.types]
    if missing:
        raise UserError(
            f"the calibration of {calibration.model} measured no error for {', '.join(missing)} (it has {', '.join(calibration.types)}); "
            "calibrate again with these types, or choose others with --types"
        )
    index = [calibration.types.index(t) for t in types]
    for layer in calibration.layers:
        if not (np.isfinite(layer.error).all() and (layer.error >= 0).all()):
            raise UserError(
                f"the calibration of {calibration.model} holds a negative or non-finite error in layer {layer.layer}; make it again"
            )
    return np.stack([layer.error[:, :, index] for layer in calibration.layers])
