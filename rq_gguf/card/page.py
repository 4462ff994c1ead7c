"""A card as markdown: pure, from card.facts. The head is the hub's (https://huggingface.co/docs/hub/model-cards)."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

import rq_gguf
from rq_gguf.bench.spread import Spread
from rq_gguf.bench.table import figures, table
from rq_gguf.card.facts import Described, Facts, Measured, Speeds
from rq_gguf.card.naming import short_bpw, split_name
from rq_gguf.evaluation.quality import N_CTX, Figure
from rq_gguf.format import GROUPS
from rq_gguf.runtime.fetch import COMMIT, PACKAGE, VERSION

TAGS = ("gguf", "moe", "mixture-of-experts", "llama.cpp", "replicate-and-quantize", "rq-gguf")
PAPER = "https://arxiv.org/abs/2602.19938"
INSTALL = "pip install rq-gguf"
REPOSITORY = "OWNER/REPOSITORY"
"""Stands for the place where the files will be."""


def card(f: Facts, install: str = INSTALL, repository: str = REPOSITORY) -> str:
    """The whole README.md. install: the command that gets rq-gguf. repository: hub id of the place where the files will be."""
    parts = [
        _head(f),
        f"# {f.title}-RQ",
        _opening(f),
        _files(f),
        _run(f, install, repository),
        _quality(f),
        _speed(f),
        _made(f),
        *(_recipe(d, alone=len(f.files) == 1) for d in f.files),
        f"Made with rq-gguf {rq_gguf.__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_card(text: str) -> bool:
    """Whether a README.md is one of these."""
    return text.startswith("---\n") and "\nMade with rq-gguf " in text


def upload_commands(f: Facts, readme: Path | None, repository: str = REPOSITORY) -> list[str]:
    """The commands that publish it all under its names."""
    pairs = [(readme, "README.md")] if readme is not None else []
    for d in f.files:
        names = [d.name] if len(d.paths) == 1 else [split_name(d.name, i, len(d.paths)) for i in range(len(d.paths))]
        pairs += zip(d.paths, names, strict=True)
        folder = "" if len(f.files) == 1 else d.name.removesuffix(".gguf") + "/"
        pairs += [(path, folder + path.name) for path in (d.plan, d.calibration) if path is not None]
    return [shlex.join(["hf", "upload", repository, str(path), name]) for path, name in pairs]


def _head(f: Facts) -> str:
    languages, tags = (f.values.get(f"general.{key}") for key in ("languages", "tags"))
    data = {
        "license": f.license,
        "license_name": f.values.get("general.license.name"),
        "license_link": f.values.get("general.license.link"),
        "base_model": f.base_model,
        "base_model_relation": "quantized" if f.base_model else None,
        "language": list(languages) if isinstance(languages, list) else None,
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, *(t for t in (tags if isinstance(tags, list) else ()) if t not in TAGS)],
        "quantized_by": f.quantized_by,
    }
    text = yaml.safe_dump({key: value for key, value in data.items() if value}, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _opening(f: Facts) -> str:
    model = f"[{f.base_model}](https://huggingface.co/{f.base_model})" if f.base_model else f.title
    copies = sum(sum(layer.copies) for d in f.files for layer in d.inspection.layers)
    what = "copies of its busiest experts, and a quantization type for each expert" if copies else "a quantization type for each expert"
    return (
        f"{model} for [llama.cpp](https://github.com/ggml-org/llama.cpp), with {what}, chosen by measured error under one byte budget "
        f"(Replicate-and-Quantize, [arXiv 2602.19938]({PAPER})). **It needs a patched llama.cpp**, which two commands below build; "
        "a stock one refuses these files with `error loading model: ... not found`."
    )


#
# files
#


def _files(f: Facts) -> str:
    by_name = {m.name: m for m in f.measured if m.own and m.quality}
    speed = _speed_columns(f)
    header = ["file", "size", "bits per weight", "of experts", "copies"]
    header += ["mean KLD", "Same top p"] if by_name else []
    header += [f"{test}, t/s" for test in speed]
    rows = []
    for d in f.files:
        row = [f"`{d.name}`", _size(d.size.file_bytes), short_bpw(d.size.bpw), short_bpw(d.inspection.expert_bpw)]
        row.append(str(sum(sum(layer.copies) for layer in d.inspection.layers)))
        if by_name:
            m = by_name.get(d.name)
            row += ["-", "-"] if m is None else [_text(m.quality["Mean KLD"], 5), _text(m.quality["Same top p"], 2) + " %"]
        row += [speed[test].get(d.name, "-") for test in speed]
        rows.append(row)
    return "\n".join(["## Files", *table(header, rows)])


def _speed_columns(f: Facts) -> dict[str, dict[str, str]]:
    """test -> file's name -> speed, of the first bench: figures of two machines do not belong in one table."""
    if not f.speeds:
        return {}
    columns: dict[str, dict[str, str]] = {}
    for s in f.speeds[0].files:
        for test, (speed, _) in s.tests.items() if s.own else ():
            if test.startswith(("pp", "tg")):
                columns.setdefault(test, {}).setdefault(s.name, figures(speed.median))
    return columns


