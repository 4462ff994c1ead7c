"""Calibrate a transformers model: load it, pass text through it, count, measure."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from rq_gguf.atomic import full_disk_told
from rq_gguf.calibration.checkpoint import check_weights, read_config, resolve_model
from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.dequantize import check_quantization
from rq_gguf.calibration.families import FAMILIES, SWITCH, Family, MoeBlock, family_of, moe_blocks
from rq_gguf.calibration.feedback import Feedback, layer_feedback
from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.calibration.measure import completed, mean_gate_weights, measure_layer
from rq_gguf.calibration.memory import BATCH, release, room
from rq_gguf.calibration.observe import BlockSums, input_energy, observe_block, residual_energy
from rq_gguf.calibration.on_device import factor_there, measure_layer_there, on_device
from rq_gguf.calibration.paper_models import register
from rq_gguf.calibration.requantize import Matrix, Tick
from rq_gguf.calibration.response import SEQUENCES, Variants, reference_type
from rq_gguf.calibration.sample import Sample, merge, tokens_elsewhere, tokens_of
from rq_gguf.calibration.sequences import SEQUENCE, cut
from rq_gguf.calibration.spool import Shelf, Spool
from rq_gguf.calibration.stream import Streamed
from rq_gguf.calibration.switch import calibrate_switch
from rq_gguf.calibration.trace import Recorder
from rq_gguf.defaults import TOKENS
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.progress import Bar
from rq_gguf.threads import available_threads
from rq_gguf.types import LADDER, check_type

log = logging.getLogger(__name__)

SAMPLES = 256
"""Tokens per expert that errors are measured on."""
_SEED = 20938
_EXPERT = 4096
"""Tokens that pass a layer in about the time that the types of one expert take: for the progress bar."""


def calibrate(
    model: Path | str,
    text: str,
    *,
    tokens: int = TOKENS,
    device: str = "auto",
    types: tuple[str, ...] = LADDER,
    ggml: Ggml,
    samples: int = SAMPLES,
    threads: int | None = None,
    progress: bool = True,
    work: Path | None = None,
    max_memory: int | None = None,
    recorder: Recorder | None = None,
) -> Calibration:
    """Pass about `tokens` tokens of `text` through a checkpoint and measure what each type does to each expert.

    model: a directory, or a hub id. Sequences of 512 tokens are taken evenly spaced over the whole text, so that a short calibration
    still sees all of it. The model runs in float32 on a CPU and in the checkpoint's own type on cuda and mps. All tokens pass one decoder
    layer before the next one is loaded, so one layer must fit in memory (see memory.room), and hidden states wait there or on disk.
    On a CPU the same text, settings and machine give the same result; on a GPU, which adds up in no fixed order, nearly.
    work: directory for temporary files without a name, the system's if None. max_memory: bytes, see memory.room.
    recorder: gets what the routers choose.
    Raises UserError for an unsuitable or broken model, too little text, non-finite weights or activations, an unknown device or type,
    too little memory, a full disk.
    """
    for t in types:
        check_type(t, "types")
    directory = resolve_model(model)
    config = read_config(directory)
    family = family_of(config, str(directory))
    check_quantization(config, str(directory))
    if family.own_class:
        register()
    files = check_weights(directory)
    where = pick_device(device)
    sequences = cut(tokenize(directory, text), tokens, sequence_length(directory))
    threads = threads or available_threads()
    sha256, name = hashlib.sha256(text.encode()).hexdigest(), directory.name if Path(model).is_dir() else str(model)
    if recorder is not None:
        recorder.begin(len(s) for s in sequences)
    if family is FAMILIES[SWITCH]:
        made = calibrate_switch(
            directory, family, sequences, where, types, ggml, samples=samples, threads=threads, progress=progress, recorder=recorder
        )
        return replace(made, model=name, text_sha256=sha256)
    loaded = Streamed(directory, files, where)
    blocks = {b.layer: b for b in moe_blocks(loaded.layers, loaded.config)}
    if not blocks:
        raise UserError(f"{directory} has no layer with experts: there is nothing to replicate")

    fits = room(
        loaded.layers,
        loaded.front_weights,
        blocks.values(),
        length=len(sequences[0]),
        sampled=min(sum(len(s) for s in sequences), samples * max(b.n_expert for b in blocks.values())),
        device=where,
        limit=max_memory,
    )
    log.debug("calibrating on %s with %d threads: %d sequences, %d of them at a time", where, threads, len(sequences), fits.batch)
    text_ids, response_ids = list(batches(sequences, fits.batch)), list(batches(list(evenly(sequences, SEQUENCES)), fits.batch))
    observer = Observer(blocks[min(blocks)].family, sum(len(s) for s in sequences), samples, recorder, fetch=not on_device(where))
    layers: list[LayerCalibration] = []
    routers: list[NDArray[np.float32]] = []
    n_passed = sum(ids.numel() for ids in response_ids)
    shelf = Shelf(work)
    with (
        full_disk_told(),
        Spool(work, fits.spool, fits.on_device) as spool,
        _Progress(loaded, blocks, observer.n_tokens, n_passed, progress) as bar,
    ):
        variants = Variants(response_ids, reference_type(types), spool, ggml, n_tokens=observer.n_tokens, threads=threads)

        def pass_layer(i: int) -> None:
            """All there is to do with layer i, which is loaded. What refers to it is gone afterwards."""
            block = next((b for b in moe_blocks(loaded.layers, loaded.config) if b.layer == i), None)
            bar.at(i, "tokens")
            with torch.inference_mode(), observer.attached(i, loaded.layers[i], block):
                for n, ids in enumerate(text_ids):
                    observer.begin(n == 0, ids.numel())
                    spool.put(("text", n), loaded.through(i, ids, spool.get(("text", n)) if i else None))
                    bar.tokens(ids.numel())
            layer = feedback = None
            if block is not None:
                bar.at(i, "types")
                seen, sample = observer.take(block)
                feedback = layer_feedback(seen, factor_there(where))
                layer = _measured(seen, sample, block, types, ggml, samples, threads, bar.expert, feedback)
                assert layer.moments is not None
                layers.append(replace(layer, moments=shelf.keep(layer.moments())))
                routers.append(block.router.float().cpu().numpy().copy())
                release()
            bar.at(i, "changes")
            variants.pass_layer(loaded, i, block, layer, bar.changed, feedback)

        with _torch_threads(threads):
            for i in range(len(loaded)):
                bar.at(i, "loading")
                with loaded.layer(i):
                    pass_layer(i)
            loaded.load_head()
            bar.at(len(loaded) - 1, "probabilities")
            response = variants.finish(loaded)
    _warn_of_unseen(layers)

    some = blocks[min(blocks)]
    gate = some.expert(0)[0]
    return Calibration(
        model=name,
        model_fingerprint=router_fingerprint(routers),
        arch=family.arch,
        types=types,
        n_tokens=observer.n_tokens,
        text_sha256=sha256,
        n_expert_used=some.top_k,
        n_embd=int(gate.shape[1]),
        n_ff=int(gate.shape[0]),
        merged_gate_up=False,
        layers=tuple(layers),
        dense_in_sum2=observer.dense(family, len(loaded)),
        response=response,
    )


def pick_device(device: str) -> torch.device:
    """auto, cpu, cuda or mps -> the device. Raises UserError if it is not there."""
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device '{device}': choose auto, cpu, cuda or mps")
    if (device == "cuda" and not torch.cuda.is_available()) or (device == "mps" and not mps):
        raise UserError(f"torch finds no {device} device here: choose --device cpu, or install a torch built for {device}")
    return torch.device(device)


def sequence_length(directory: Path) -> int:
    """SEQUENCE, or the model's whole context where that is shorter."""
    return min(SEQUENCE, int(read_config(directory).get("max_position_embeddings") or SEQUENCE))


