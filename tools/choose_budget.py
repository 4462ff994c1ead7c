"""What budget fits a GPU's memory: the tables of docs/choosing.md, computed from published shapes of models. Nothing is measured.

    python tools/choose_budget.py                       8,192 tokens of context
    python tools/choose_budget.py --context 32768

How much is kept free for what is no weight, and the sizes of memory, are constants below.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rq_gguf.planning.budget import ExpertShape, uniform_bytes  # noqa: E402
from rq_gguf.types import LADDER, bits_per_weight  # noqa: E402

GIB = 1 << 30
MEMORY = (6, 8, 12, 16, 24)
"""GiB of GPUs."""
RESERVE = GIB
"""Compute buffers, the driver and the desktop: an assumption."""
BATCH = 512
"""Tokens that llama.cpp computes at a time, which a window of the KV cache must hold beside its own (-ub)."""


@dataclass(frozen=True)
class Model:
    """A model's shape, from its published config.json."""

    hub: str
    layers: int
    moe_layers: int
    n_embd: int
    n_vocab: int
    expert: ExpertShape
    attention: int
    """Weights of a layer's attention matrices."""
    shared: int
    """Rows of gate and up of a layer's shared experts."""
    dense: int
    """Rows of gate and up of a layer without experts."""
    cache: int
    """Values in a layer's KV cache per token."""
    small: int
    """Norms, biases, sinks: all values that stay F32, without routers."""
    window: int | None = None
    """Tokens of the sliding window that every other layer has."""
    mxfp4: bool = False
    """True where the published weights are MXFP4: no type above it is of use."""

    @property
    def expert_weights(self) -> int:
        return self.moe_layers * self.expert.n_expert * self.expert.weights

    @property
    def router_weights(self) -> int:
        return self.moe_layers * self.n_embd * self.expert.n_expert

    @property
    def other_matrices(self) -> int:
        rows = self.moe_layers * self.shared + (self.layers - self.moe_layers) * self.dense
        return self.layers * self.attention + 3 * self.n_embd * rows + 2 * self.n_vocab * self.n_embd

    @property
    def parameters(self) -> int:
        return self.expert_weights + self.router_weights + self.other_matrices + self.small

    @property
    def other_bytes(self) -> int:
        """All but routed experts, matrices in Q8_0. A vocabulary of a few megabytes is not counted."""
        return int(self.other_matrices * bits_per_weight("q8_0") / 8) + 4 * (self.router_weights + self.small)

    @property
    def types(self) -> tuple[str, ...]:
        return (*LADDER, "mxfp4") if self.mxfp4 else LADDER

    def uniform(self, type_name: str) -> int:
        return uniform_bytes(self.expert, self.moe_layers, type_name)

    @property
    def least(self) -> int:
        return min(map(self.uniform, self.types))

    @property
    def most(self) -> int:
        return self.uniform("mxfp4" if self.mxfp4 else "q8_0")

    def cache_bytes(self, context: int) -> int:
        """An F16 cache."""
        tokens = self.layers * context
        if self.window is not None:
            tokens = self.layers // 2 * (context + min(context, self.window + BATCH))
        return 2 * self.cache * tokens


def _gqa(n_embd: int, heads: int, kv_heads: int, size: int) -> int:
    return n_embd * size * (2 * heads + 2 * kv_heads)


MODELS = (
    Model("allenai/OLMoE-1B-7B-0924", 16, 16, 2048, 50304, ExpertShape(64, 2048, 1024, False), _gqa(2048, 16, 16, 128), 0, 0,
          2 * 16 * 128, 2048 * (4 * 16 + 1)),
    Model("deepseek-ai/DeepSeek-V2-Lite", 27, 26, 2048, 102400, ExpertShape(64, 2048, 1408, False),
          2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048, 2 * 1408, 10944, 576, 27 * (2 * 2048 + 512) + 2048),
    Model("openai/gpt-oss-20b", 24, 24, 2880, 201088, ExpertShape(32, 2880, 2880, False), _gqa(2880, 64, 8, 64), 0, 0,
          2 * 8 * 64, 24 * (2 * 2880 + 64 + 80 * 64 + 2880 + 32 + 32 * 3 * 2880) + 2880, window=128, mxfp4=True),
    Model("Qwen/Qwen3-30B-A3B", 48, 48, 2048, 151936, ExpertShape(128, 2048, 768, False), _gqa(2048, 32, 4, 128), 0, 0,
          2 * 4 * 128, 48 * (2 * 2048 + 2 * 128) + 2048),
    Model("mistralai/Mixtral-8x7B-v0.1", 32, 32, 4096, 32000, ExpertShape(8, 4096, 14336, False), _gqa(4096, 32, 8, 128), 0, 0,
          2 * 8 * 128, 4096 * (2 * 32 + 1)),
)  # fmt: skip


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def shapes(context: int) -> list[str]:
    """A row per model: what it is made of."""
    lines = [
        f"| model | parameters | of them in routed experts | all else in Q8_0, GiB | KV cache of {context:,} tokens, GiB | "
        "experts in GiB: least, Q4_K, most |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for m in MODELS:
        middle = "" if m.mxfp4 else f" {gib(m.uniform('q4_k'))},"
        sizes = f"{gib(m.least)},{middle} {gib(m.most)}" if m.least < m.most else f"{gib(m.most)} (MXFP4, as published)"
        lines.append(
            f"| [{m.hub}](https://huggingface.co/{m.hub}/blob/main/config.json) | {m.parameters / 1e9:.2f}e9 | "
            f"{m.expert_weights / m.parameters:.1%} | {gib(m.other_bytes)} | {gib(m.cache_bytes(context))} | {sizes} |"
        )
    return lines


def budget(m: Model, memory: int, context: int) -> str:
    """`--budget` for a file that fits, and the bits per expert weight that it leaves."""
    room = memory * GIB - RESERVE - m.cache_bytes(context)
    experts = room - m.other_bytes
    if experts < m.least:
        return f"no ({gib(m.least + m.other_bytes)} least)"
    if experts >= m.most:
        return f"`{'mxfp4' if m.mxfp4 else 'q8_0'}` ({gib(m.most + m.other_bytes)})"
    size = int(room / GIB * 10) / 10  # never more than there is
    return f"`{size:.1f}GiB`: {8 * (size * GIB - m.other_bytes) / m.expert_weights:.1f} bits"


def budgets(context: int) -> list[str]:
    """A row per model, a column per size of memory."""
    lines = ["| model | " + " | ".join(f"{n} GiB" for n in MEMORY) + " |", "|---|" + "---|" * len(MEMORY)]
    return lines + [f"| {m.hub.partition('/')[2]} | " + " | ".join(budget(m, n, context) for n in MEMORY) + " |" for m in MODELS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens that the KV cache holds, in F16 (default 8192)")
    context = parser.parse_args().context
    print("\n".join([*shapes(context), "", *budgets(context)]))


if __name__ == "__main__":
    main()
