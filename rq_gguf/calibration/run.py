"""Calibrate a transformers model: load it, pass text through it, count, measure."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rq_gguf.calibration.checkpoint import check_weights, read_config, resolve_model
from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.families import Family, MoeBlock, family_of, moe_blocks
from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.calibration.measure import completed, mean_gate_weights, measure_layer
from rq_gguf.calibration.observe import BlockSums, input_energy, observe_block, residual_energy
from rq_gguf.calibration.requantize import Matrix, default_threads
from rq_gguf.calibration.response import SEQUENCES, measure_response
from rq_gguf.calibration.sample import Sample, merge, tokens_elsewhere, tokens_of
from rq_gguf.defaults import TOKENS
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.types import LADDER, check_type

log = logging.getLogger(__name__)

SEQUENCE = 512
"""Tokens per sequence, as llama-imatrix and llama-perplexity take them."""
SAMPLES = 256
"""Tokens per expert that errors are measured on."""
_SEED = 20938
_BATCH = 8


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
) -> Calibration:
    """Pass about `tokens` tokens of `text` through a checkpoint and measure what each type does to each expert.

    model: a directory, or a hub id. Sequences of 512 tokens are taken evenly spaced over the whole text, so that a short calibration
    still sees all of it. The model runs in float32 on a CPU and in the checkpoint's own type on cuda and mps, and must fit in memory.
    The same text, settings and machine give the same result.
    Raises UserError for an unsuitable or broken model, too little text, non-finite weights or activations, an unknown device or type.
    """
    for t in types:
        check_type(t, "types")
    directory = resolve_model(model)
    family = family_of(read_config(directory), str(directory))
    check_weights(directory)
    where = pick_device(device)
    sequences = cut(tokenize(directory, text), tokens, sequence_length(directory))
    loaded = load(directory, where)
    blocks = list(moe_blocks(loaded.model.layers, loaded.config))
    if not blocks:
        raise UserError(f"{directory} has no layer with experts: there is nothing to replicate")
    check_finite(loaded)

    threads = threads or default_threads()
    observer = Observer(blocks, sum(len(s) for s in sequences), samples)
    with (
        _torch_threads(threads),
        torch.inference_mode(),
        observer.attached(loaded.model.layers),
        _bar("calibrating", observer.n_tokens, "tok", progress) as bar,
    ):
        for batch in batches(sequences):
            observer.begin(batch.numel())
            try:
                loaded.model(input_ids=batch.to(where), use_cache=False)
            except torch.OutOfMemoryError as e:
                raise UserError(f"{directory} does not fit in the memory of {where}: choose --device cpu") from e
            bar.update(batch.numel())

    never_hit = sum(int((observer.sums[b.layer].selections == 0).sum()) for b in blocks)
    if never_hit:
        log.warning(
            "%d of %d experts were never picked on the calibration text: a prior stands in for them; use more or other text",
            never_hit,
            sum(b.n_expert for b in blocks),
        )
    layers = []
    # One thread per expert: torch's own would only get in each other's way.
    with _torch_threads(1), _bar("measuring", sum(b.n_expert for b in blocks), "expert", progress) as bar:
        for block in blocks:
            layer = observer.layer(block)
            measured_on = measured_tokens(observer.samples.pop(block.layer), layer, samples)
            layers.append(measure_layer(layer, measured_on, weights_of(block), types, ggml, threads=threads, tick=bar.update))
    passed = torch.from_numpy(evenly(sequences, SEQUENCES)).to(where)
    with _torch_threads(threads), torch.inference_mode(), _bar("changing", len(blocks) * len(GROUPS), "part", progress) as bar:
        response = measure_response(
            loaded, blocks, layers, passed, types, ggml, n_tokens=observer.n_tokens, threads=threads, tick=bar.update
        )

    first = blocks[0].expert(0)
    return Calibration(
        model=directory.name if Path(model).is_dir() else str(model),
        model_fingerprint=router_fingerprint(b.router.float().cpu().numpy() for b in blocks),
        arch=family.arch,
        types=types,
        n_tokens=observer.n_tokens,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        n_expert_used=blocks[0].top_k,
        n_embd=int(first[0].shape[1]),
        n_ff=int(first[0].shape[0]),
        merged_gate_up=False,
        layers=tuple(layers),
        dense_in_sum2=observer.dense(family, loaded.config.num_hidden_layers),
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as e:  # transformers raises whatever its parsers do
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
    head = tokenizer("").input_ids[:1]
    bos = tokenizer.bos_token_id if head == [tokenizer.bos_token_id] else None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.asarray(ids, dtype=np.int64), bos


def cut(encoded: tuple[NDArray[np.int64], int | None], tokens: int, length: int) -> list[NDArray[np.int64]]:
    """Sequences of `length` tokens, each begun by bos where there is one, evenly spaced over the text, about `tokens` tokens in all.

    Where the text has no more than that, all of it is used, and its last sequence is as short as it comes out.
    Raises UserError for a text of less than one sequence.
    """
    ids, bos = encoded
    step = length - (bos is not None)
    if tokens < 1:
        raise UserError(f"cannot calibrate on {tokens} tokens: choose a positive number")
    if len(ids) < step:
        raise UserError(f"the calibration text has only {len(ids)} tokens: give at least {step}, better many thousands")
    wanted = max(1, tokens // length)
    pieces = [ids[i : i + step] for i in range(0, len(ids), step)]
    if len(pieces) > wanted:
        whole = len(ids) // step
        pieces = [pieces[i * whole // wanted] for i in range(wanted)]
    return pieces if bos is None else [np.concatenate([[bos], p]) for p in pieces]


def evenly(sequences: list[NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """[at most n, length] of the whole sequences, evenly spaced."""
    whole = [s for s in sequences if len(s) == len(sequences[0])]
    n = min(n, len(whole))
    return np.stack([whole[i * len(whole) // n] for i in range(n)])


def batches(sequences: list[NDArray[np.int64]]) -> Iterator[Tensor]:
    """[batch, length] id tensors; a last sequence that is shorter goes alone, so that nothing is ever padded."""
    whole = [s for s in sequences if len(s) == len(sequences[0])]
    for i in range(0, len(whole), _BATCH):
        yield torch.from_numpy(np.stack(whole[i : i + _BATCH]))
    for rest in sequences[len(whole) :]:
        yield torch.from_numpy(rest[None])


def load(directory: Path, device: torch.device) -> Any:
    """The causal LM, in evaluation mode on the device. Raises UserError if the checkpoint does not fit the model it claims to be."""
    # A CPU is slow in bfloat16. Elsewhere the checkpoint's own type keeps memory and, for routers, exactness.
    dtype = torch.float32 if device.type == "cpu" else "auto"
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        loaded = loaded.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        # Out of memory, on any device, is a RuntimeError too.
        raise UserError(f"{directory} cannot be loaded: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}") from e
    if info["missing_keys"]:
        raise UserError(f"the checkpoint in {directory} lacks tensor {sorted(info['missing_keys'])[0]}")
    return loaded


def check_finite(model: nn.Module) -> None:
    """Raise UserError naming the first weight tensor, and the expert where it holds several, with a NaN or infinity."""
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            parts = [] if p.ndim < 3 else [i for i in range(len(p)) if not torch.isfinite(p[i]).all()]
            which = f"{name} (expert {parts[0]})" if parts else name
            raise UserError(f"tensor {which} holds values that are not finite: the model is broken")


class Observer:
    """Hooks on a model's decoder layers that gather the sums and samples of its MoE blocks."""

    def __init__(self, blocks: list[MoeBlock], n_tokens: int, samples: int) -> None:
        self.blocks = blocks
        self.n_tokens = n_tokens
        self.sums: dict[int, BlockSums] = {}
        self.residual: dict[int, float] = {}
        self.samples: dict[int, Sample] = {}
        self._dense: dict[str, NDArray[np.float64]] = {}
        self._size = samples
        self._priority = np.random.default_rng(_SEED).random(n_tokens)
        self._seen = 0
        self._batch = self._priority

    def begin(self, n: int) -> None:
        """The next n tokens are about to pass."""
        self._batch = self._priority[self._seen : self._seen + n]
        self._seen += n

    def attached(self, layers: nn.ModuleList) -> ExitStack:
        """Hooks on, until the returned context is left."""
        stack = ExitStack()
        for block in self.blocks:
            stack.callback(block.module.register_forward_pre_hook(self._on_block(block)).remove)
            stack.callback(layers[block.layer].register_forward_hook(self._on_layer(block.layer)).remove)
        for i, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear) and ".experts." not in name and not name.endswith(".gate"):
                    stack.callback(module.register_forward_pre_hook(self._on_linear(f"model.layers.{i}.{name}")).remove)
        return stack

    def _on_block(self, block: MoeBlock) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        n_ff = int(block.expert(0)[0].shape[0])

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            ids, weights = block.route(x)
            sums = observe_block(x, ids, weights, block.expert, n_expert=block.n_expert, n_ff=n_ff)
            if not (np.isfinite(sums.output_energy).all() and np.isfinite(sums.in_gate_up).all() and np.isfinite(sums.in_down).all()):
                raise UserError(f"the experts of layer {block.layer} compute values that are not finite: the model is broken")
            old = self.sums.get(block.layer)
            self.sums[block.layer] = sums if old is None else old + sums
            new = Sample(x, ids.cpu().numpy(), weights.cpu().numpy(), self._batch)
            self.samples[block.layer] = merge(self.samples.get(block.layer), new, block.n_expert, self._size)

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

    def layer(self, block: MoeBlock) -> LayerCalibration:
        """What was gathered for a block, nothing measured yet."""
        sums = self.sums[block.layer]
        gate_up, down = sums.in_gate_up.astype(np.float32), sums.in_down.astype(np.float32)
        return LayerCalibration(
            layer=block.layer,
            selections=sums.selections,
            gate_weight=sums.gate_weight,
            output_energy=sums.output_energy,
            residual_energy=self.residual[block.layer],
            in_sum2={"gate": gate_up, "up": gate_up, "down": down},
            error=np.zeros((block.n_expert, len(GROUPS), 0)),
            wanda=np.zeros(block.n_expert),
            moments=sums.moments / np.float32(self.n_tokens),
        )

    def dense(self, family: Family, n_layers: int) -> dict[str, NDArray[np.float32]]:
        """GGUF tensor name -> [cols] sums of squared inputs over all tokens, for the linear layers that every token passes."""
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        names = gguf.get_tensor_name_map(arch, n_layers)
        found = ((names.get_name(name), sums) for name, sums in sorted(self._dense.items()))
        return {f"{name}.weight": sums.astype(np.float32) for name, sums in found if name}


def measured_tokens(sample: Sample, layer: LayerCalibration, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """expert -> (block inputs [n, n_embd], gate weights [n]) that its error is measured on."""
    means = mean_gate_weights(layer.selections, layer.gate_weight)

    def tokens(e: int) -> tuple[Tensor, Tensor]:
        own, own_weight = tokens_of(sample, e, size)
        rows, gate_weight = completed(own, own_weight, tokens_elsewhere(sample, e, size), float(means[e]))
        return sample.x[torch.from_numpy(rows)].float(), torch.from_numpy(gate_weight)

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


def _bar(label: str, total: int, unit: str, progress: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=label, unit=unit, unit_scale=total > 10000, disable=not progress)
