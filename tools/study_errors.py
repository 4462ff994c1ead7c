"""What the error model of docs/errors.md rests on, measured on a model: whether gradients or forward passes predict KL divergence, and what
error feedback is worth on text that nothing was fitted to.

    python tools/study_errors.py MODEL --calibration CALIBRATION.gguf --text CALIBRATION.txt --heldout FILE.txt [FILE.txt ...]

MODEL: a Hugging Face directory that fits in memory. CALIBRATION.gguf: of `rq-gguf calibrate MODEL` on CALIBRATION.txt. Three tables:

1. One layer and matrix group after the other in the calibration's reference type, on the sequences that calibrate takes for that: the KL
   divergence and the flips that it recorded, and half the mean of (g.e)^2, e the change of the block's output at a token and g the
   gradient, with respect to that output, of the log-probabilities of tokens sampled from the model. Then all layers and groups together. A
   predictor that held would have the same ratio to the measured figure in every row.
2. Errors of gate and up on held-out tokens when they are quantized with error feedback, over those without, per layer and type.
3. Errors measured on some rows of each matrix (calibration.measure.ROWS) against those on all: the relative difference per expert and type,
   root mean square, and the KL divergence by the errors on all of a plan at Q4_K's bytes that was made from them. The last row is what a
   GPU would measure on all rows (calibration.on_device; on a CPU slow in types with codebooks).
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.families import MoeBlock, decoder_layers, moe_blocks
from rq_gguf.calibration.feedback import layer_feedback
from rq_gguf.calibration.file import read_calibration
from rq_gguf.calibration.measure import measure_layer
from rq_gguf.calibration.on_device import measure_layer_there
from rq_gguf.calibration.response import SEQUENCES, change, divergence, flip_rate
from rq_gguf.calibration.run import SAMPLES, Observer, batches, cut, evenly, measured_tokens, sequence_length, tokenize, weights_of
from rq_gguf.evaluation.text import mix, read_text
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.planning.file import read_plan, write_plan
from rq_gguf.planning.policy import make_plan
from rq_gguf.runtime.tools import library_path
from rq_gguf.threads import available_threads

HELD_OUT = 32768
"""Tokens of the second and third table."""
ALL_ROWS, FEWER_ROWS, THERE = 1 << 30, (256, 128, 64), -1


class Study:
    """A model, its calibration, and token ids [n, length] to pass."""

    def __init__(self, directory: Path, calibration: Calibration, ids: Tensor) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self.blocks = list(moe_blocks(decoder_layers(self.model), self.model.config))
        self.calibration, self.ids = calibration, ids
        self.ggml = Ggml(library_path("ggml-base"))

    @contextmanager
    def watched(self, inputs: dict[int, Tensor], outputs: dict[int, Tensor]) -> Iterator[None]:
        """What goes into each block [tokens, n_embd] and comes out of it, while inside."""
        handles = []
        for b in self.blocks:

            def before(_: Any, args: Any, b: MoeBlock = b) -> None:
                inputs[b.layer] = args[0].detach().reshape(-1, args[0].shape[-1])

            def after(_: Any, __: Any, out: Any, b: MoeBlock = b) -> None:
                outputs[b.layer] = out[0] if isinstance(out, tuple) else out

            handles += [b.module.register_forward_pre_hook(before), b.module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logs(self) -> tuple[Tensor, dict[int, Tensor]]:
        """([sequences, positions, vocabulary] log-probabilities of the second halves, layer -> ids that the router picks)."""
        found, inputs, chosen = [], dict[int, Tensor](), {b.layer: list[Tensor]() for b in self.blocks}
        with torch.inference_mode(), self.watched(inputs, {}):
            for ids in self.ids.split(2):
                found.append(self.model(input_ids=ids, use_cache=False).logits[:, ids.shape[1] // 2 :].log_softmax(-1))
                for b in self.blocks:
                    chosen[b.layer].append(b.route(inputs[b.layer])[0])
        return torch.cat(found), {layer: torch.cat(parts) for layer, parts in chosen.items()}

    def gradients(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """(inputs of each block [tokens, n_embd], gradients of the sampled tokens' log-probabilities with respect to its outputs)."""
        random = torch.Generator().manual_seed(1)
        seen: dict[int, list[Tensor]] = {b.layer: [] for b in self.blocks}
        found: dict[int, list[Tensor]] = {b.layer: [] for b in self.blocks}
        inputs, outputs = dict[int, Tensor](), dict[int, Tensor]()
        for ids in self.ids.split(2):
            embedded = self.model.get_input_embeddings()(ids).requires_grad_(True)
            with self.watched(inputs, outputs):
                logs = self.model(inputs_embeds=embedded, use_cache=False).logits.log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=random).reshape(*ids.shape, 1)
            layers = [b.layer for b in self.blocks]
            made = torch.autograd.grad(logs.gather(-1, drawn).sum(), [outputs[layer] for layer in layers])
            for layer, gradient in zip(layers, made, strict=True):
                seen[layer].append(inputs[layer])
                found[layer].append(gradient.reshape(-1, gradient.shape[-1]))
        return {k: torch.cat(v) for k, v in seen.items()}, {k: torch.cat(v) for k, v in found.items()}

    def of_gradients(self) -> list[list[float]]:
        """[block][group] half the mean of (g.e)^2."""
        inputs, gradients = self.gradients()
        rows = []
        for b in self.blocks:
            x, g = inputs[b.layer], gradients[b.layer]
            row = []
            for group in GROUPS:
                with torch.inference_mode():
                    before = self._output(b, x)
                    with self._changed(b, (group,)):
                        moved = self._output(b, x) - before
                    row.append(0.5 * (moved * g).sum(dim=1).square().mean().item())
            rows.append(row)
        return rows

    @staticmethod
    def _output(b: MoeBlock, x: Tensor) -> Tensor:
        out = b.module(x[None])
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)

    @contextmanager
    def _changed(self, b: MoeBlock, groups: tuple[str, ...]) -> Iterator[None]:
        assert self.calibration.response is not None
        layer = next(c for c in self.calibration.layers if c.layer == b.layer)
        before = [[w.clone() for w in b.expert(e)] for e in range(b.n_expert)]
        for group in groups:
            change(b, layer, group, self.calibration.response.type, self.ggml, available_threads())
        try:
            yield
        finally:
            for e, old in enumerate(before):
                for weight, values in zip(b.expert(e), old, strict=True):
                    weight.copy_(values)

    def together(self) -> tuple[float, float]:
        """(KL divergence, flips summed over the blocks) of all blocks and groups changed."""
        before, chosen = self.logs()
        with torch.inference_mode():
            for b in self.blocks:
                layer = next(c for c in self.calibration.layers if c.layer == b.layer)
                assert self.calibration.response is not None
                for group in GROUPS:
                    change(b, layer, group, self.calibration.response.type, self.ggml, available_threads())
        after, later = self.logs()
        return divergence(before, after), sum(flip_rate(chosen[layer], later[layer]) for layer in chosen)


