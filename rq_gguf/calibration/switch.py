"""Switch Transformer: an encoder and a decoder whose every other feed-forward layer has experts of two matrices, one expert per token.

llama.cpp cannot run it, so nothing of this reaches a file. It is here because the paper's load tables have it. Blocks are numbered through,
the decoder's behind the encoder's. Its text passes both: the encoder reads it, the decoder is given it token by token.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.families import Family, MoeBlock
from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.calibration.measure import measure_layer
from rq_gguf.calibration.memory import BATCH
from rq_gguf.calibration.observe import Hidden
from rq_gguf.calibration.requantize import Matrix
from rq_gguf.calibration.stream import check_complete, check_finite, loading
from rq_gguf.calibration.trace import Recorder
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.progress import Bar


class SwitchBlock(MoeBlock):
    """One block's experts: `wi` [n_ff, n_embd] in the place of up (and of gate, which there is not) and `wo` [n_embd, n_ff]."""

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        expert: Any = self.module.experts[f"expert_{e}"]  # type: ignore[index]
        return expert.wi.weight, expert.wi.weight, expert.wo.weight

    def hidden(self, e: int) -> Hidden:
        return lambda x, gate, up, units=None: torch.relu(x @ up.T)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the router wants, whatever the experts' capacity then lets through."""
        probs = torch.softmax(torch.nn.functional.linear(x.float(), self.router.float()), dim=-1)
        best = probs.max(dim=-1, keepdim=True)
        return best.indices, best.values


def calibrate_switch(
    directory: Path,
    family: Family,
    sequences: list[NDArray[np.int64]],
    device: torch.device,
    types: tuple[str, ...],
    ggml: Ggml,
    *,
    samples: int,
    threads: int,
    progress: bool,
    recorder: Recorder | None = None,
) -> Calibration:
    """`run.calibrate` for this family; the whole model must fit in memory. `text_sha256` and `model` are left empty.

    sequences: token ids. Raises UserError for a model that is not whole, or whose values are not finite.
    """
    from rq_gguf.calibration.run import Observer, batches, measured_tokens, weights_of

    model, blocks = load_switch(directory, device, family)
    observer = Observer(family, sum(len(s) for s in sequences), samples, recorder)
    with ExitStack() as stack, torch.inference_mode():
        for block, layer in blocks:
            stack.enter_context(observer.attached(block.layer, layer, block))
        bar = stack.enter_context(Bar(total=observer.n_tokens, desc="calibrating", unit="tok", disable=not progress))
        for n, ids in enumerate(pass_text(model, list(batches(sequences, BATCH)), device)):
            observer.begin(n == 0, ids.numel())
            bar.update(ids.numel())
    layers = []
    for block, _ in Bar(blocks, desc="measuring", unit="layer", disable=not progress):
        layer, sample = observer.take(block)
        tokens = measured_tokens(sample, layer, samples)
        layer = measure_layer(layer, tokens, weights_of(block), types, ggml, threads=threads, tick=lambda: None, hidden=block.hidden)
        layers.append(without_gate(layer, block))
    gate = blocks[0][0].expert(0)[0]
    return Calibration(
        model="",
        model_fingerprint=router_fingerprint(b.router.float().cpu().numpy() for b, _ in blocks),
        arch=family.arch,
        types=types,
        n_tokens=observer.n_tokens,
        text_sha256="",
        n_expert_used=1,
        n_embd=int(gate.shape[1]),
        n_ff=int(gate.shape[0]),
        merged_gate_up=False,
        layers=tuple(layers),
    )


def load_switch(directory: Path, device: torch.device, family: Family) -> tuple[Any, list[tuple[SwitchBlock, Any]]]:
    """(the model, its blocks with experts and the layers they stand in). Raises UserError for what does not fit the family."""
    with loading(directory):
        model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    check_complete(directory, info)
    if model.config.dense_act_fn != "relu":
        raise UserError(f"{directory} has activation {model.config.dense_act_fn}, and rq-gguf knows Switch Transformers with relu only")
    model = model.to(device).eval().requires_grad_(False)
    check_finite(model)
    layers = [*model.encoder.block, *model.decoder.block]
    found = ((i, layer, layer.layer[-1].mlp) for i, layer in enumerate(layers))
    blocks = [(SwitchBlock(i, mlp, family, 1, False, 0.0), layer) for i, layer, mlp in found if hasattr(mlp, "experts")]
    if not blocks:
        raise UserError(f"{directory} has no layer with experts: there is nothing to replicate")
    return model, blocks


def pass_text(model: Any, batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Pass token ids [n, length] each; gives them before it does."""
    first = model.config.decoder_start_token_id
    start = model.config.pad_token_id if first is None else first
    for ids in batches:
        yield ids
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        model(input_ids=ids.to(device), decoder_input_ids=shifted.to(device), use_cache=False)


def without_gate(layer: LayerCalibration, block: SwitchBlock) -> LayerCalibration:
    """What was measured as if wi were gate and up, put down for the two matrices that there are."""
    sums = {matrix: layer.in_sum2[matrix] for matrix in ("up", "down")}

    def matrices(e: int) -> dict[str, Matrix]:
        _, up, down = block.expert(e)
        return {"up": up.cpu().numpy(), "down": down.cpu().numpy()}

    wanda: NDArray[np.float64] = np.array(
        [wanda_importance(matrices(e), {m: s[e] for m, s in sums.items()}) for e in range(layer.n_expert)]
    )
    return replace(layer, in_sum2=sums, wanda=wanda)
