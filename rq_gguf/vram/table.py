"""Plans for a machine, for people and for programs; hit shares too. Pure."""

from dataclasses import asdict
from typing import Any

from rq_gguf.placement.table import markdown
from rq_gguf.planning.plan import Plan
from rq_gguf.report.words import kld_text, size_text
from rq_gguf.vram.hits import Hits
from rq_gguf.vram.machine import Machine
from rq_gguf.vram.plans import SEQUENCES, Choice, Setting
from rq_gguf.vram.speed import Layout


def plans_lines(choices: list[Choice], setting: Setting, vram: float, written: Plan) -> list[str]:
    """A table of plans, and what it rests on. vram: bytes."""
    first = choices[0]
    head = [
        "plan",
        "experts",
        "KLD",
        "in VRAM",
        "caught",
        "tokens/s",
        "stock's layout",
        f"{SEQUENCES} at once",
        "prompt",
    ]
    rows = [
        [
            c.name + (" *" if c.plan is written else ""),
            size_text(c.plan.expert_bytes),
            kld_text(c.kld),
            layout_text(c.speed.layout, len(c.plan.layers), c.plan.layers[0].n_expert),
            f"{100 * c.speed.hits:.0f} %, {100 * c.speed.adapted_hits:.0f} %",
            f"{c.speed.decode:.1f}",
            f"{c.speed.stock_decode:.1f} ({c.speed.decode / c.speed.stock_decode:.2f}x)",
            f"{c.speed.together:.1f} ({c.speed.together / c.speed.stock_together:.2f}x)",
            f"{c.speed.prompt:.0f} ({c.speed.prompt / c.speed.stock_prompt:.2f}x)",
        ]
        for c in choices
    ]
    gain = "" if len(choices) > 1 else "; no other plan of its error or up to twice that is faster"
    return [
        f"machine   {machine_text(setting.machine, first.plan.types)}",
        f"vram      {size_text(vram)} for experts; all figures of speed are predicted{gain}",
        "",
        *markdown(head, rows),
        "",
        "* is written. caught: selections that fall on experts in VRAM, with the calibration's busiest and with the set that follows the "
        "text. tokens/s: one sequence, following the text. In brackets: over stock's layout (--n-cpu-moe) of the same VRAM",
    ]


def layout_text(layout: Layout, n_layers: int, n_expert: int) -> str:
    """`40 of 128` experts of every layer, and whole layers."""
    if layout.whole == n_layers or layout.slots == n_expert:
        return "all"
    whole = f"{layout.whole} layer{'s' * (layout.whole != 1)}"
    if layout.slots == 0:
        return whole if layout.whole else "none"
    return f"{layout.slots} of {n_expert}" + (f", {whole} whole" if layout.whole else "")


def machine_text(m: Machine, types: tuple[str, ...]) -> str:
    """types: those of which something is said."""
    costs = ", ".join(f"{t} {m.type_cost[t]:.1f}x" for t in types if m.type_cost.get(t, 1.0) >= 1.05)
    return (
        f"{m.name}: RAM {m.ram_bandwidth / 1e9:.0f} GB/s, VRAM {m.vram_bandwidth / 1e9:.0f} GB/s, PCIe {m.pcie_bandwidth / 1e9:.1f} GB/s, "
        f"{m.handover * 1e6:.0f} us hand-over per layer" + (f"; arithmetic makes a byte dearer: {costs}" if costs else "")
    )


def plans_json(choices: list[Choice], setting: Setting, vram: float, ram: int | None, written: Plan) -> dict[str, Any]:
    """The same as plain data. Seconds, bytes, tokens per second; shares from 0 to 1."""
    return {
        "machine": asdict(setting.machine),
        "vram_bytes": int(vram),
        "ram_bytes": ram,
        "missed_power": asdict(setting.missed),
        "choices": [
            {
                "name": c.name,
                "written": c.plan is written,
                "expert_bytes": c.plan.expert_bytes,
                "predicted_kld": c.kld,
                **asdict(c.speed),
            }
            for c in choices
        ],
    }


def hits_lines(found: list[Hits], n_expert: int) -> list[str]:
    """What VRAM would catch of a trace's selections."""
    cells = [
        [f"{h.slots} of {n_expert}", *(f"{100 * v.mean():.0f} ({100 * v.min():.0f})" for v in (h.static, h.adapted)), f"{h.exchanges:.1f}"]
        for h in found
    ]
    head = ["experts in VRAM", "busiest, %", "following the text, %", "exchanges"]
    return [
        "selections that fall on experts in VRAM, means over layers (the worst layer); exchanges per 1000 tokens and layer",
        *markdown(head, cells),
    ]


def hits_json(found: list[Hits]) -> list[dict[str, Any]]:
    """The same as plain data, shares from 0 to 1."""
    return [
        {
            "slots": h.slots,
            "static": float(h.static.mean()),
            "adapted": float(h.adapted.mean()),
            "static_worst_layer": float(h.static.min()),
            "adapted_worst_layer": float(h.adapted.min()),
            "exchanges_per_1000_tokens": h.exchanges,
        }
        for h in found
    ]
