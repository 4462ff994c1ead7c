"""The page: one HTML text with everything inside. Pure."""

import json
from html import escape

from rq_gguf import __version__
from rq_gguf.report.colours import palette
from rq_gguf.report.data import Report, to_json
from rq_gguf.report.figures import NARROW, WIDE, drawn
from rq_gguf.report.svg import inline
from rq_gguf.report.words import caption, kld_text, size_text, verdict

_TITLES = {
    "load": "Who is busy",
    "lis": "How even the load is",
    "importance": "Busy and important",
    "map": "What every expert got",
    "bytes": "Where the bytes are",
    "frontier": "Error against bytes",
    "speed": "Error against speed",
    "coverage": "What fast memory catches",
}

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:800px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 4px}
p{margin:0 0 8px}
.quiet{color:var(--muted);font-size:.92rem;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin:24px 0}
.facts div{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}
.facts dt{color:var(--muted);font-size:.85rem}
.facts dd{margin:0;font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums}
.verdict{border-left:4px solid var(--accent);padding:2px 0 2px 16px;margin:20px 0}
figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;margin:20px 0;padding:18px 18px 12px;position:relative}
figcaption{margin-bottom:10px}
svg{display:block;width:100%;height:auto}
.narrow{display:none}
#tip{position:fixed;z-index:1;pointer-events:none;background:var(--ink);color:var(--paper);border-radius:6px;padding:4px 8px;
font-size:.85rem;max-width:260px;visibility:hidden}
details{margin:20px 0}
summary{cursor:pointer;font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{padding:3px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--muted);font-weight:500}
td.words,th.words{text-align:left}
footer{color:var(--muted);font-size:.85rem;margin-top:32px}
@media(max-width:560px){.facts{grid-template-columns:repeat(2,1fr)}
main{padding:20px 12px 32px}figure{padding:14px 8px 8px}figcaption{padding:0 6px}
.wide{display:none}.narrow{display:block}}
@media print{body{background:#fff}figure,.verdict{break-inside:avoid}}
"""

_SCRIPT = """
const r = JSON.parse(document.getElementById("figures").textContent), tip = document.getElementById("tip");
const say = {
  load: (l, e) => `${(l.share[e] * l.share.length).toFixed(2)} x the mean load, ${(100 * l.share[e]).toFixed(1)} % of selections`,
  map: (l, e) => `gate and up ${l.gate_up[e].join(" + ")}, down ${l.down[e].join(" + ")}`,
};
for (const svg of document.querySelectorAll("svg[data-grid]")) {
  const [x, y, w, h, columns, rows] = svg.dataset.grid.split(" ").map(Number), name = svg.closest("figure").id;
  svg.addEventListener("pointermove", ev => {
    const p = new DOMPoint(ev.clientX, ev.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const e = Math.floor((p.x - x) / w), row = Math.floor((p.y - y) / h), layer = r.layers[row];
    const inside = e >= 0 && row >= 0 && row < rows && e < layer.copies.length;
    tip.style.visibility = inside ? "visible" : "hidden";
    if (!inside) return;
    tip.textContent = `layer ${layer.layer}, expert ${e}: ${say[name](layer, e)}`;
    tip.style.left = Math.min(ev.clientX + 14, innerWidth - tip.offsetWidth - 6) + "px";
    tip.style.top = (ev.clientY + 18 + tip.offsetHeight > innerHeight ? ev.clientY - tip.offsetHeight - 10 : ev.clientY + 18) + "px";
  });
  svg.addEventListener("pointerleave", () => tip.style.visibility = "hidden");
}
"""


def page(r: Report) -> str:
    """The whole page."""
    data = json.dumps(to_json(r), ensure_ascii=False).replace("<", "\\u003c")
    body = [
        f"<h1>{escape(r.model)}</h1>",
        f'<p class="quiet">{escape(_subtitle(r))}</p>',
        _facts(r),
        *(f'<section class="verdict"><h2>{escape(v.heading)}</h2>{_paragraphs(v.sentences)}</section>' for v in verdict(r)),
        *(f'<p class="quiet">Note: {escape(note)}</p>' for note in r.notes),
        *(_figure(r, name) for name in drawn(r)),
        _table(r),
        f"<footer>rq-gguf {escape(__version__)}. Load is that of the calibration text; KL divergences are predicted for the experts "
        "alone, in nats per token. How to read the figures: docs/report.md.</footer>",
    ]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(r.model)}: experts</title>\n<style>\n{_colours(len(r.types))}{_STYLE}</style>\n</head>\n<body>\n<main>",
        *body,
        f'</main>\n<div id="tip" role="status"></div>\n<script type="application/json" id="figures">{data}</script>',
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _colours(n_types: int) -> str:
    light, dark = (";".join(f"--{name}:{value}" for name, value in palette(n_types, dark=is_dark).items()) for is_dark in (False, True))
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _subtitle(r: Report) -> str:
    used = f", {r.n_expert_used} used per token" if r.n_expert_used else ""
    parts = [
        r.name if r.written else f"a plan for {r.name}",
        f"{len(r.layers)} layers of {r.n_expert} experts{used}",
        f"budget {r.budget}" if r.budget else "",
        f"calibrated on {r.tokens:,} tokens" if r.tokens else "",
    ]
    return " · ".join(part for part in parts if part)


def _facts(r: Report) -> str:
    facts = [] if r.file_bytes is None else [("file", size_text(r.file_bytes))]
    facts += [("experts", size_text(r.expert_bytes)), ("bits per expert weight", f"{r.bits_per_weight:.2f}"), ("copies", f"{r.n_copies:,}")]
    if r.lis_before is not None and r.lis_after is not None:
        facts.append(("load imbalance (LIS)", f"{r.lis_before:.2f}" + (f" → {r.lis_after:.2f}" if r.n_copies else "")))
    if r.kld is not None:
        facts.append(("predicted KL divergence", kld_text(r.kld)))
    return '<dl class="facts">' + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts) + "</dl>"


def _paragraphs(sentences: tuple[str, ...]) -> str:
    return "".join(f"<p>{escape(s)}</p>" for s in sentences)


def _figure(r: Report, name: str) -> str:
    draw = drawn(r)[name]
    head = f"<figcaption><h2>{escape(_TITLES[name])}</h2><p class=quiet>{escape(caption(r, name))}</p></figcaption>"
    return f'<figure id="{name}">{head}\n{inline(draw(r, WIDE), "wide")}{inline(draw(r, NARROW), "narrow")}</figure>'


def _table(r: Report) -> str:
    """The layers' figures, for those who want numbers."""
    head = ("layer", "experts", "copies", "LIS before", "after", "bytes", "KLD", "types")
    rows = []
    for x in r.layers:
        numbers = [
            str(x.layer),
            str(len(x.copies)),
            str(sum(x.copies)),
            *("-" if v is None else f"{v:.2f}" for v in (x.lis_before, x.lis_after)),
            f"{x.bytes:,}",
            "-" if x.kld is None else kld_text(x.kld),
        ]
        cells = "".join(f"<td>{v}</td>" for v in numbers)
        types = ", ".join(f"{t} {size_text(n)}" for t, n in x.bytes_by_type.items())
        rows.append(f'<tr>{cells}<td class="words">{escape(types)}</td></tr>')
    titles = "".join(f'<th scope="col"{" class=words" if t == "types" else ""}>{t}</th>' for t in head)
    return (
        f'<details><summary>All layers in numbers</summary><div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div></details>"
    )
