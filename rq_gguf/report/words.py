"""What the figures come to, in sentences. Pure."""

import math
from dataclasses import dataclass

from rq_gguf.defaults import BALANCE_WEIGHT
from rq_gguf.planning.allocate import KLD_FLOOR
from rq_gguf.report.data import Report, covered

_FLAT = 1.15  # LIS below which there is nothing to even out
_SAME_SIZE = 1.005  # a plan for one type's bytes may leave a few of them
_WORTH = 0.9  # share of one type's KLD below which mixing types is said to pay


@dataclass(frozen=True)
class Verdict:
    """A heading of a few words, and the sentences behind it."""

    heading: str
    sentences: tuple[str, ...]


def size_text(n: float) -> str:
    """Bytes for people, in powers of 1000."""
    unit = next((u for u in ("TB", "GB", "MB", "kB") if n >= 1000 ** _POWER[u]), "B")
    return f"{n:.0f} B" if unit == "B" else f"{n / 1000 ** _POWER[unit]:.3g} {unit}" if n < 1e15 else f"{n / 1e12:,.0f} TB"


_POWER = {"TB": 4, "GB": 3, "MB": 2, "kB": 1}


def kld_text(value: float) -> str:
    """Nats in two digits, without an exponent where that is readable."""
    return f"{value:.2g}" if value < 1e-5 else f"{float(f'{value:.2g}'):.7f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.095 or share == 0 else f"{100 * share:.1f} %"


def verdict(r: Report) -> tuple[Verdict, ...]:
    """On copies, on types, on memory: each where it is known."""
    return tuple(v for v in (_copies(r), _types(r), _memory(r)) if v is not None)


def copies_pay(r: Report) -> bool | None:
    """Whether copies are worth their bytes, by the exchange rate of planning (allocate.Goal): per cents of KLD + 0.001 for a per cent of
    LIS. None where that is unknown."""
    if r.plain is None or r.balanced is None or not r.balanced.copies:
        return None
    cost = math.log((r.balanced.kld + KLD_FLOOR) / (r.plain.kld + KLD_FLOOR))
    # Planning sees the tangent of the curve; plans that it makes at the margin must not be called worthless for a rounding.
    return cost <= BALANCE_WEIGHT * (r.plain.log_lis - r.balanced.log_lis) + 1e-3


def _copies(r: Report) -> Verdict:
    if r.lis_before is None or r.lis_after is None:
        return Verdict(
            "Whether copies help is unknown",
            ("Nothing says how often each expert is picked. Calibrate on text (rq-gguf calibrate) to learn it.",),
        )
    pays = copies_pay(r)
    devices = _devices(r)
    if pays is None:
        effect = (
            f"{r.n_copies} copies bring the load imbalance from {r.lis_before:.2f} to {r.lis_after:.2f}"
            if r.n_copies
            else f"There are no copies; the load imbalance is {r.lis_before:.2f}"
        )
        why = "Whether they are worth their bytes takes the calibration (--calibration)." if r.kld is None else _NO_ROOM
        heading = "Copies, and what they do" if r.n_copies else "No copies"
        return Verdict(heading, (f"{effect} (mean over layers, 1 is even).", why, devices))
    assert r.plain is not None and r.balanced is not None  # copies_pay
    b = r.balanced
    whose = "The" if r.n_copies else "If there were"
    verb = "bring" if r.n_copies else "they would bring"
    comma = "" if r.n_copies else ","
    effect = (
        f"{whose} {b.copies} copies{comma} {verb} the load imbalance from {r.lis_before:.2f} to {b.lis:.2f} (mean over layers, 1 is even). "
        f"In the same bytes without them, the predicted KL divergence is {kld_text(r.plain.kld)} instead of {kld_text(b.kld)} nats"
        f"{_relative(b.kld, r.plain.kld)}."
    )
    if r.lis_before < _FLAT:
        return Verdict("Copies are not worth their bytes on this model", ("Its experts are about equally busy already.", effect))
    if pays:
        heading = "Copies help here"
        why = (
            f"Nobody can tell a difference below {KLD_FLOOR:g} nats."
            if b.kld - r.plain.kld < KLD_FLOOR
            else f"That is within the exchange rate of {BALANCE_WEIGHT:g} % of KL divergence for 1 % of imbalance."
        )
    else:
        heading = "Copies are not worth their bytes on this model" if r.n_copies == 0 else "These copies cost more than they bring"
        why = (
            f"That is more than {BALANCE_WEIGHT:g} % of KL divergence for 1 % of imbalance, the exchange rate of planning: "
            "at this size the bytes are better spent on more precise types. A larger budget can change that."
        )
    return Verdict(heading, (effect, why, devices))


_NO_ROOM = "In so few bytes no plan with copies can be compared."


def _relative(with_copies: float, without: float) -> str:
    change = with_copies / without - 1 if without > 0 else 0.0
    if abs(change) < 0.005:
        return ", the same within half a per cent"
    return f": the copies cost {percent(change)} more" if change > 0 else f": {percent(-change)} less with the copies"


def _devices(r: Report) -> str:
    """From how many devices on one expert alone is more than a device's share: LIS > experts / devices."""
    worst = max((layer for layer in r.layers if layer.lis_before is not None), key=lambda layer: layer.lis_before or 0)
    n = math.floor(len(worst.copies) / (worst.lis_before or 1)) + 1
    text = f"In layer {worst.layer} the busiest expert has {worst.lis_before:.1f} times the mean load"
    spread = f": spread over {n} devices or more, it alone is more than a device's share" if n <= len(worst.copies) else ""
    return text + spread + ". On one device copies even out the load and make nothing faster."