def _size(n: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n / 1e3:.1f} kB"


def _text(figure: Figure, digits: int, sign: str = "") -> str:
    return f"{figure.value:{sign}.{digits}f}" + ("" if figure.error is None else f" ± {figure.error:.{digits}f}")


#
# running
#


def _run(f: Facts, install: str, repository: str) -> str:
    name = f.files[0].name
    files = name if len(f.files[0].paths) == 1 else f"--include '{_stem(name)}-*'"
    return f"""## Run it
Get the patched llama.cpp: ggml-org/llama.cpp {COMMIT} (the one in {PACKAGE} {VERSION}) with rq-gguf's patches, built on your \
machine (`--backend cuda` or `metal` for a GPU).

```
{install}
rq-gguf runtime install
```

Then

```
hf download {repository} {files} --local-dir .
"$(rq-gguf runtime path llama-cli)" -m {name}
"$(rq-gguf runtime path llama-server)" -m {name} --port 8080
```"""


#
# figures
#


def _stem(first: str) -> str:
    """Of the first file's name of a model in several."""
    return first[: -len("-00001-of-00002.gguf")]


def _quality(f: Facts) -> str:
    measured = [m for m in f.measured if m.quality]
    lines: list[str] = []
    for texts, chunks in dict.fromkeys((m.texts, m.chunks) for m in measured):
        same = [m for m in measured if (m.texts, m.chunks) == (texts, chunks)]
        rows = [
            [
                _name(m.name, m.own),
                _size(m.file_bytes),
                *(_text(m.quality[label], digits) for label, digits in (("Mean PPL(Q)", 3), ("Mean KLD", 5), ("99.9% KLD", 4))),
                _text(m.quality["Same top p"], 2) + " %",
                "-" if m.lis is None else f"{m.lis[0]:.2f}" + (f" → {m.lis[1]:.2f}" if m.lis[0] != m.lis[1] else ""),
            ]
            for m in same
        ]
        lines += table(["file", "size", "PPL", "mean KLD", "99.9 % KLD", "Same top p", "LIS"], rows)
        lines += [
            "",
            f"{chunks} chunks of {N_CTX} tokens of {', '.join(texts)}; divergence in nats from {same[0].base} "
            f"(PPL {_text(same[0].quality['Mean PPL(base)'], 3)}), ± standard error. LIS: the busiest expert's load over the mean load, "
            "mean over layers, without → with copies; 1 is even.",
            "",
        ]
    tasks = [(m, t) for m in f.measured for t in m.tasks]
    if tasks:
        rows = [
            [_name(m.name, m.own), t.task, t.metric, f"{t.items:,}", _text(t.base, 2), _text(t.out, 2), _text(t.difference, 2, "+")]
            for m, t in tasks
        ]
        lines += table(["file", "task", "metric", "items", "base", "file", "difference"], rows, words=3)
        lines += ["", "Accuracy in points; the difference is paired over items.", ""]
    if not lines:
        return ""
    return "\n".join(["## Quality", *lines, *_not_ours(f.measured)]).rstrip()


