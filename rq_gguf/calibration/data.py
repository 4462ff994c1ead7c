"""What calibration knows about a model, as arrays. `file` stores it; planning and writing read it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerCalibration:
    """Statistics of one block's routed experts over the calibration tokens."""

    layer: int
    selections: NDArray[np.int64]
    """[n_expert] how many tokens picked the expert."""
    gate_weight: NDArray[np.float64]
    """[n_expert] sum of the gate weights of those tokens (0 where unknown)."""
    output_energy: NDArray[np.float64]
    """[n_expert] sum of |gate weight x expert output|^2 (0 where unknown)."""
    residual_energy: float
    """Sum of |residual stream|^2 behind the block over all tokens, each sequence's first counted like the mean of the others (0 where
    unknown)."""
    in_sum2: dict[str, NDArray[np.float32]]
    """Matrix name (gate, up, gate_up, down) -> [n_expert, columns] sum of squared inputs: the imatrix rows."""
    error: NDArray[np.float64]
    """[n_expert, group, type] squared change of the layer's output when the expert's matrices of that group take that type,
    gate-weighted, summed over all tokens that picked it, over the residual energy. Group order: format.GROUPS."""
    wanda: NDArray[np.float64]
    """[n_expert] the paper's importance score (see calibration.wanda)."""
    moments: Callable[[], NDArray[np.float32]] | None = None
    """Gives [n_embd, n_embd] mean products of each two inputs of the block, over all tokens, up to a common factor; they take megabytes a
    layer, so they lie in a file until somebody asks. None where unknown. Errors of gate and up are then those of quantizing with feedback
    (see calibration.feedback), as the file must be written."""

    @property
    def n_expert(self) -> int:
        return len(self.selections)


@dataclass(frozen=True)
class Response:
    """What changing one layer's experts does to the model (see calibration.response)."""

    type: str
    """The ggml type that all experts of one layer and matrix group took for it."""
    error: NDArray[np.float64]
    """[layers, group] squared change of the layer's output over the residual energy, as in LayerCalibration.error, on the tokens passed."""
    kld: NDArray[np.float64]
    """[layers, group] mean Kullback-Leibler divergence of the next-token probabilities, in nats."""
    flips: NDArray[np.float64]
    """[layers, group, layers] share of tokens for which a later layer (last axis) then chose other experts; 0 for itself and before."""


@dataclass(frozen=True)
class Calibration:
    """A whole model's calibration."""

    model: str
    """Name of the source, for people."""
    model_fingerprint: str
    """sha256 of all routers' weights (float32, [n_expert, n_embd] each, in block order): the same for a transformers checkpoint and
    the GGUF made of it, so a calibration of another model is noticed. "" where unknown (a plain imatrix)."""
    arch: str
    """GGUF architecture name, "" where unknown."""
    types: tuple[str, ...]
    """ggml type names of `error`'s last axis, lower case; empty if nothing was measured."""
    n_tokens: int
    text_sha256: str
    n_expert_used: int
    n_embd: int
    n_ff: int
    """Rows of gate and up, columns of down."""
    merged_gate_up: bool
    """True where the GGUF holds gate and up in one tensor."""
    layers: tuple[LayerCalibration, ...]
    dense_in_sum2: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """GGUF tensor name -> [columns] sum of squared inputs over all tokens, for matrices that every token passes (attention, shared
    experts): the rest of the imatrix. Empty where unknown."""
    response: Response | None = None
    """None where nothing was passed through the model (an imatrix)."""
    load_known: bool = True
    """False where `selections` are made up, alike for all experts that were seen: an imatrix in the old .dat format has no counts."""
