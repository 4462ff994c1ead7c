"""A causal LM of which one decoder layer at a time is in memory.

transformers loads every part itself, so that whatever it renames, stacks or keeps in another type comes out as in the whole model: the
model's own class is given the tensors of one layer, with all other modules taken out. And the model's own forward pass calls each layer,
with the masks and positions that it makes for it: layers before answer with hidden states from earlier, and behind it the pass ends.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from rq_gguf.calibration.dequantize import dequantized, take_quantization
from rq_gguf.calibration.families import decoder, decoder_layers
from rq_gguf.calibration.memory import release
from rq_gguf.errors import UserError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Streamed:
    """A checkpoint whose layers come and go. Nothing here is safe to use from several threads."""

    def __init__(self, directory: Path, files: dict[str, Path], device: torch.device) -> None:
        """Loads what stands before the first layer. directory: a checkpoint. files: of `check_weights`.

        On a CPU, which is slow in bfloat16, everything is float32; elsewhere the checkpoint's own type keeps memory and, for routers,
        exactness. Raises UserError if the checkpoint does not fit the model it claims to be.
        """
        self.directory, self.device = directory, device
        with loading(self.directory):
            self.config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
            self._fp8_block = take_quantization(self.config)
            with torch.device("meta"):
                whole = transformers.AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        self._class = type(whole)
        self._files = files
        self._of_layer: dict[int | None, list[str]] = {}
        for name in self._files:
            found = _LAYER.search(name)
            self._of_layer.setdefault(int(found[1]) if found else None, []).append(name)
        self.layers = decoder_layers(whole)
        """All decoder layers: those that are not loaded lie on torch's meta device, shapes without values."""
        self._given: Any = None  # what the layers that are not loaded answer
        self._tuples = False  # whether layers answer with a tuple, as in some families of transformers 4
        for layer in self.layers:
            layer.forward = self._answer
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        left_out = {id(p) for p in self.layers.parameters()} | ({id(head.weight)} if head.weight is not embedding.weight else set())
        self.front_weights = sum(p.numel() for p in whole.parameters() if id(p) not in left_out)
        """Number of weights that are in memory beside a layer: those that belong to none, without the head."""
        self._check_layers_alike()
        self.dtype = torch.float32 if device.type == "cpu" else self._stored_type(whole)
        self.model = self._front(head=False)

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Layer i is loaded while inside: `layers[i]`. Raises UserError for values that are not finite, naming the tensor."""
        absent = self.layers[i]
        self.layers[i] = decoder_layers(self._load(i, head=False))[i]
        try:
            yield
        finally:
            self.layers[i] = absent
            release()

    def through(self, i: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Output of the loaded layer i, on the device: [n, length, n_embd] for token ids [n, length].

        hidden: what layer i - 1 made of the same ids, None for the first layer.
        """
        self._give(hidden)

        def end(_: nn.Module, __: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            raise _Through(output[0] if self._tuples else output)

        handle = self.layers[i].register_forward_hook(end)
        try:
            self.model.model(input_ids=ids.to(self.device), use_cache=False)
        except _Through as reached:
            return reached.output
        except torch.OutOfMemoryError as e:
            raise UserError(f"a layer of {self.directory} does not fit in the memory of {self.device}: choose --device cpu") from e
        finally:
            handle.remove()
            self._given = None
        raise UserError(f"{self.directory}: the model does not pass its decoder layers in order, which calibration counts on")

    def load_head(self) -> None:
        """Load what stands behind the last layer too, for `logits`."""
        del self.model
        self.model = self._front(head=True)

    def logits(self, ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """[n, positions, vocabulary] for what the last layer made of token ids [n, length], at some positions. After `load_head`."""
        self._give(hidden)
        try:
            logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=positions.to(self.device)).logits
        finally:
            self._given = None
        return logits

    def _give(self, hidden: Tensor | None) -> None:
        hidden = None if hidden is None else hidden.to(self.device)
        self._given = (hidden,) if self._tuples else hidden

    def _answer(self, *_: Any, **__: Any) -> Any:
        return self._given

    def _front(self, head: bool) -> Any:
        """The model with all its layers on the meta device."""
        front = self._load(None, head=head)
        decoder(front).layers = self.layers
        return front

    def _load(self, keep: int | None, *, head: bool) -> Any:
        """The model with the weights of one layer only, or with None of all but the layers."""
        config = copy.deepcopy(self.config)
        if not head:
            # Nothing is tied to a head that is not there.
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False

        class Part(self._class):  # type: ignore[name-defined,misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                _prune(self, keep, head)

        names = self._of_layer.get(keep, [])
        with loading(self.directory):
            with ExitStack() as stack:
                files = {self._files[name] for name in names}
                opened = {path: stack.enter_context(safe_open(path, "pt")) for path in files}
                # Views of the mapped files: nothing is read yet.
                tensors = {name: opened[self._files[name]].get_tensor(name) for name in names}
                tensors = dequantized(tensors, self._fp8_block)
                # Stacked in the checkpoint's own type, then converted tensor by tensor, a layer takes less memory at its peak.
                kinds = {t.dtype for t in tensors.values()}
                kind = kinds.pop() if len(kinds) == 1 and keep is not None and self.device.type == "cpu" else self.dtype
                part, info = Part.from_pretrained(None, config=config, state_dict=tensors, dtype=kind, output_loading_info=True)
                del tensors, opened
            check_complete(self.directory, info)
            # Copies: what was not converted lies in the mapped files, which let go of their memory with their last small tensor.
            for p in sorted([*part.parameters(), *part.buffers()], key=lambda t: t.numel()):
                kind = torch.float32 if self.device.type == "cpu" and p.is_floating_point() else p.dtype
                p.data = p.data.to(self.device, kind, copy=True)
        part.eval().requires_grad_(False)
        check_finite(part)
        return part

    def _stored_type(self, whole: nn.Module) -> torch.dtype:
        """The type that the checkpoint says it has, or that most of the first layer's tensors have."""
        named = getattr(self.config.get_text_config(), "dtype", None)
        if isinstance(named, torch.dtype):
            return named
        names = self._of_layer.get(0, [])
        kinds = []
        for name in names:
            with safe_open(self._files[name], "pt") as f:
                kinds.append(f.get_tensor(name).dtype)
        return max(set(kinds), key=kinds.count) if kinds else next(whole.parameters()).dtype

    def _check_layers_alike(self) -> None:
        """Raise UserError if a layer lacks a tensor that most layers of the same make have: an hour later it would be too late."""
        makes: dict[tuple[Any, ...], dict[int, set[str]]] = {}
        for i, layer in enumerate(self.layers):
            make = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
            held = {name[found.end() :] for name in self._of_layer.get(i, []) if (found := _LAYER.search(name))}
            makes.setdefault(make, {})[i] = held
        for layers in makes.values():
            counts = Counter(name for held in layers.values() for name in held)
            expected = {name for name, n in counts.items() if n > len(layers) / 2}
            for i, held in layers.items():
                if not expected <= held:
                    raise UserError(f"the checkpoint in {self.directory} lacks tensor layers.{i}.{min(expected - held)}")


@contextmanager
def loading(directory: Path) -> Iterator[None]:
    """transformers' errors as UserError, its warnings (of parts that are left out on purpose) and its bars off."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        # Out of memory, on any device, is a RuntimeError too.
        first = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(f"{directory} cannot be loaded: {first}") from e
    finally:
        transformers.utils.logging.set_verbosity(before)


def check_complete(directory: Path, info: dict[str, Any]) -> None:
    """Raise UserError for a tensor that transformers, by its loading info, looked for in vain."""
    if info["missing_keys"]:
        raise UserError(f"the checkpoint in {directory} lacks tensor {min(info['missing_keys'])}")


class _Through(Exception):
    """A layer's output, on its way out of the forward pass."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def _prune(model: Any, keep: int | None, head: bool) -> None:
    """Take out of a model what is not to be loaded: all layers but one, or with None all of them; all but the layers; the head."""
    layers = decoder_layers(model)
    for i in range(len(layers)):
        if i != keep:
            layers[i] = nn.Identity()
    if not head:
        model.set_output_embeddings(nn.Identity())
    owner = decoder(model)
    others = [(model.model, name) for name, m in model.model.named_children() if m is not owner] if owner is not model.model else []
    if keep is not None:
        others += [(owner, name) for name, m in owner.named_children() if m is not layers]
    for parent, name in others:
        setattr(parent, name, nn.Identity())


def check_finite(model: nn.Module) -> None:
    """Raise UserError naming the first weight tensor, and the expert where it holds several, with a NaN or infinity."""
    for name, p in model.named_parameters():
        # All at once is a tensor of flags: piece by piece where that is large.
        pieces = [p] if p.ndim < 3 else list(p)
        parts = [i for i, piece in enumerate(pieces) if not torch.isfinite(piece).all()]
        if parts:
            which = f"{name} (expert {parts[0]})" if p.ndim > 2 else name
            raise UserError(f"tensor {which} holds values that are not finite: the model is broken")