def tokenize(directory: Path, text: str) -> tuple[NDArray[np.int64], int | None]:
    """(the text's token ids, the id that begins a sequence or None where the model has none)."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as e:  # transformers raises whatever its parsers do
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
    head = tokenizer("").input_ids[:1]
    bos = tokenizer.bos_token_id if head == [tokenizer.bos_token_id] else None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.asarray(ids, dtype=np.int64), bos


def evenly(sequences: list[NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """[at most n, length] of the whole sequences, evenly spaced."""
    whole = [s for s in sequences if len(s) == len(sequences[0])]
    n = min(n, len(whole))
    return np.stack([whole[i * len(whole) // n] for i in range(n)])


def batches(sequences: list[NDArray[np.int64]], size: int = BATCH) -> Iterator[Tensor]:
    """[at most size, length] id tensors; a last sequence that is shorter goes alone, so that nothing is ever padded."""
    whole = [s for s in sequences if len(s) == len(sequences[0])]
    for i in range(0, len(whole), size):
        yield torch.from_numpy(np.stack(whole[i : i + size]))
    for rest in sequences[len(whole) :]:
        yield torch.from_numpy(rest[None])


def _measured(
    layer: LayerCalibration,
    sample: Sample,
    block: MoeBlock,
    types: tuple[str, ...],
    ggml: Ggml,
    samples: int,
    threads: int,
    tick: Tick,
    feedback: Feedback | None,
) -> LayerCalibration:
    """What was observed of a block that all tokens passed, and the errors of each type."""
    tokens = measured_tokens(sample, layer, samples, block.family.weighs_inputs)
    if on_device(block.router.device):
        with torch.inference_mode():
            return measure_layer_there(layer, tokens, block.expert, types, ggml, feedback, threads=threads, tick=tick, hidden=block.hidden)
    # One thread per expert: torch's own would only get in each other's way.
    with _torch_threads(1), threadpool_limits(1):
        return measure_layer(
            layer, tokens, weights_of(block), types, ggml, threads=threads, tick=tick, hidden=block.hidden, feedback=feedback
        )


def _warn_of_unseen(layers: list[LayerCalibration]) -> None:
    never_hit = sum(int((layer.selections == 0).sum()) for layer in layers)
    if never_hit:
        log.warning(
            "%d of %d experts were never picked on the calibration text: a prior stands in for them; use more or other text",
            never_hit,
            sum(layer.n_expert for layer in layers),
        )


class Observer:
    """Hooks on a model's decoder layers that gather the sums and samples of its MoE blocks."""

    def __init__(self, family: Family, n_tokens: int, samples: int, recorder: Recorder | None = None, *, fetch: bool = True) -> None:
        """fetch: samples are kept on the host, else where the model is."""
        self.n_tokens = n_tokens
        self._fetch = fetch
        self._recorder = recorder
        self._family = family
        self.sums: dict[int, BlockSums] = {}
        self.residual: dict[int, float] = {}
        self.samples: dict[int, Sample] = {}
        self._dense: dict[str, NDArray[np.float64]] = {}
        self._size = samples
        self._priority = np.random.default_rng(_SEED).random(n_tokens)
        self._seen = 0
        self._batch = self._priority

    def begin(self, first: bool, n: int) -> None:
        """The next n tokens, or the first ones, are about to pass."""
        self._seen = 0 if first else self._seen
        self._batch = self._priority[self._seen : self._seen + n]
        self._seen += n

    def attached(self, i: int, layer: nn.Module, block: MoeBlock | None) -> ExitStack:
        """Hooks on decoder layer i, and its experts if it has any, until the returned context is left."""
        stack = ExitStack()
        if block is not None:
            stack.callback(block.module.register_forward_pre_hook(self._on_block(block)).remove)
            stack.callback(layer.register_forward_hook(self._on_layer(i)).remove)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not _routes(name) and not name.endswith(self._family.permuted):
                stack.callback(module.register_forward_pre_hook(self._on_linear(f"model.layers.{i}.{name}")).remove)
        return stack

    def _on_block(self, block: MoeBlock) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        n_ff = int(block.expert(0)[0].shape[0])

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            ids, weights = block.route(x)
            sums = observe_block(
                x,
                ids,
                weights,
                block.expert,
                n_expert=block.n_expert,
                n_ff=n_ff,
                hidden=block.hidden,
                output_bias=block.output_bias,
                weighs_inputs=block.family.weighs_inputs,
            )
            if not (np.isfinite(sums.output_energy).all() and np.isfinite(sums.in_gate_up).all() and np.isfinite(sums.in_down).all()):
                raise UserError(f"the experts of layer {block.layer} compute values that are not finite: the model is broken")
            old = self.sums.get(block.layer)
            self.sums[block.layer] = sums if old is None else old + sums
            new = Sample(x, ids.cpu().numpy(), weights.cpu().numpy(), self._batch)
            if self._recorder is not None:
                self._recorder.add(block.layer, new.ids)
            self.samples[block.layer] = merge(self.samples.get(block.layer), new, block.n_expert, self._size, fetch=self._fetch)

        return hook

    def _on_layer(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.reshape(-1, *hidden.shape[-2:])
            # A sequence's first token draws attention and has up to a hundred times the energy of the others, which says nothing of them.
            rest = hidden[:, 1:] if hidden.shape[1] > 1 else hidden
            energy = residual_energy(rest.reshape(-1, hidden.shape[-1])) * hidden.shape[1] / rest.shape[1]
            if not np.isfinite(energy):
                raise UserError(f"the output of layer {layer} is not finite: the model is broken, or overflows in its type on this device")
            self.residual[layer] = self.residual.get(layer, 0.0) + energy

        return hook

    def _on_linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._dense[name] = self._dense.get(name, 0.0) + input_energy(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    def take(self, block: MoeBlock) -> tuple[LayerCalibration, Sample]:
        """What was gathered for a block, nothing measured yet, and the sample; both are forgotten here."""
        sums = self.sums.pop(block.layer)
        moments = sums.moments / np.float32(self.n_tokens)
        gate_up, down = sums.in_gate_up.astype(np.float32), sums.in_down.astype(np.float32)
        layer = LayerCalibration(
            layer=block.layer,
            selections=sums.selections,
            gate_weight=sums.gate_weight,
            output_energy=sums.output_energy,
            residual_energy=self.residual[block.layer],
            in_sum2={"gate": gate_up, "up": gate_up, "down": down},
            error=np.zeros((block.n_expert, len(GROUPS), 0)),
            wanda=np.zeros(block.n_expert),
            moments=lambda: moments,
        )
        return layer, self.samples.pop(block.layer)

    def dense(self, family: Family, n_layers: int) -> dict[str, NDArray[np.float32]]:
        """GGUF tensor name -> [cols] sums of squared inputs over all tokens, for the linear layers that every token passes."""
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        names = gguf.get_tensor_name_map(arch, n_layers)
        found = ((names.get_name(name), sums) for name, sums in sorted(self._dense.items()))
        return {f"{name}.weight": sums.astype(np.float32) for name, sums in found if name}


def _routes(name: str) -> bool:
    """True for the name, in its decoder layer, of a linear layer that is a router's, or in a routed expert."""
    return ".experts." in name or name.endswith((".gate", ".gate.wg", ".router"))


def measured_tokens(
    sample: Sample, layer: LayerCalibration, size: int, weighs_inputs: bool = False
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """expert -> (its inputs [n, n_embd], weights of its outputs [n]) that its error is measured on.

    weighs_inputs: gate weights scale the inputs, and outputs count as they are.
    """
    means = mean_gate_weights(layer.selections, layer.gate_weight)

    def tokens(e: int) -> tuple[Tensor, Tensor]:
        own, own_weight = tokens_of(sample, e, size)
        rows, gate_weight = completed(own, own_weight, tokens_elsewhere(sample, e, size), float(means[e]))
        x, weight = sample.x[torch.from_numpy(rows)].float(), torch.from_numpy(gate_weight)
        return (x * weight.to(x.device)[:, None], torch.ones_like(weight)) if weighs_inputs else (x, weight)

    return tokens


def weights_of(block: MoeBlock) -> Callable[[int, str, int], Matrix]:
    """measure.Weights of one loaded block."""

    def weights(_: int, matrix: str, e: int) -> Matrix:
        gate, up, down = block.expert(e)
        return {"gate": gate, "up": up, "down": down}[matrix].float().cpu().numpy()

    return weights


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    """A bar over the whole calibration, in tokens through a layer."""

    def __init__(self, model: Streamed, blocks: dict[int, MoeBlock], n_tokens: int, response_tokens: int, show: bool) -> None:
        changed = sum(1 + len(GROUPS) * sum(b <= i for b in blocks) for i in range(len(model)))
        total = len(model) * n_tokens + _EXPERT * sum(b.n_expert for b in blocks.values()) + changed * response_tokens
        self._layers, self._response_tokens = len(model), response_tokens
        self._what, self._since, self._seconds = "", 0.0, dict[str, float]()
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = Bar(total=total, desc="calibrating", bar_format=shape, disable=not show)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._passed("")
        self._bar.close()
        log.debug("calibrating took %s", ", ".join(f"{seconds:.1f} s for {what}" for what, seconds in self._seconds.items()))

    def at(self, layer: int, what: str) -> None:
        self._passed(what)
        self._bar.set_description_str(f"calibrating, layer {layer + 1} of {self._layers}, {what}")

    def _passed(self, what: str) -> None:
        """The next part begins. On a GPU the last one has work left, but all parts end by fetching something."""
        now = time.monotonic()
        if self._what:
            self._seconds[self._what] = self._seconds.get(self._what, 0.0) + now - self._since
        self._what, self._since = what, now

    def tokens(self, n: int) -> None:
        self._bar.update(n)

    def expert(self) -> None:
        self._bar.update(_EXPERT)

    def changed(self) -> None:
        self._bar.update(self._response_tokens)
