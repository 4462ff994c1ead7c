"""What follows from a change, on small random models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import N_EXPERT, tiny_model

from rq_gguf.calibration.checkpoint import check_weights
from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.families import FAMILIES, MoeBlock, moe_blocks
from rq_gguf.calibration.feedback import layer_feedback
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.requantize import requantize
from rq_gguf.calibration.response import Variants, divergence, flip_rate, reference_type, scored_positions
from rq_gguf.calibration.run import Observer
from rq_gguf.calibration.spool import Spool
from rq_gguf.calibration.stream import Streamed
from rq_gguf.ggml import Ggml


def test_reference_is_the_type_of_about_four_and_a_half_bits() -> None:
    assert reference_type(("q2_k", "iq4_xs", "q4_k", "q8_0")) == "q4_k"
    assert reference_type(("q2_k", "q8_0")) == "q2_k"


def test_positions_are_of_the_second_half_and_fewer_for_large_vocabularies() -> None:
    assert scored_positions(512, 8, 16384).tolist() == list(range(256, 512))
    few = scored_positions(512, 8, 256000)
    assert few[0] == 256 and len(few) * 8 * 256000 <= 1 << 26 and (np.diff(few) == few[1] - few[0]).all()
    assert scored_positions(2, 8, 1 << 40).tolist() == [1]


def test_divergence_and_flips_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert divergence(p, q) == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2, rel=1e-5)
    before, after = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [2, 4], [4, 5]])
    assert flip_rate(before, after) == pytest.approx(1 / 3)


WHICH = {"gate": 0, "up": 1, "down": 2}


def chosen_and_logits(model: Any, blocks: list[MoeBlock], ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every block chooses, and the model's logits."""
    chosen: list[torch.Tensor] = []

    def hook(block: MoeBlock) -> Any:
        return lambda _, args: chosen.append(block.route(args[0].reshape(-1, args[0].shape[-1]))[0])

    handles = [b.module.register_forward_pre_hook(hook(b)) for b in blocks]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return chosen, logits


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_response_of_a_model(family: str, ggml: Ggml, tmp_path: Path) -> None:
    """Layer by layer, against the same changes made by hand in the whole model, with nothing skipped."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (4, 64)))
    streamed = Streamed(tmp_path, check_weights(tmp_path), torch.device("cpu"))
    observer = Observer(FAMILIES[family], ids.numel(), 16)
    layers: list[LayerCalibration] = []
    ticks: list[int] = []
    with Spool(tmp_path, 1 << 20) as spool, torch.inference_mode():
        variants = Variants([ids[:3], ids[3:]], "q4_0", spool, ggml, n_tokens=ids.numel(), threads=2)
        hidden = None
        for i in range(len(streamed)):
            with streamed.layer(i):
                block = next((b for b in moe_blocks(streamed.layers, streamed.config) if b.layer == i), None)
                observer.begin(True, ids.numel())
                with observer.attached(i, streamed.layers[i], block):
                    hidden = streamed.through(i, ids, hidden)
                if block is not None:
                    layers.append(observer.take(block)[0])
                variants.pass_layer(streamed, i, block, layers[-1] if block is not None else None, lambda: ticks.append(1))
        streamed.load_head()
        found = variants.finish(streamed)
    n = len(layers)
    assert len(ticks) == sum(1 + 2 * sum(layer.layer <= i for layer in layers) for i in range(len(streamed)))
    assert found.type == "q4_0" and found.kld.shape == found.error.shape == (n, 2)
    assert found.flips.shape == (n, 2, n) and not found.flips[-1].any() and (found.flips <= 1).all()
    assert all(not found.flips[i, :, : i + 1].any() for i in range(n))

    blocks = list(moe_blocks(model.model.layers, model.config))
    before, logits = chosen_and_logits(model, blocks, ids)
    for i, block in enumerate(blocks):
        for g, names in enumerate((("gate", "up"), ("down",))):
            kept = {m: [block.expert(e)[WHICH[m]].clone() for e in range(N_EXPERT)] for m in names}
            for m in names:
                for e in range(N_EXPERT):
                    rows, feedback = matrix_rows(layers[i], m)[e], None if m == "down" else layer_feedback(layers[i])
                    weight = block.expert(e)[WHICH[m]]
                    weight.copy_(torch.from_numpy(requantize(ggml, "q4_0", weight.numpy(), rows, feedback)))
            after, changed = chosen_and_logits(model, blocks, ids)
            expected = divergence(logits.log_softmax(-1)[:, 32:], changed.log_softmax(-1)[:, 32:])
            assert found.kld[i, g] == pytest.approx(expected, rel=1e-3, abs=1e-8)  # of float32 probabilities
            assert found.flips[i, g].tolist() == pytest.approx(
                [flip_rate(a, b) if j > i else 0 for j, (a, b) in enumerate(zip(before, after, strict=True))]
            )
            for m in names:
                for e in range(N_EXPERT):
                    block.expert(e)[WHICH[m]].copy_(kept[m][e])
    assert (found.kld > 0).all() and (found.error > 0).all() and found.flips.any()