def _types(r: Report) -> Verdict | None:
    fitting = [p for p in r.uniform if p.bytes <= r.expert_bytes * _SAME_SIZE]
    if r.kld is None or not fitting:
        return None
    best = min(fitting, key=lambda p: p.kld)
    if best.kld == 0:  # the type that the weights came in
        text = f"All experts in {best.name} take {size_text(best.bytes)} and lose nothing, as the calibration measured it."
        return Verdict("One type is exact here", (text,))
    ratio = r.kld / best.kld
    text = (
        f"The experts take {size_text(r.expert_bytes)}, {r.bits_per_weight:.2f} bits per weight; their predicted KL divergence is "
        f"{kld_text(r.kld)} nats, {ratio:.2f} times that of all experts in {best.name} ({kld_text(best.kld)} in {size_text(best.bytes)})."
    )
    if ratio < _WORTH:
        return Verdict("A type per expert pays", (text,))
    if r.n_copies and r.plain is not None:
        heading = "The copies take what a type per expert gains" if r.plain.kld < _WORTH * best.kld else "The copies are paid in precision"
        return Verdict(heading, (text, f"Without copies it would be {r.plain.kld / best.kld:.2f} times."))
    return Verdict("A type per expert gains little here", (text,))


def _memory(r: Report) -> Verdict | None:
    if not r.coverage:
        return None
    quarter = max(1, round(r.n_expert / 4))
    c = r.coverage[quarter - 1]
    text = (
        f"The busiest {quarter} of {r.n_expert} experts of each layer ({size_text(c.bytes)}) catch {percent(c.mean)} of the selections"
        + (f", {percent(c.worst)} in the worst layer" if len(r.layers) > 1 else "")
        + f"; picked evenly they would catch {percent(quarter / r.n_expert)}."
    )
    if r.vram is None:
        return Verdict("What fast memory catches", (text,))
    fit = covered(r, r.vram)
    if fit is None:
        least = r.coverage[0].bytes
        return Verdict("What fast memory catches", (f"{size_text(r.vram)} hold not even one expert per layer ({size_text(least)}).", text))
    return Verdict(
        f"{size_text(r.vram)} catch {percent(fit.mean)} of the selections",
        (f"They hold the busiest {fit.experts} of {r.n_expert} experts of each layer ({size_text(fit.bytes)}).",)
        + _speed(r)
        + ((text,) if fit.experts != quarter else ()),
    )


def _speed(r: Report) -> tuple[str, ...]:
    if r.rate is None or r.machine is None or r.vram is None:
        return ()
    return (
        f"On the machine {r.machine} one sequence decodes at {r.rate.decode:.3g} tokens per second, {r.rate.decode / r.rate.stock:.2f} "
        "times stock's layout of the same VRAM (whole layers), both predicted.",
    )


def caption(r: Report, figure: str) -> str:
    """How to read a figure, and what it shows here, in one or two sentences."""
    match figure:
        case "load":
            top = max((max(x.share) * len(x.share), x.layer, x.share.index(max(x.share))) for x in r.layers if x.share)
            return (
                "How often the router picks each expert, over the mean of its layer, on the calibration text. "
                f"The busiest is expert {top[2]} of layer {top[1]}: {top[0]:.1f} times the mean."
            )
        case "lis":
            tail = f" The mean goes from {r.lis_before:.2f} to {r.lis_after:.2f}." if r.n_copies else ""
            return f"Load of a layer's busiest instance over the mean load of an expert; 1 is even.{tail}"
        case "importance":
            rho = r.importance_rank_correlation
            how = "" if rho is None else f" Rank correlation {rho:.2f}: " + (
                "the busy experts are the important ones."
                if rho > 0.5
                else "the busy experts are the unimportant ones."
                if rho < -0.5
                else "being busy says little about being important."
            )  # fmt: skip
            return f"Each dot an expert: its Wanda score and its load, both over the mean of its layer.{how}"
        case "map":
            return (
                "The type of each expert's gate and up (upper half of a cell) and down (lower half), its primary's. A dot marks experts "
                f"with copies, which are {sum(n > 0 for x in r.layers for n in x.copies)} of {sum(len(x.copies) for x in r.layers)}."
            )
        case "bytes":
            most = max(r.bytes_by_type.items(), key=lambda item: item[1])
            share = percent(most[1] / r.expert_bytes)
            return f"What the experts of each layer take, copies included. {share} of all expert bytes are {most[0]}."
        case "frontier":
            return (
                "Predicted KL divergence from the unquantized model over the bytes of all experts: the line is the best without copies, "
                f"squares are all experts in one type, the diamond is this {'file' if r.written else 'plan'}."
            )
        case "speed":
            return (
                f"Predicted KL divergence over predicted tokens per second of one sequence, with {size_text(r.vram or 0)} of VRAM for "
                f"experts on the machine {r.machine}: right and down is better. The dashed line is stock's layout, whole layers in VRAM."
            )
        case "coverage":
            return (
                "Share of selections that the busiest experts of each layer catch when they lie in fast memory, over the bytes that they "
                "take. Text of another kind catches less."
            )
    raise KeyError(figure)
