"""What a build or plan comes to, as text for people and as plain data for --json."""

import shlex
from pathlib import Path
from typing import Any

from rq_gguf.build import BuildReport, Remarks
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.planning.load import lis
from rq_gguf.planning.plan import Plan
from rq_gguf.runtime.tools import tool_path


def calibration_line(c: Calibration, out: Path) -> str:
    """What was measured."""
    return f"{out}: {len(c.layers)} layers of {c.layers[0].n_expert} experts on {c.n_tokens} tokens, types {', '.join(c.types)}"


def calibration_json(c: Calibration, out: Path) -> dict[str, Any]:
    """A calibration's figures as plain data: load and its imbalance per layer, the error of each type summed over all experts."""
    return {
        "file": str(out),
        "model": c.model,
        "tokens": c.n_tokens,
        "types": list(c.types),
        "layers": [
            {
                "layer": layer.layer,
                "n_expert": layer.n_expert,
                "selections": layer.selections.tolist(),
                "lis": lis(layer.selections, layer.n_expert),
                "never_picked": int((layer.selections == 0).sum()),
                "error": {group: dict(zip(c.types, layer.error[:, g].sum(axis=0).tolist(), strict=True)) for g, group in enumerate(GROUPS)},
            }
            for layer in c.layers
        ],
    }


def plan_lines(plan: Plan, remarks: Remarks) -> list[str]:
    """The verdict on a plan, a line per figure; then the notes on it."""
    s = plan.summary
    worst, one = s["worst_layer"], s["one_type"]
    part = f"of {plan.budget_bytes:,} bytes, {_percent(plan.expert_bytes, plan.budget_bytes)} of the budget {plan.budget}"
    if plan.target_kld is not None:
        part = f"bytes for {plan.budget}"
    lines = [
        f"experts   {plan.expert_bytes:,} {part}, {s['bits_per_expert_weight']:.2f} bits per weight",
    ]
    lines += (
        [
            f"balance   LIS {s['lis_before']:.2f} -> {s['lis_after']:.2f} (1 is even), {s['lis_reduction']:.2f}x less; means over layers, "
            "on the calibration text",
            f"worst     layer {worst['layer']}: LIS {worst['lis_before']:.2f} -> {worst['lis_after']:.2f}",
        ]
        if remarks.load_known
        else ["balance   unknown"]
    )
    lines += [
        f"copies    {s['copies']} ({s['copies'] / len(plan.layers):.1f} per layer)",
        "types     " + "; ".join(f"{group}: {_counts(counts)}" for group, counts in s["instances_by_type"].items()),
    ]
    if s["predicted_kld"] is not None:
        text = f"KLD       {s['predicted_kld']:.3g} nats predicted for the experts"
        if one is not None:
            ratio = f", {s['predicted_kld'] / one['kld']:.2f}x" if one["kld"] > 0 else ""
            text += f"{ratio} (all of them in {one['type']}: {one['kld']:.3g} in {one['bytes']:,} bytes)"
        lines.append(text)
    if s["gap"] is not None:
        what = "KLD could be saved within these bytes" if plan.target_kld is None else "bytes could be saved with this KLD"
        lines.append(
            f"optimum   at most {100 * max(s['gap'], 0):.2f} % of the {what} and this balance; a MB more saves "
            f"{1e6 * s['kld_per_byte']:.2g} nats"
        )
    return lines + [f"note      {note}" for note in remarks.notes]


def build_lines(report: BuildReport, dry_run: bool) -> list[str]:
    """The verdict on a build, then how to run the file."""
    lines = []
    if report.file_bytes is not None:
        kind = "would take at most" if dry_run else "takes" if report.files == 1 else f"and {report.files - 1} more take"
        lines.append(f"file      {report.out} {kind} {report.file_bytes:,} bytes")
    lines += plan_lines(report.plan, report.remarks)
    steps = ", ".join(f"{name} {t:.1f} s" for name, t in report.seconds.items() if name != "total")
    lines.append(f"time      {report.seconds['total']:.1f} s" + (f" ({steps})" if steps else ""))
    if dry_run:
        lines += ["", f"nothing was written but {report.job}; the plan: {report.job / 'plan.json'}"]
    return lines


def run_commands(out: Path) -> list[str]:
    """The command lines that run a file: one, or first the one that gets the program where it is not there."""
    options = shlex.join(["-m", str(out), "-p", "Once upon a time"])
    try:
        return [f"{shlex.quote(str(tool_path('llama-cli')))} {options}"]
    except UserError:
        return ["rq-gguf runtime install", f'"$(rq-gguf runtime path llama-cli)" {options}']


def build_json(report: BuildReport, commands: list[str] | None) -> dict[str, Any]:
    """A build as plain data."""
    return {
        "file": str(report.out) if report.written or commands else None,
        "files": report.files,
        "file_bytes": report.file_bytes,
        "job": str(report.job),
        **plan_json(report.plan, report.remarks),
        "seconds": report.seconds,
        "command": " && ".join(commands) if commands else None,
    }


def plan_json(plan: Plan, remarks: Remarks) -> dict[str, Any]:
    """A plan's figures as plain data; the plan itself is plan.json."""
    return {
        "model": plan.model,
        "policy": plan.policy,
        "budget": plan.budget,
        "types": list(plan.types),
        "calibration_sha256": plan.calibration_sha256,
        "calibration_tokens": plan.calibration_tokens,
        **(plan.summary if remarks.load_known else _without_lis(plan.summary)),
        "notes": list(remarks.notes),
    }


def _without_lis(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of a plan whose load is not known: no balance among them."""
    layers = [{key: None if key.startswith("lis_") else value for key, value in row.items()} for row in figures["layers"]]
    return {key: None if key.startswith("lis_") or key == "worst_layer" else value for key, value in figures.items()} | {"layers": layers}


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {t}" for t, n in counts.items())