def _name(name: str, own: bool) -> str:
    return f"`{name}`" if own else name


def _not_ours(entries: Sequence[Measured]) -> list[str]:
    return ["Files whose names are not in `code` were measured for comparison and are not published here."] if any(
        not m.own for m in entries
    ) else []  # fmt: skip


def _speed(f: Facts) -> str:
    parts = []
    for bench in f.speeds:
        first = bench.files[0].name
        rows = [
            [test, _name(s.name, s.own), *_speed_cells(speed, None if s.name == first else ratio)]
            for test in dict.fromkeys(t for s in bench.files for t in s.tests)
            for s in bench.files
            if test in s.tests
            for speed, ratio in [s.tests[test]]
        ]
        parts += ["\n".join(table(["test", "file", "t/s", "quartiles", "ratio"], rows, words=2)), _bench_notes(bench, first)]
    return "## Speed\n" + "\n\n".join(parts) if parts else ""


def _speed_cells(speed: Spread, ratio: Spread | None) -> tuple[str, str, str]:
    against = "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return figures(speed.median), f"{figures(speed.low)} to {figures(speed.high)}", against


def _bench_notes(bench: Speeds, first: str) -> str:
    how = f" with `{bench.settings}`" if bench.settings else ""
    text = f"; the text tests read and continue {bench.text}, the others run random tokens" if bench.text else "; on random tokens"
    rounds = f"{bench.rounds} round{'' if bench.rounds == 1 else 's'}"
    return f"{bench.machine}{how}. Tokens per second, medians over {rounds} in random order{text}. Ratios: to {first} in the same round."


#
# how it was made
#


def _made(f: Facts) -> str:
    lines = ["## How it was made"]
    for d in f.files:
        c = d.calibrated
        tokens = f"on {c.tokens:,} tokens" if c.tokens else "on text"
        what = f" of {c.text}" if c.text else ""
        sha256 = f" (calibration file: sha256 `{c.sha256}`)" if c.sha256 else ""
        lines += [f"`{d.name}`: calibrated {tokens}{what}{sha256}.", "", "```", d.command, "```", ""]
    if any(d.plan for d in f.files):
        lines += ["`--plan plan.json` instead of the options gives the same file again.", ""]
    if f.commands:
        lines += ["The figures above:", "", "```", *f.commands, "```"]
    return "\n".join(lines).rstrip()


def _recipe(d: Described, alone: bool) -> str:
    """Which types every layer's experts have, and copies, in a fold."""
    i = d.inspection
    rows = []
    for layer in i.layers:
        tiers = (", ".join(f"{n} {t}" for t, n in layer.tiers[g]) for g in GROUPS)
        balance = "-" if layer.lis_before is None or layer.lis_after is None else f"{layer.lis_before:.2f} → {layer.lis_after:.2f}"
        rows.append([str(layer.layer), *tiers, str(sum(layer.copies)), _size(layer.bytes), balance])
    types = ", ".join(f"{t} {_size(n)}" for t, n in i.bytes_by_type.items())
    return "\n".join([
        "<details>",
        f"<summary>Recipe{'' if alone else f' of {d.name}'}: types and copies in each layer</summary>",
        "",
        *table(["layer", "gate and up", "down", "copies", "size", "LIS when calibrated"], rows, words=3),
        "",
        f"Experts by type: {types}; in all {_size(i.expert_bytes)}, {i.expert_bpw:.2f} bits per weight of the model. Everything else: "
        f"{i.provenance.get('rq.other', 'see the file')}. Dispatch: {i.dispatch}, in blocks of {i.dispatch_block} tokens.",
        "",
        "</details>",
    ])  # fmt: skip
