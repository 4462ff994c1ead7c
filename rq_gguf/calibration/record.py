"""Record the routing of a transformers model without measuring anything: one pass of the text, layer by layer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rq_gguf.atomic import full_disk_told
from rq_gguf.calibration.checkpoint import check_weights, read_config, resolve_model
from rq_gguf.calibration.dequantize import check_quantization
from rq_gguf.calibration.families import FAMILIES, SWITCH, MoeBlock, family_of, moe_blocks
from rq_gguf.calibration.memory import room
from rq_gguf.calibration.paper_models import register
from rq_gguf.calibration.run import batches, cut, pick_device, sequence_length, tokenize
from rq_gguf.calibration.spool import Spool
from rq_gguf.calibration.stream import Streamed
from rq_gguf.calibration.trace import Recorder, Trace
from rq_gguf.defaults import TOKENS
from rq_gguf.errors import UserError
from rq_gguf.progress import Bar


def record(
    model: Path | str,
    text: str,
    *,
    tokens: int = TOKENS,
    device: str = "auto",
    work: Path | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> Trace:
    """Pass about `tokens` tokens of `text` through a checkpoint, one layer in memory at a time, and keep what its routers choose.

    The sequences are those that `run.calibrate` takes of the same text. work, max_memory: as there.
    Raises UserError for an unsuitable or broken model, too little text, an unknown device, too little memory, a full disk.
    """
    directory = resolve_model(model)
    config = read_config(directory)
    family = family_of(config, str(directory))
    check_quantization(config, str(directory))
    if family is FAMILIES[SWITCH]:
        raise UserError(f"{directory} is a Switch Transformer, which does not pass layer by layer; rq-gguf calibrate --trace records it")
    if family.own_class:
        register()
    loaded = Streamed(directory, check_weights(directory), pick_device(device))
    sequences = cut(tokenize(directory, text), tokens, sequence_length(directory))
    blocks = list(moe_blocks(loaded.layers, loaded.config))
    if not blocks:
        raise UserError(f"{directory} has no layer with experts: there is no routing to record")
    fits = room(
        loaded.layers,
        loaded.front_weights,
        blocks,
        length=len(sequences[0]),
        sampled=0,
        device=loaded.device,
        limit=max_memory,
    )
    n_tokens, some = sum(len(s) for s in sequences), blocks[0]
    recorder = Recorder()
    recorder.begin(len(s) for s in sequences)
    last = max(b.layer for b in blocks)
    bar = Bar(total=(last + 1) * n_tokens, desc="recording", unit="tok", unit_scale=True, disable=not progress)
    with torch.inference_mode(), full_disk_told(), Spool(work, fits.spool, fits.on_device) as spool, bar:
        for i in range(last + 1):
            with loaded.layer(i):
                block = next((b for b in moe_blocks(loaded.layers, loaded.config) if b.layer == i), None)
                if block is not None:
                    block.module.register_forward_pre_hook(_on_block(block, recorder))
                for n, ids in enumerate(batches(sequences, fits.batch)):
                    spool.put((n,), loaded.through(i, ids, spool.get((n,)) if i else None))
                    bar.update(ids.numel())
    n_ff, n_embd = some.expert(0)[0].shape
    name = directory.name if Path(model).is_dir() else str(model)
    return recorder.trace(name, some.n_expert, int(n_embd), int(n_ff))


def _on_block(block: MoeBlock, recorder: Recorder) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        ids, _weights = block.route(args[0].reshape(-1, args[0].shape[-1]))
        recorder.add(block.layer, ids.cpu().numpy())

    return hook
