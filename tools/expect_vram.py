"""What to expect of busy experts in VRAM: the tables of docs/vram.md, computed from published shapes of models. Nothing is measured.

    python tools/expect_vram.py                       8,192 tokens of context
    python tools/expect_vram.py --context 32768
    python tools/expect_vram.py --even                if all experts were picked alike

Shapes, the room that the context takes and what is kept free are those of tools/choose_budget.py, machines those of
rq_gguf/vram/machine.py.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from choose_budget import GIB, MODELS, RESERVE, Model  # noqa: E402

from rq_gguf.types import LADDER  # noqa: E402
from rq_gguf.vram.machine import MACHINES, Machine  # noqa: E402
from rq_gguf.vram.model import uniform_experts  # noqa: E402
from rq_gguf.vram.plans import TYPICAL, Setting, Speed, measure  # noqa: E402
from rq_gguf.vram.speed import Experts, Missed, Rest, decode_table  # noqa: E402

CARDS = ("6gb", "8gb", "12gb", "16gb", "24gb")
CHOSEN = {
    "allenai/OLMoE-1B-7B-0924": (8, "q8_0"),
    "openai/gpt-oss-20b": (4, "mxfp4"),
    "Qwen/Qwen3-30B-A3B": (8, "q4_k"),
    "mistralai/Mixtral-8x7B-v0.1": (2, "q4_k"),
}
"""Experts per token, by the config.json, and the type of all experts."""
SKEW = {0.0: 0.0, 0.125: 0.30, 0.25: 0.49, 0.5: 0.74, 0.75: 0.89, 1.0: 1.0}
"""Part of a layer's experts -> part of the selections that the busiest of them catch: measured on one model of 32 experts, 4 per token."""

MEASURED = {
    "q8_0": ({0: 527, 8: 110, 12: 74, 16: 60.5}, {0.67: 73, 0.54: 95.5, 0.28: 139}),
    "q4_k": ({0: 599, 8: 150, 12: 117, 16: 89}, {0.63: 113, 0.50: 134, 0.26: 196}),
}
"""OLMoE-1B-7B's shape with random weights on `h100-16-cores`, tokens per second of one sequence, by type of all experts: layers on the CPU
-> stock llama.cpp; part of the selections left to the CPU -> a prototype with busy experts in VRAM, in which the CPU waits for the GPU.
Middles of several runs."""


def shares(n_expert: int, n_used: int, even: bool) -> NDArray[np.float64]:
    """[n_expert] those of SKEW; none above 1 / n_used, what is above goes to the others."""
    if even:
        return np.full(n_expert, 1 / n_expert)
    found = np.diff(np.interp(np.linspace(0, 1, n_expert + 1), list(SKEW), list(SKEW.values())))
    for _ in range(n_expert):
        over = found > 1 / n_used
        if not over.any():
            break
        found = np.where(over, 1 / n_used, found + (found[over] - 1 / n_used).sum() * (~over) / (~over).sum())
    return np.asarray(found / found.sum())


def experts(m: Model, machine: Machine, even: bool) -> Experts:
    n_used, kind = CHOSEN[m.hub]
    row = shares(m.expert.n_expert, n_used, even)
    return uniform_experts(m.expert, kind, np.tile(row, (m.moe_layers, 1)), n_used, machine)


