"""The findings that Replicate-and-Quantize (arXiv 2602.19938) builds on, measured on a model: (i) load hardly depends on the batch size,
(ii) frequency and importance are not the same, (iii) a small calibration set is enough.

    python tools/paper_findings.py MODEL --text CALIBRATION.txt --heldout FILE.txt [FILE.txt ...] [--tokens 98304]

MODEL: a Hugging Face directory. (i) LIS per batch of so many held-out tokens, mean over batches and layers; sequences of unequal length are
padded to the longest of eight, and counted with the padding masked and not. (ii) rank correlation of selections with the paper's Wanda
score, with output energy, and how often the busiest expert is also among the least important quarter. (iii) copies placed on 1k to 100k
calibration tokens: LIS of the held-out texts with 8 copies a layer, against copies placed on the held-out texts themselves.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rq_gguf.calibration.families import moe_blocks
from rq_gguf.calibration.run import batches, cut, pick_device, tokenize
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.evaluation.text import mix, read_text
from rq_gguf.planning.load import copy_order, lis, place_copies, split_load
from rq_gguf.rank_correlation import rank_correlation

SEQUENCE = 512
COPIES = 8
SIZES = (8, 32, 128, 512, 2048, 8192)


class Routing:
    """A model's choices: layer -> [tokens, top_k]."""

    def __init__(self, directory: Path, device: str) -> None:
        self.directory, self.device = directory, pick_device(device)
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(self.device).eval()
        self.blocks = list(moe_blocks(self.model.model.layers, self.model.config))

    def of(self, sequences: list[NDArray[np.int64]], *, sums: bool = False) -> tuple[dict[int, NDArray[np.int64]], dict[int, torch.Tensor]]:
        """(choices, layer -> sum of squared inputs of the block's experts [n_expert, n_embd] where asked for)."""
        chosen: dict[int, list[NDArray[np.int64]]] = {b.layer: [] for b in self.blocks}
        energy = {b.layer: torch.zeros(b.n_expert, b.router.shape[1]) for b in self.blocks}
        handles = []
        for block in self.blocks:

            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], block=block) -> None:  # type: ignore[no-untyped-def]
                x = args[0].reshape(-1, args[0].shape[-1])
                ids = block.route(x)[0].cpu()
                chosen[block.layer].append(ids.numpy())
                if sums:
                    for slot in ids.T:
                        energy[block.layer].index_add_(0, slot, x.float().square().cpu())

            handles.append(block.module.register_forward_pre_hook(hook))
        with torch.inference_mode():
            for batch in batches(sequences):
                self.model(input_ids=batch.to(self.device), use_cache=False)
        for handle in handles:
            handle.remove()
        return {layer: np.concatenate(parts) for layer, parts in chosen.items()}, energy


def count(ids: NDArray[np.int64], n_expert: int) -> NDArray[np.int64]:
    return np.bincount(ids.reshape(-1), minlength=n_expert)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    routing = Routing(args.model, args.device)
    n = {b.layer: b.n_expert for b in routing.blocks}
    heldout = cut(tokenize(args.model, mix([read_text(p) for p in args.heldout])), 32768, SEQUENCE)
    held, _ = routing.of(heldout)

    print("(i) LIS by batch size, held-out text, mean over batches and layers\n\n| tokens | " + " | ".join(map(str, SIZES)) + " |")
    row = []
    for size in SIZES:
        parts = [[lis(count(ids[a : a + size], n[i]), n[i]) for a in range(0, len(ids) - size + 1, size)] for i, ids in held.items()]
        row.append(float(np.mean([np.mean(p) for p in parts])))
    print("|:---" * 7 + "|\n| LIS | " + " | ".join(f"{v:.2f}" for v in row) + " |")
    rng = np.random.default_rng(0)
    padded, mask = [], []
    for a in range(0, len(heldout) - 7, 8):
        lengths = rng.integers(64, SEQUENCE, 8)
        for sequence, length in zip(heldout[a : a + 8], lengths, strict=True):
            padded.append(np.concatenate([sequence[:length], np.full(lengths.max() - length, 0)]))
            mask.append(np.arange(lengths.max()) < length)
    choices: dict[int, list[NDArray[np.int64]]] = {i: [] for i in n}
    for a in range(0, len(padded), 8):
        for i, ids in routing.of(padded[a : a + 8])[0].items():
            choices[i].append(ids)
    keep = np.concatenate(mask)
    masked, whole = (
        float(np.mean([lis(count(np.concatenate(parts)[rows], n[i]), n[i]) for i, parts in choices.items()]))
        for rows in (keep, np.ones_like(keep))
    )
    print(f"\npadding ({100 * (1 - keep.mean()):.0f} % of the tokens) masked: LIS {masked:.2f}; counted: {whole:.2f}\n")

    calibration = cut(tokenize(args.model, args.text.read_text(encoding="utf-8")), args.tokens, SEQUENCE)
    loads, energy = routing.of(calibration, sums=True)
    figures, hits = [], 0
    for block in routing.blocks:
        selections, rows = count(loads[block.layer], block.n_expert).astype(float), []
        for e in range(block.n_expert):
            gate, up, down = (w.float().cpu().numpy() for w in block.expert(e))
            s = energy[block.layer][e].numpy()
            x = torch.from_numpy(np.sqrt(s / max(1.0, selections[e]))[None]).float()
            hidden = torch.nn.functional.silu(x @ torch.from_numpy(gate).T) * (x @ torch.from_numpy(up).T)
            sums = {"gate": s, "up": s, "down": (hidden[0] ** 2).numpy() * selections[e]}
            rows.append(wanda_importance({"gate": gate, "up": up, "down": down}, sums))
        score = np.array(rows)
        figures.append(rank_correlation(selections, score))
        hits += int(np.argsort(score).tolist().index(int(selections.argmax())) < block.n_expert // 4)
    print(f"(ii) rank correlation of selections with the Wanda score, mean over layers: {np.mean(figures):.2f} (least {min(figures):.2f});")
    print(f"     layers whose busiest expert is among the least important quarter: {hits} of {len(routing.blocks)}\n")

    def reduction(by: dict[int, NDArray[np.int64]]) -> float:
        ratios = []
        for i, ids in held.items():
            selections, load = count(by[i], n[i])[None], count(ids, n[i])
            copies = place_copies(copy_order(selections, COPIES), np.array([COPIES]), n[i])[0]
            ratios.append(lis(load, n[i]) / lis(split_load(load, copies), n[i]))
        return float(np.mean(ratios))

    print(f"(iii) held-out LIS reduction with {COPIES} copies a layer placed on so many calibration tokens\n")
    print("| tokens | reduction | correlation of loads |\n|---:|---:|---:|")
    for tokens in (1024, 4096, 16384, 65536, args.tokens):
        # Evenly spaced sequences, as calibration takes them.
        step = max(1, len(calibration) * SEQUENCE // tokens)
        taken = np.concatenate([np.arange(a * SEQUENCE, (a + 1) * SEQUENCE) for a in range(0, len(calibration) - 1, step)])[:tokens]
        some = {i: ids[taken] for i, ids in loads.items()}
        same = np.mean([np.corrcoef(count(some[i], n[i]), count(held[i], n[i]))[0, 1] for i in held])
        print(f"| {len(taken):,} | {reduction(some):.2f}x | {same:.3f} |")
    print(f"| the held-out text itself | {reduction(held):.2f}x | 1 |")


if __name__ == "__main__":
    main()
