"""From a file or a plan, and the calibration where there is one, to the figures of a report. Pure: no IO."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rq_gguf import defaults
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS, MATRICES, parse_expert_name, parse_map_name
from rq_gguf.planning.budget import ExpertShape, expert_shape, layer_bytes, uniform_bytes
from rq_gguf.planning.error import error_model, measured_error
from rq_gguf.planning.load import lis, split_load
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.planning.policy import AUTO, make_plan
from rq_gguf.planning.summary import plan_errors
from rq_gguf.rank_correlation import rank_correlation
from rq_gguf.report.data import Choice, Cover, Layer, Point, Rate, Report, Subject
from rq_gguf.types import rank
from rq_gguf.vram.hits import shares_of
from rq_gguf.vram.machine import Machine
from rq_gguf.vram.model import experts_of, rest_of, uniform_experts
from rq_gguf.vram.plans import TYPICAL, Setting, measure
from rq_gguf.vram.speed import Experts, Rest
from rq_gguf.writing.tiered import Tiered, TieredLayer

BUDGETS = 12
"""Points of the frontier."""

_UNMEASURED = "errors are not known: the calibration measured none for some of the types here"
_EXPERTS_ALONE = "a calibration knows only the experts: speed is predicted as if a token read nothing else, and is less in truth"

Floats = NDArray[np.float64]


def subject_of_plan(name: str, calibration: Calibration, plan: Plan) -> Subject:
    """A plan for a calibration."""
    return Subject(
        name=name,
        model=calibration.model,
        written=False,
        layers=plan.layers,
        shapes=(expert_shape(calibration),) * len(plan.layers),
        load=_loads(calibration),
        n_expert_used=calibration.n_expert_used,
        tokens=calibration.n_tokens,
        budget=plan.budget,
        types=plan.types,
        max_tiers=plan.max_tiers,
        dispatch=plan.dispatch,
        file_bytes=None,
        calibration=calibration,
        notes=() if calibration.types else ("the calibration measured no errors (an imatrix): typical ones of each type stand in",),
    )


def subject_of_file(name: str, file: Tiered, calibration: Calibration | None, notes: tuple[str, ...] = ()) -> Subject:
    """A written file. calibration: the one that it was made with, if that is at hand.

    Raises UserError for a calibration of another model.
    """
    header = file.header
    layers = tuple(_stored_layer(layer) for layer in file.layers)
    shapes = tuple(_stored_shape(layer) for layer in file.layers)
    if calibration is not None:
        _check_same(name, layers, shapes, calibration)
    loads = [layer.load for layer in file.layers if layer.load is not None]
    load = tuple(np.asarray(x, dtype=np.float64) for x in loads) if len(loads) == len(layers) else None
    used = {t for layer in layers for group in layer.groups for row in group for t in row}
    arch = header.get("general.architecture", "")
    n_used = header.integer(f"{arch}.expert_used_count", 0)
    others = {
        name: (t.n_bytes, t.cols * t.n_rows)
        for name, t in header.tensors.items()
        if parse_expert_name(name) is None and parse_map_name(name) is None
    }
    active = float(sum(n_used * shape.weights for shape in shapes))
    return Subject(
        name=name,
        model=str(header.get("rq.source.model") or header.get("general.name") or name),
        written=True,
        layers=layers,
        shapes=shapes,
        load=load if load is not None or calibration is None else _loads(calibration),
        n_expert_used=n_used,
        tokens=header.integer("rq.calibration.tokens", 0),
        budget=str(header.get("rq.budget", "")),
        types=tuple(sorted(used, key=rank)),
        max_tiers=max(defaults.MAX_TIERS, *(len(tiers) for layer in file.layers for tiers in layer.matrices.values())),
        dispatch=str(header.get("rq.dispatch", "balanced")),
        file_bytes=header.size,
        calibration=calibration,
        rest=rest_of(others, header.integer(f"{arch}.block_count", len(layers)), active),
        notes=notes,
    )


def gather(subject: Subject, *, vram: int | None = None, machine: Machine | None = None, step: Callable[[], None] = lambda: None) -> Report:
    """All figures. vram: bytes that the user has for experts. machine: whose speed to predict with them. step: called after each plan of
    the frontier."""
    c = subject.calibration
    errors = None if c is None else plan_errors(c, subject.shapes[0], subject.layers)
    kld = klds = None
    if c is not None and errors is not None:
        model = error_model(c)
        kld, klds = model.kld(errors), (model.tangent(errors)[0] * errors).sum(axis=1)
    layers = tuple(_layer(subject, i, None if klds is None else float(klds[i])) for i in range(len(subject.layers)))
    size = sum(layer.bytes for layer in layers)
    by_type: Counter[str] = Counter()
    for layer in layers:
        by_type.update(layer.bytes_by_type)
    weights = sum(shape.n_expert * shape.weights for shape in subject.shapes)
    after = [layer.lis_after for layer in layers if layer.lis_after is not None]
    before = [layer.lis_before for layer in layers if layer.lis_before is not None]
    known = bool(after) and bool(before)
    report = Report(
        name=subject.name,
        model=subject.model,
        written=subject.written,
        n_expert=max(shape.n_expert for shape in subject.shapes),
        n_expert_used=subject.n_expert_used,
        tokens=subject.tokens,
        budget=subject.budget,
        dispatch=subject.dispatch,
        layers=layers,
        file_bytes=subject.file_bytes,
        expert_bytes=size,
        map_bytes=size - sum(by_type.values()),
        bits_per_weight=8 * size / weights,
        bytes_by_type={t: by_type[t] for t in sorted(by_type, key=rank)},
        lis_before=float(np.mean(before)) if known else None,
        lis_after=float(np.mean(after)) if known else None,
        log_lis=float(np.log(after).mean()) if known else None,
        importance_rank_correlation=_correlation(layers),
        kld=kld,
        chosen=None if kld is None else Point("file" if subject.written else "plan", size, kld),
        frontier=(),
        uniform=(),
        plain=None,
        balanced=None,
        coverage=_coverage(subject),
        vram=vram,
        notes=subject.notes + (() if c is None or errors is not None else (_UNMEASURED,)),
    )
    rates = None if vram is None or machine is None else _Rates.of(subject, vram, machine)
    if rates is not None:
        report = replace(
            report,
            machine=rates.machine.name,
            rate=rates.of_layers("", kld, subject.layers),
            notes=report.notes + (() if subject.rest is not None else (_EXPERTS_ALONE,)),
        )
    if c is None or report.chosen is None:
        return report
    types = _known_types(subject, c)
    plain, balanced = _choices(subject, c, types, report)
    plans = _frontier(subject, c, types, step)
    report = replace(
        report,
        frontier=tuple(point for point, _ in plans),
        uniform=_uniform(subject.shapes[0], c, types),
        plain=plain,
        balanced=balanced,
    )
    if rates is None:
        return report
    return replace(
        report,
        rates=tuple(rates.of_layers(point.name, point.kld, layers) for point, layers in plans),
        uniform_rates=tuple(rates.of_type(point.name, point.kld) for point in report.uniform),
    )


@dataclass(frozen=True)
class _Rates:
    """Predicts speed."""

    setting: Setting
    vram: int
    """Bytes."""
    shape: ExpertShape
    shares: Floats
    """[layers, n_expert]"""
    n_used: int

    @property
    def machine(self) -> Machine:
        return self.setting.machine

    @classmethod
    def of(cls, subject: Subject, vram: int, machine: Machine) -> "_Rates | None":
        """None where the load, the experts per token, or a shape that all layers have is unknown."""
        if subject.load is None or not subject.n_expert_used or len(set(subject.shapes)) != 1:
            return None
        shape = subject.shapes[0]
        active = float(len(subject.layers) * subject.n_expert_used * shape.weights)
        rest = subject.rest or Rest(0, len(subject.layers), active)
        return cls(Setting(machine, rest, TYPICAL), vram, shape, shares_of(np.stack(subject.load)), subject.n_expert_used)

    def of_layers(self, name: str, kld: float | None, layers: tuple[LayerPlan, ...]) -> Rate:
        return self._of(name, kld, experts_of(layers, self.shape, self.shares, self.n_used, self.machine))

    def of_type(self, name: str, kld: float) -> Rate:
        return self._of(name, kld, uniform_experts(self.shape, name, self.shares, self.n_used, self.machine))

    def _of(self, name: str, kld: float | None, experts: Experts) -> Rate:
        speed = measure(experts, self.setting, self.vram)
        return Rate(name, kld, speed.decode, speed.stock_decode)


def _loads(c: Calibration) -> tuple[Floats, ...] | None:
    return tuple(layer.selections / max(int(layer.selections.sum()), 1) for layer in c.layers) if c.load_known else None


def _stored_layer(layer: TieredLayer) -> LayerPlan:
    groups = []
    for g in range(len(GROUPS)):
        matrix = next(m for m in layer.matrices if MATRICES[m] == g)
        groups.append(
            tuple(tuple(layer.locate(matrix, e, copy)[0].type for copy in range(1 + n)) for e, n in enumerate(layer.copies.tolist()))
        )
    return LayerPlan(layer.layer, groups[0], groups[1])


def _stored_shape(layer: TieredLayer) -> ExpertShape:
    n_ff, n_embd = layer.matrices["down"][0].ne[:2]
    return ExpertShape(layer.n_expert, n_embd, n_ff, "gate_up" in layer.matrices, gated=set(layer.matrices) != {"up", "down"})


def _check_same(name: str, layers: tuple[LayerPlan, ...], shapes: tuple[ExpertShape, ...], c: Calibration) -> None:
    stored = [(layer.layer, s.n_expert, s.n_embd, s.n_ff) for layer, s in zip(layers, shapes, strict=True)]
    found = [(layer.layer, layer.n_expert, c.n_embd, c.n_ff) for layer in c.layers]
    if stored != found:
        raise UserError(
            f"the calibration is of {c.model}, with {len(found)} layers of {found[0][1]} experts, and {name} has {len(stored)} of "
            f"{stored[0][1]}, or experts of another size; give the calibration that it was built with"
        )


def _layer(subject: Subject, i: int, kld: float | None) -> Layer:
    plan, shape, c = subject.layers[i], subject.shapes[i], subject.calibration
    counts = [Counter(t for row in group for t in row) for group in plan.groups]
    by_type: Counter[str] = Counter()
    for g, count in enumerate(counts):
        for t, n in count.items():
            by_type[t] += shape.stacked_bytes(g, t, n)
    load = None if subject.load is None else subject.load[i]
    served = np.array(plan.copies) if subject.dispatch == "balanced" else np.zeros(shape.n_expert, dtype=np.int64)
    wanda = None if c is None else c.layers[i].wanda
    return Layer(
        layer=plan.layer,
        share=None if load is None else tuple(load.tolist()),
        copies=plan.copies,
        gate_up=plan.gate_up,
        down=plan.down,
        lis_before=None if load is None else lis(load, shape.n_expert),
        lis_after=None if load is None else lis(split_load(load, served), shape.n_expert),
        importance=tuple((wanda / wanda.mean()).tolist()) if wanda is not None and wanda.any() else None,
        bytes=layer_bytes(shape, plan),
        bytes_by_type={t: by_type[t] for t in sorted(by_type, key=rank)},
        kld=kld,
    )


def _correlation(layers: tuple[Layer, ...]) -> float | None:
    """Spearman's rank correlation of importance and load, mean over the layers where both vary."""
    known = [(layer.share, layer.importance) for layer in layers if layer.share is not None and layer.importance is not None]
    found = [r for share, importance in known if math.isfinite(r := rank_correlation(share, importance))]
    return float(np.mean(found)) if found else None