def responses(study: Study) -> None:
    response = study.calibration.response
    assert response is not None
    print(f"{study.calibration.model}: one layer and group in {response.type} at a time, {study.ids.numel()} tokens\n")
    print("| layer, group | KLD measured | by gradients | flips | (measured - by gradients) / flips |\n|:---|---:|---:|---:|---:|")
    smooth = study.of_gradients()
    for i, b in enumerate(study.blocks):
        for g, group in enumerate(GROUPS):
            kld, flips, by_gradient = response.kld[i, g], response.flips[i, g].sum(), smooth[i][g]
            each = f"{(kld - by_gradient) / flips:.4f}" if flips > 0 else ""
            print(f"| {b.layer} {group.replace('_', '+')} | {kld:.6f} | {by_gradient:.6f} | {flips:.3f} | {each} |")
    kld, flips = study.together()
    rooted = sum(np.sqrt(np.square(response.flips[:, :, j]).sum()) for j in range(len(study.blocks)))
    print(f"| all together | {kld:.6f} | {np.sum(smooth):.6f} | {flips:.3f} | {(kld - np.sum(smooth)) / flips:.4f} |")
    print(f"\nroot of the summed squares of single flips, summed over layers: {rooted:.3f}")


def errors_on(directory: Path, calibration: Calibration, text: str, ggml: Ggml) -> None:
    """The second and third table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    blocks = list(moe_blocks(decoder_layers(model), model.config))
    sequences = cut(tokenize(directory, text), HELD_OUT, sequence_length(directory))
    observer = Observer(blocks[0].family, sum(len(s) for s in sequences), SAMPLES)
    with torch.inference_mode():
        hooks = [observer.attached(b.layer, decoder_layers(model)[b.layer], b) for b in blocks]
        for n, ids in enumerate(batches(sequences)):
            observer.begin(n == 0, ids.numel())
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.close()
    types = tuple(t for t in ("q2_k", "q4_k", "q6_k") if t in calibration.types)
    by_rows: dict[int, list[LayerCalibration]] = {n: [] for n in (ALL_ROWS, *FEWER_ROWS, THERE)}
    print(f"\nerror of gate and up with feedback over that without, {HELD_OUT} held-out tokens\n")
    print(f"| layer | {' | '.join(types)} |\n|:---|{'---:|' * len(types)}")
    for b, known in zip(blocks, calibration.layers, strict=True):
        seen, sample = observer.take(b)
        tokens = measured_tokens(sample, seen, SAMPLES, b.family.weighs_inputs)
        errors = [
            measure_layer(c, tokens, weights_of(b), types, ggml, threads=available_threads(), tick=lambda: None, hidden=b.hidden).error
            for c in (known, replace(known, moments=None))
        ]
        ratios = errors[0][:, 0].sum(axis=0) / errors[1][:, 0].sum(axis=0)
        print(f"| {b.layer} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)
        feedback = layer_feedback(known)
        options: dict[str, Any] = {"threads": available_threads(), "tick": lambda: None, "hidden": b.hidden}
        for n, layers in by_rows.items():
            if n == THERE:
                with torch.inference_mode():
                    made = measure_layer_there(known, tokens, b.expert, calibration.types, ggml, feedback, most_rows=ALL_ROWS, **options)
            else:
                made = measure_layer(known, tokens, weights_of(b), calibration.types, ggml, most_rows=n, **options)
            layers.append(made)
    print("\nerrors measured on some rows of each matrix\n")
    print("| rows | gate and up | down | KLD of the plan |\n|---:|---:|---:|---:|")
    every = replace(calibration, layers=tuple(by_rows[ALL_ROWS]))
    for n, layers in by_rows.items():
        pairs = list(zip(layers, every.layers, strict=True))
        off = [np.concatenate([(a.error[:, g] / b.error[:, g] - 1).ravel() for a, b in pairs]) for g in range(len(GROUPS))]
        rms = [f"{np.sqrt(np.square(x[np.isfinite(x)]).mean()):.1%}" for x in off]
        name = {ALL_ROWS: "all", THERE: "all, as on a GPU"}.get(n, str(n))
        print(f"| {name} | {' | '.join(rms)} | {_kld_by(replace(calibration, layers=tuple(layers)), every):.6f} |")


def _kld_by(guess: Calibration, truth: Calibration) -> float:
    """KL divergence that `truth` predicts for what `guess` plans at Q4_K's bytes."""
    plan = make_plan(guess, budget="q4_k", types=guess.types, replicas=0, policy="budget", other_bytes=0, calibration_sha256="")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_plan(path, plan, guess)
        return float(read_plan(path, truth).summary["predicted_kld"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    calibration = read_calibration(args.calibration)
    sequences = cut(tokenize(args.model, read_text(args.text)), calibration.n_tokens, sequence_length(args.model))
    responses(Study(args.model, calibration, torch.from_numpy(evenly(sequences, SEQUENCES))))
    errors_on(args.model, calibration, mix([read_text(path) for path in args.heldout]), Ggml(library_path("ggml-base")))


if __name__ == "__main__":
    main()