def rest(m: Model) -> Rest:
    """All but the routed experts, and of the embeddings one row."""
    embeddings = m.n_vocab * m.n_embd
    active = m.other_matrices - embeddings + m.moe_layers * CHOSEN[m.hub][0] * m.expert.weights
    return Rest(m.other_bytes - embeddings * 34 // 32, m.layers, float(active))


def speed(m: Model, machine: Machine, context: int, even: bool) -> Speed | None:
    """None where not even all else fits."""
    room = machine.vram - RESERVE - m.cache_bytes(context) - m.other_bytes
    if room < 0:
        return None
    missed = Missed(1.0, 1.0) if even else TYPICAL
    return measure(experts(m, machine, even), Setting(machine, rest(m), missed), room)


def chosen() -> list[Model]:
    return [m for m in MODELS if m.hub in CHOSEN]


def machines() -> list[str]:
    """A row per machine."""
    lines = [
        "| machine | VRAM, GB/s | RAM, GB/s | dearer for the CPU | PCIe, GB/s | hand-over, us per layer | GPU, 10^12 operations/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in MACHINES.values():
        costs = ", ".join(f"{t} {m.type_cost[t]:.1f}x" for t in (*LADDER, "mxfp4") if m.type_cost.get(t, 1.0) >= 1.05)
        lines.append(
            f"| `{m.name}` | {m.vram_bandwidth / 1e9:.0f} | {m.ram_bandwidth / 1e9:.0f} | {costs} | {m.pcie_bandwidth / 1e9:.1f} | "
            f"{m.handover * 1e6:.0f} | {m.compute / 1e12:.0f} |"
        )
    return lines


def beside_measured() -> list[tuple[str, str, float, float]]:
    """(type, what is on the CPU, predicted, measured), in tokens per second."""
    machine, m = replace(MACHINES["h100-16-cores"], overlap=False), chosen()[0]
    rows = []
    for kind, (stock, split) in MEASURED.items():
        even = uniform_experts(m.expert, kind, np.full((m.moe_layers, m.expert.n_expert), 1 / m.expert.n_expert), 8, machine)
        seconds = decode_table(even, rest(m), machine, power=1.0).seconds
        for layers, figure in stock.items():
            rows.append((kind.upper(), f"{layers} of {m.moe_layers} layers", float(1 / seconds[m.moe_layers - layers, 0]), figure))
        for part, figure in split.items():
            slots = round((1 - part) * m.expert.n_expert)
            rows.append((kind.upper(), f"{100 * part:.0f} % of selections", float(1 / seconds[0, slots]), figure))
    return rows


def measured() -> list[str]:
    """The same as a table."""
    lines = ["| experts | on the CPU | predicted | measured | predicted over measured |", "|---|---|---|---|---|"]
    return lines + [f"| {kind} | {what} | {p:.0f} | {m:g} | {p / m:.2f} |" for kind, what, p, m in beside_measured()]


def decode_cell(s: Speed | None, m: Model) -> str:
    if s is None:
        return "no"
    if s.layout.whole == m.moe_layers or s.layout.slots == m.expert.n_expert:
        return f"{s.decode:.0f}, all fits"
    return f"{s.stock_decode:.0f} -> {s.decode:.0f} ({s.decode / s.stock_decode:.2f}x), {100 * s.adapted_hits:.0f} % caught"


def prompt_cell(s: Speed | None) -> str:
    return "no" if s is None else f"{s.prompt:.0f} ({s.prompt / s.stock_prompt:.2f}x)"


def table(context: int, even: bool, prompt: bool) -> list[str]:
    """A row per model, a column per card."""
    lines = ["| model | experts | " + " | ".join(f"{MACHINES[c].vram // GIB} GB" for c in CARDS) + " |", "|---|---|" + "---|" * len(CARDS)]
    for m in chosen():
        kind = CHOSEN[m.hub][1]
        speeds = [speed(m, MACHINES[c], context, even) for c in CARDS]
        cells = [prompt_cell(s) if prompt else decode_cell(s, m) for s in speeds]
        lines.append(f"| {m.hub.partition('/')[2]} | {kind.upper()}, {m.uniform(kind) / GIB:.1f} GiB | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens that the KV cache holds, in F16 (default 8192)")
    parser.add_argument("--even", action="store_true", help="experts that are all picked alike")
    args = parser.parse_args()
    tables = [machines(), table(args.context, args.even, False), table(args.context, args.even, True), measured()]
    print("\n\n".join("\n".join(lines) for lines in tables))


if __name__ == "__main__":
    main()
