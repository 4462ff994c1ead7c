"""A float reference of Mixtral-like models in llama.cpp's `llama` architecture, computed in torch from a GGUF's own weights.

Independent of the project's readers and of llama.cpp: tensors through gguf's reader and dequantizers, tiers and maps by
docs/format.md, the dispatch by its definition. Works on stock files as well.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass
class Model:
    """Weights in float32 and what the header says of them."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_used: int
    eps: float
    rope_base: float
    tensors: dict[str, torch.Tensor]
    """All but routed experts."""
    experts: list[dict[str, torch.Tensor]]
    """Per layer: gate, up, down -> [physical experts, rows, columns], tiers in order."""
    maps: list[NDArray[np.int32]]
    """Per layer: [group, n_expert, 1 + slots]."""
    dispatch: str
    block: int


def load(path: Path) -> Model:
    """Read and dequantize a whole file."""
    reader = gguf.GGUFReader(path)

    def value(key: str, default: object = None) -> object:
        entry = reader.get_field(key)
        return default if entry is None else entry.contents()

    arch = value("general.architecture")
    assert arch == "llama", arch
    n_layer = int(value(f"{arch}.block_count"))
    tensors: dict[str, torch.Tensor] = {}
    tiers: dict[tuple[int, str], dict[int, torch.Tensor]] = {}
    maps: dict[int, NDArray[np.int32]] = {}
    for t in reader.tensors:
        if match := re.fullmatch(r"blk\.(\d+)\.ffn_log2phy", t.name):
            maps[int(match[1])] = np.array(t.data)
            continue
        weights = torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        if match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(?:(\d+)\.)?weight", t.name):
            columns, rows = (int(n) for n in t.shape[:2])
            tiers.setdefault((int(match[1]), match[2]), {})[int(match[3] or 0)] = weights.reshape(-1, rows, columns)
        else:
            tensors[t.name] = weights
    experts = [{m: torch.cat([tiers[i, m][k] for k in range(len(tiers[i, m]))]) for m in ("gate", "up", "down")} for i in range(n_layer)]
    n_expert = int(value(f"{arch}.expert_count"))
    identity = np.repeat(np.stack([np.ones(n_expert, np.int32), np.arange(n_expert, dtype=np.int32)], axis=1)[None], 2, axis=0)
    return Model(
        n_layer=n_layer,
        n_head=int(value(f"{arch}.attention.head_count")),
        n_head_kv=int(value(f"{arch}.attention.head_count_kv")),
        n_used=int(value(f"{arch}.expert_used_count")),
        eps=float(value(f"{arch}.attention.layer_norm_rms_epsilon")),
        rope_base=float(value(f"{arch}.rope.freq_base", 10000.0)),
        tensors=tensors,
        experts=experts,
        maps=[maps.get(i, identity) for i in range(n_layer)],
        dispatch=str(value("rq.dispatch", "primary")),
        block=int(value("rq.dispatch_block", 16)),
    )