def _coverage(subject: Subject) -> tuple[Cover, ...]:
    """For every k the busiest k experts of each layer, primaries only."""
    if subject.load is None:
        return ()
    most = max(shape.n_expert for shape in subject.shapes)
    sizes, caught = np.zeros(most + 1), np.zeros((len(subject.layers), most + 1))
    for i, (plan, shape, load) in enumerate(zip(subject.layers, subject.shapes, subject.load, strict=True)):
        order = np.argsort(-load, kind="stable")
        size = [sum(shape.expert_bytes(g, plan.groups[g][e][0]) for g in range(len(GROUPS))) for e in order.tolist()]
        sizes += np.pad(np.cumsum([0, *size]), (0, most - shape.n_expert), "edge")
        caught[i] = np.pad(np.cumsum([0, *load[order]]), (0, most - shape.n_expert), "edge")
    caught = np.minimum(caught, 1.0)
    return tuple(Cover(k, int(sizes[k]), float(caught[:, k].mean()), float(caught[:, k].min())) for k in range(1, most + 1))


def _known_types(subject: Subject, c: Calibration) -> tuple[str, ...]:
    """What alternatives may use: all that the calibration measured, or what the subject uses."""
    return tuple(sorted(c.types or subject.types, key=rank))


def _plan(subject: Subject, c: Calibration, types: tuple[str, ...], size: int, replicas: str | int) -> Plan | None:
    """The best plan within `size` bytes of experts; None where none fits."""
    try:
        return make_plan(
            c,
            budget=f"{size}b",
            types=types,
            replicas=replicas,
            policy="budget",
            other_bytes=0,
            calibration_sha256="",
            max_tiers=subject.max_tiers,
        )
    except UserError:
        return None


