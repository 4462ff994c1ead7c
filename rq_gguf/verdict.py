"""What a build or plan comes to, as text for people and as plain data for --json."""

import shlex
from pathlib import Path
from typing import Any

from rq_gguf.build import BuildReport
from rq_gguf.planning.plan import Plan


def plan_lines(plan: Plan) -> list[str]:
    """The verdict on a plan, a line per figure."""
    s = plan.summary
    worst, one = s["worst_layer"], s["one_type"]
    lines = [
        f"experts   {plan.expert_bytes:,} of {plan.budget_bytes:,} bytes, {_percent(plan.expert_bytes, plan.budget_bytes)} of the budget "
        f"{plan.budget}, {s['bits_per_expert_weight']:.2f} bits per weight",
        f"balance   LIS {s['lis_before']:.2f} -> {s['lis_after']:.2f} (1 is even), {s['lis_reduction']:.2f}x less; means over layers, "
        "on the calibration text",
        f"worst     layer {worst['layer']}: LIS {worst['lis_before']:.2f} -> {worst['lis_after']:.2f}",
        f"copies    {s['copies']} ({s['copies'] / len(plan.layers):.1f} per layer)",
        "types     " + "; ".join(f"{group}: {_counts(counts)}" for group, counts in s["instances_by_type"].items()),
    ]
    if s["error"] is not None:
        text = f"error     {s['error']:.3g} of the residual energy, weighted"
        if one is not None:
            ratio = f", {s['error'] / one['error']:.2f}x" if one["error"] > 0 else ""
            text += f"{ratio} (all experts in {one['type']}: {one['error']:.3g} in {one['bytes']:,} bytes)"
        lines.append(text)
    return lines


def build_lines(report: BuildReport, dry_run: bool) -> list[str]:
    """The verdict on a build, then how to run the file."""
    lines = []
    if report.file_bytes is not None:
        kind = "would take at most" if dry_run else "takes"
        lines.append(f"file      {report.out} {kind} {report.file_bytes:,} bytes")
    lines += plan_lines(report.plan)
    steps = ", ".join(f"{name} {t:.1f} s" for name, t in report.seconds.items() if name != "total")
    lines.append(f"time      {report.seconds['total']:.1f} s" + (f" ({steps})" if steps else ""))
    if dry_run:
        lines += ["", f"nothing was written but {report.job}; the plan: {report.job / 'plan.json'}"]
    return lines


def run_command(program: Path, out: Path) -> str:
    """The command line that runs a file."""
    return shlex.join([str(program), "-m", str(out), "-p", "Once upon a time"])


def build_json(report: BuildReport, command: str | None) -> dict[str, Any]:
    """A build as plain data."""
    return {
        "file": str(report.out) if report.written or command else None,
        "file_bytes": report.file_bytes,
        "job": str(report.job),
        **plan_json(report.plan),
        "seconds": report.seconds,
        "command": command,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan's figures as plain data; the plan itself is plan.json."""
    return {
        "model": plan.model,
        "policy": plan.policy,
        "budget": plan.budget,
        "types": list(plan.types),
        "calibration_sha256": plan.calibration_sha256,
        "calibration_tokens": plan.calibration_tokens,
        **plan.summary,
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {t}" for t, n in counts.items())