def physical_ids(ids: Ids, table: NDArray[np.int32], dispatch: str, block: int) -> Ids:
    """The instance that serves each selection: [group, token, used], by docs/format.md and its dispatch rule.

    ids: [token, used] logical experts of one ubatch. table: [group, n_expert, 1 + slots].
    Copy number (r / block) % copies, with r the token's rank among the ubatch's tokens routed to the same logical expert.
    """
    seen = np.zeros(table.shape[1], dtype=np.int64)
    out = np.empty((table.shape[0], *ids.shape), dtype=np.int64)
    for t, k in np.ndindex(ids.shape):
        expert = ids[t, k]
        rank, seen[expert] = seen[expert], seen[expert] + 1
        copy = (rank // block) % table[0, expert, 0] if dispatch == "balanced" else 0
        out[:, t, k] = table[:, expert, 1 + copy]
    return out


@dataclass
class Reference:
    """A model with its keys and values: `step` after `step`, as llama_decode."""

    model: Model
    keys: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(layer, sequence) -> [positions, heads, head size]; values the same."""
    values: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    routed: list[dict[str, Ids]] = field(default_factory=list)
    """Per layer of the last step: `logical` [token, used] and `physical` [group, token, used]."""
    regret: float = 0.0
    """Most router probability, over tokens and layers of the last step, that a forced choice of experts gave away."""

    def step(self, tokens: Ids, positions: Ids, sequences: Ids, forced: list[Ids] | None = None) -> torch.Tensor:
        """Logits [n_tokens, n_vocab] of one ubatch.

        forced: per layer [token, used], experts to use instead of the router's best: llama.cpp's own choice, since a tie that rounding
        decides otherwise would make everything behind it differ. `regret` says what was given away.
        """
        m = self.model
        self.routed, self.regret = [], 0.0
        x = m.tensors["token_embd.weight"][torch.as_tensor(tokens)]
        for i in range(m.n_layer):
            x = x + self._attention(i, self._norm(x, f"blk.{i}.attn_norm.weight"), positions, sequences)
            x = x + self._experts(i, self._norm(x, f"blk.{i}.ffn_norm.weight"), None if forced is None else forced[i])
        x = self._norm(x, "output_norm.weight")
        return x @ m.tensors.get("output.weight", m.tensors["token_embd.weight"]).T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.model.eps) * self.model.tensors[name]

    def _rope(self, x: torch.Tensor, positions: Ids) -> torch.Tensor:
        """Rotate neighbours (2i, 2i+1): the converter permutes q and k of this architecture so. x: [token, heads, head size]."""
        half = x.shape[-1] // 2
        angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * self.model.rope_base ** (-torch.arange(half) / half)
        cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def _attention(self, i: int, x: torch.Tensor, positions: Ids, sequences: Ids) -> torch.Tensor:
        m = self.model

        def project(name: str, heads: int) -> torch.Tensor:
            return (x @ m.tensors[f"blk.{i}.attn_{name}.weight"].T).unflatten(-1, (heads, -1))

        q, k = self._rope(project("q", m.n_head), positions), self._rope(project("k", m.n_head_kv), positions)
        v = project("v", m.n_head_kv)
        out = torch.empty(len(x), q.shape[1] * q.shape[2])
        for s in np.unique(sequences):
            rows = np.flatnonzero(sequences == s)
            old = len(self.keys[i, s]) if (i, s) in self.keys else 0
            assert np.array_equal(positions[rows], np.arange(old, old + len(rows))), "a sequence's positions must follow each other"
            self.keys[i, s] = torch.cat([self.keys[i, s], k[rows]]) if old else k[rows]
            self.values[i, s] = torch.cat([self.values[i, s], v[rows]]) if old else v[rows]
            group = m.n_head // m.n_head_kv
            keys, values = (c[i, s].repeat_interleave(group, dim=1) for c in (self.keys, self.values))
            scores = torch.einsum("qhd,khd->hqk", q[rows], keys) / q.shape[-1] ** 0.5
            future = torch.arange(len(keys))[None] > torch.as_tensor(positions[rows])[:, None]
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
        return out @ m.tensors[f"blk.{i}.attn_output.weight"].T

    def _experts(self, i: int, x: torch.Tensor, forced: Ids | None) -> torch.Tensor:
        m = self.model
        probs = (x @ m.tensors[f"blk.{i}.ffn_gate_inp.weight"].T).softmax(-1)
        best = probs.topk(m.n_used)
        ids = best.indices if forced is None else torch.as_tensor(forced)
        weights = probs.gather(1, ids)
        self.regret = max(self.regret, float((best.values.sum(1) - weights.sum(1)).max()))
        weights = weights / weights.sum(1, keepdim=True)
        logical = ids.numpy().astype(np.int64)
        physical = physical_ids(logical, m.maps[i], m.dispatch, m.block)
        self.routed.append({"logical": logical, "physical": physical})
        inner, down = (torch.as_tensor(p) for p in physical)
        out = torch.zeros_like(x)
        # Pairs of instances: one of gate and up, one of down.
        for a, b in {(int(a), int(b)) for a, b in zip(inner.flatten(), down.flatten(), strict=True)}:
            rows, slot = torch.nonzero((inner == a) & (down == b), as_tuple=True)
            w, h = m.experts[i], x[rows]
            h = torch.nn.functional.silu(h @ w["gate"][a].T) * (h @ w["up"][a].T)
            out.index_add_(0, rows, (h @ w["down"][b].T) * weights[rows, slot, None])
        return out


def nmse(measured: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n_tokens] squared error of each token's logits over their variance: a shift of all logits would change no probability."""
    a, b = (x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64) for x in (measured, reference))
    return ((a - b) ** 2).sum(axis=1) / (b**2).sum(axis=1)