def _frontier(
    subject: Subject, c: Calibration, types: tuple[str, ...], step: Callable[[], None]
) -> list[tuple[Point, tuple[LayerPlan, ...]]]:
    """Best plans without copies at BUDGETS sizes, evenly spaced on a logarithmic scale from the smallest type's to the largest's."""
    shape = subject.shapes[0]
    sizes = [uniform_bytes(shape, len(c.layers), t) for t in types]
    found = []
    for size in np.unique(np.geomspace(min(sizes), max(sizes), BUDGETS).round().astype(np.int64)).tolist():
        plan = _plan(subject, c, types, size, 0)
        if plan is not None and plan.summary["predicted_kld"] is not None:
            bits = f"{plan.summary['bits_per_expert_weight']:.2f} bits"
            found.append((Point(bits, plan.expert_bytes, plan.summary["predicted_kld"]), plan.layers))
        step()
    return found


def _uniform(shape: ExpertShape, c: Calibration, types: tuple[str, ...]) -> tuple[Point, ...]:
    """All experts in one type, as llama-quantize makes them, for each of the types that the rows can hold."""
    types = tuple(t for t in types if all(shape.stored_type(g, t) == t for g in range(len(GROUPS))))
    if not types:
        return ()
    model, errors = error_model(c), measured_error(c, types).sum(axis=1)
    points = [Point(t, uniform_bytes(shape, len(c.layers), t), model.kld(errors[:, :, i])) for i, t in enumerate(types)]
    return tuple(sorted(points, key=lambda p: p.bytes))


def _choices(subject: Subject, c: Calibration, types: tuple[str, ...], report: Report) -> tuple[Choice | None, Choice | None]:
    """(without copies, with copies) in the bytes of this plan."""
    size = report.expert_bytes
    plain = _plan(subject, c, types, size, 0)
    if not c.load_known:
        return _choice(plain), None
    if report.n_copies and report.kld is not None and report.lis_after is not None and report.log_lis is not None:
        return _choice(plain), Choice(report.n_copies, report.kld, report.lis_after, report.log_lis)
    with_copies = _plan(subject, c, types, size, AUTO)
    if with_copies is None or not with_copies.summary["copies"]:
        with_copies = _plan(subject, c, types, size, 1)
    return _choice(plain), _choice(with_copies)


def _choice(plan: Plan | None) -> Choice | None:
    if plan is None or plan.summary["predicted_kld"] is None:
        return None
    after = [row["lis_after"] for row in plan.summary["layers"]]
    return Choice(plan.summary["copies"], plan.summary["predicted_kld"], plan.summary["lis_after"], float(np.log(after).mean()))
