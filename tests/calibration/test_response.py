"""What follows from a change, on small random models."""

import numpy as np
import pytest
import torch
from tiny_models import N_EXPERT, tiny_model

from rq_gguf.calibration.families import moe_blocks
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.requantize import requantize
from rq_gguf.calibration.response import divergence, flip_rate, measure_response, reference_type, scored_positions
from rq_gguf.calibration.run import Observer
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


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_response_of_a_model(family: str, ggml: Ggml) -> None:
    model = tiny_model(family)
    blocks = list(moe_blocks(model.model.layers, model.config))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (4, 64)))
    observer = Observer(blocks, ids.numel(), 16)
    with torch.inference_mode(), observer.attached(model.model.layers):
        observer.begin(ids.numel())
        model(input_ids=ids, use_cache=False)
    layers = [observer.layer(b) for b in blocks]
    before = {n: p.clone() for n, p in model.named_parameters()}
    ticks: list[int] = []
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        found = measure_response(
            model, blocks, layers, ids, ("q4_0", "q8_0"), ggml, n_tokens=ids.numel(), threads=2, tick=lambda: ticks.append(1)
        )
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    n = len(blocks)
    assert len(ticks) == 2 * n and found.type == "q4_0"
    assert found.kld.shape == found.error.shape == (n, 2) and (found.kld > 0).all() and (found.error > 0).all()
    assert found.flips.shape == (n, 2, n) and not found.flips[-1].any()
    assert all(not found.flips[i, :, : i + 1].any() for i in range(n)) and (found.flips <= 1).all()
    assert layers[0].n_expert == N_EXPERT

    # The same change made by hand, with nothing skipped.
    index = n - 1
    block = blocks[index]
    for e in range(N_EXPERT):
        _, _, down = block.expert(e)
        down.copy_(torch.from_numpy(requantize(ggml, "q4_0", down.numpy(), matrix_rows(layers[index], "down")[e])))
    with torch.inference_mode():
        changed = model(input_ids=ids, use_cache=False).logits
    expected = divergence(logits.log_softmax(-1)[:, 32:], changed.log_softmax(-1)[:, 32:])
    assert found.kld[index, 1] == pytest.approx(expected, rel=1e-3)
