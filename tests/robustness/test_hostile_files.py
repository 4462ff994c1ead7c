"""Files from strangers on the Python side: whatever a GGUF or a plan.json holds, reading it ends in an answer or in one sentence, in little
memory and time."""

import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import synthetic_calibration
from writing.samples import base_model
from writing.test_inspect import tiered

from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.build import plan_calibration
from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.choices import check_choices
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, Value
from rq_gguf.planning.file import read_plan
from rq_gguf.types import TYPES
from rq_gguf.writing.inspect import describe, inspect, to_json
from rq_gguf.writing.source import Source

MEMORY = 64 << 20
"""More than any of the files here can need."""
SECONDS = 60

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def bounded() -> Iterator[None]:
    """Little memory and time: MemoryError and TimeoutError where a reader wants more."""

    def late(*_: object) -> None:
        raise TimeoutError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def answered(read: Callable[[], object]) -> object:
    """What a reader gives, or its UserError as text: one line that names the file. Nothing else may come out of it."""
    with bounded():
        try:
            return read()
        except UserError as e:
            text = str(e)
            assert text and "\n" not in text
            return text


def shown(path: Path) -> str:
    """All of `rq-gguf inspect`, with and without --json."""
    found = inspect(path)
    json.loads(json.dumps(to_json(found)), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return describe(found)


def opened(path: Path) -> None:
    with Source(path) as source:
        source.fingerprint()
        assert source.shape.layers


NUMBERS = st.one_of(
    st.integers(0, 300), st.sampled_from([2**k + d for k in (8, 16, 31, 32, 40, 48, 62, 63) for d in (-1, 0, 1)]), st.integers(0, 2**64 - 1)
)


def number_value(kind: int, n: int) -> Value:
    return Value(kind, struct.pack("<Q", n)[: struct.calcsize("<" + gg._SCALARS[kind])])


VALUES: st.SearchStrategy[Value] = st.one_of(
    st.builds(number_value, st.sampled_from(sorted(gg._SCALARS)), NUMBERS),
    st.builds(gg.string, st.text(max_size=12)),
    st.builds(gg.strings, st.lists(st.text(max_size=4), max_size=4)),
    st.builds(
        lambda kind, raw: Value(GGUFValueType.ARRAY, struct.pack("<IQ", kind, len(raw) // 8) + raw[: len(raw) // 8 * 8]),
        st.sampled_from([GGUFValueType.UINT64, GGUFValueType.FLOAT64, GGUFValueType.INT64]),
        st.binary(max_size=64),
    ),
    st.builds(
        lambda kind, n, raw: Value(GGUFValueType.ARRAY, struct.pack("<IQ", kind, n) + raw),
        st.integers(0, 14), NUMBERS, st.binary(max_size=64),
    ),
)  # fmt: skip
KEYS = [
    "general.architecture", "general.alignment", "split.count", "split.no", "llama.expert_count", "llama.block_count",
    "llama.expert_used_count", fmt.KEY_FORMAT_VERSION, fmt.KEY_DISPATCH, fmt.KEY_DISPATCH_BLOCK, fmt.KEY_BUDGET_BYTES, fmt.KEY_POLICY,
    fmt.KEY_REPLICAS, fmt.KEY_LOAD.format(layer=0), "rq.something",
]  # fmt: skip
NAMES = [
    "blk.0.ffn_gate_inp.weight", "blk.0.ffn_log2phy", "blk.7.ffn_log2phy", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.2.weight",
    "blk.0.ffn_gate_up_exps.0.weight", "blk.0.ffn_down_exps.0.weight", "blk.99999999999999999999.ffn_down_exps.0.weight",
    "blk.4294967295.ffn_down_exps.weight", "blk.0.ffn_down_exps.999999999999.weight", "blk.0.ffn_up_exps.bias", "x",
]  # fmt: skip


def rebuilt(path: Path, out: Path, values: dict[str, Value], changes: list[tuple[int, str, Any]], map_cells: list[tuple[int, int]]) -> Path:
    """A GGUF with other values, and tensors changed: (which, name|type|ne|drop, to what). The data keeps its order, and its size fits."""
    header = gg.read_header(path)
    raw = path.read_bytes()
    data = {name: raw[t.offset : t.offset + t.n_bytes] for name, t in header.tensors.items()}
    entries = [(t, data[name]) for name, t in header.tensors.items()]
    for which, what, to in changes:
        i = which % len(entries) if entries else 0
        if not entries:
            break
        t, content = entries[i]
        if what == "drop":
            del entries[i]
        else:
            entries[i] = (replace(t, **{what: to}), content)
    parts, infos, offset = [], [], 0
    for t, content in entries:
        try:
            size = t.n_bytes
        except UserError:
            size = len(content)
        size = size if 0 <= size <= 1 << 22 else len(content)
        content = content[:size].ljust(size, b"\0")
        if t.type == "i32":
            cells = np.frombuffer(content, "<i4").copy()
            for at, value in map_cells if cells.size else ():
                cells[at % cells.size] = value
            content = cells.tobytes()
        name = t.name.encode()
        infos.append(struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(t.ne)}QIQ", len(t.ne), *t.ne, gg.number(t.type), offset))
        parts.append(content.ljust(gg.pad(size), b"\0"))
        offset += gg.pad(size)
    all_values = header.values | values
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(all_values))
    head += b"".join(struct.pack("<Q", len(k.encode())) + k.encode() + struct.pack("<I", v.type) + v.raw for k, v in all_values.items())
    head += b"".join(infos)
    out.write_bytes(head.ljust(gg.pad(len(head)), b"\0") + b"".join(parts))
    return out


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 20), st.just("name"), st.sampled_from(NAMES)),
        st.tuples(st.integers(0, 20), st.just("type"), st.sampled_from(["f32", "f16", "i32", "i8", "q8_0", "q4_k", "iq1_s", "f64"])),
        st.tuples(st.integers(0, 20), st.just("ne"), st.lists(NUMBERS, min_size=1, max_size=4).map(tuple)),
        st.tuples(st.integers(0, 20), st.just("ne"), st.tuples(*[st.sampled_from([0, 1, 2, 3, 256, 2**40])] * 3)),
        st.tuples(st.integers(0, 20), st.just("drop"), st.none()),
    ),
    max_size=3,
)  # fmt: skip
CELLS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 2**31 - 1])), max_size=3)
HEADERS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)


@pytest.fixture(scope="module")
def good_tiered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiered(tmp_path_factory.mktemp("t") / "tiered.gguf")
    assert "valid" in shown(path)
    return path


@fuzzed
@given(values=HEADERS, changes=CHANGES, cells=CELLS)
def test_inspect_of_changed_tiered_files(
    good_tiered: Path, tmp_path: Path, values: dict[str, Value], changes: list[tuple[int, str, Any]], cells: list[tuple[int, int]]
) -> None:
    path = rebuilt(good_tiered, tmp_path / "changed.gguf", values, changes, cells)
    answered(lambda: shown(path))


@fuzzed
@given(values=HEADERS, changes=CHANGES)
def test_sources_of_changed_stock_files(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Value], changes: list[tuple[int, str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("s")
    path = rebuilt(base_model(folder / "base.gguf", n_expert=3), folder / "changed.gguf", values, changes, [])
    answered(lambda: opened(path))


@fuzzed
@given(at=st.integers(0, 3000), data=st.binary(min_size=1, max_size=9), length=st.integers(0, 3000) | st.none())
def test_overwritten_bytes(good_tiered: Path, tmp_path: Path, at: int, data: bytes, length: int | None) -> None:
    """Anywhere in the header, with the file cut or not."""
    whole = bytearray(good_tiered.read_bytes())
    whole[at : at + len(data)] = data
    path = tmp_path / "overwritten.gguf"
    path.write_bytes(whole[:length])
    for read in (shown, opened, read_any):
        answered(lambda read=read: read(path))


@pytest.mark.parametrize("depth", [2, 2000, 100_000])
def test_nested_arrays(tmp_path: Path, depth: int) -> None:
    raw = struct.pack("<IQ", GGUFValueType.ARRAY, 1) * depth + struct.pack("<IQ", GGUFValueType.UINT8, 0)
    header, _ = gg.build_header({"a": Value(GGUFValueType.ARRAY, raw)}, [])
    (tmp_path / "nested.gguf").write_bytes(header)
    assert isinstance(answered(lambda: shown(tmp_path / "nested.gguf")), str)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "calibration.gguf"
    write_calibration(path, synthetic_calibration(n_layers=2, n_expert=3, n_embd=32, n_ff=32, types=("q4_0", "q8_0")))
    return path


DOUBLES = st.sampled_from([0.0, 1.0, 5e-324, 1e-30, 1e30, 1.7e308, float("inf"), float("nan"), -1.0])
WHOLE = st.sampled_from([0, 1, -1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63)])


@fuzzed
@given(
    changes=CHANGES,
    cells=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), DOUBLES, WHOLE), max_size=4),
    numbers=st.dictionaries(
        st.sampled_from(
            ["version", "n_tokens", "n_expert_used", "n_embd", "n_ff", "types", "layers", "merged_gate_up", "response_type", "model"]
        ),
        VALUES,
        max_size=2,
    ),
    choices=st.sampled_from([("q8_0", "auto", "budget"), ("4.5bpw", "1", "budget"), ("q4_0", "auto", "paper")]),
)  # fmt: skip
def test_plan_of_changed_calibrations(
    calibration: Path,
    tmp_path: Path,
    changes: list[tuple[int, str, Any]],
    cells: list[tuple[int, int, float, int]],
    numbers: dict[str, Value],
    choices: tuple[str, str, str],
) -> None:
    header = gg.read_header(calibration)
    data = bytearray(calibration.read_bytes())
    tensors = list(header.tensors.values())
    for which, cell, number, whole in cells:
        t = tensors[which % len(tensors)]
        view = np.frombuffer(data, {"f32": "<f4", "f64": "<f8", "i64": "<i8"}[t.type], t.n_bytes // {"f32": 4}.get(t.type, 8), t.offset)
        with np.errstate(over="ignore"):
            view[cell % view.size] = whole if t.type == "i64" else number
        del view
    (tmp_path / "cells.gguf").write_bytes(data)
    values = {f"rq.calibration.{name}": value for name, value in numbers.items()}
    path = rebuilt(tmp_path / "cells.gguf", tmp_path / "changed.gguf", values, changes, [])
    budget, replicas, policy = choices
    answered(lambda: plan_calibration(path, tmp_path / "plan.json", check_choices(budget, None, replicas, policy)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**30), "q8_0+" * 40, "\ud800", 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@fuzzed
@given(path_in=st.lists(st.integers(0, 40), min_size=1, max_size=5), value=JSON)
def test_changed_plans(calibration: Path, tmp_path: Path, path_in: list[int], value: Any) -> None:
    """Any place of a plan.json holding anything."""
    plan_calibration(calibration, tmp_path / "plan.json", check_choices("q8_0", None, "1", "budget"))
    plan = json.loads((tmp_path / "plan.json").read_text())
    place: Any = plan
    for i, step in enumerate(path_in):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[step % len(keys)]
        if i + 1 == len(path_in) or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = value
            break
        place = place[key]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    answered(lambda: read_plan(tmp_path / "plan.json", read_any(calibration)))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "1" * 5000, '{"rq_plan_version": ' + "1" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000, "\ud800",
        '{"rq_plan_version": NaN}',
    ],
    ids=range(9),
)  # fmt: skip
def test_texts_that_are_no_plans(calibration: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert isinstance(answered(lambda: read_plan(tmp_path / "plan.json", read_any(calibration))), str)


@pytest.mark.parametrize(
    "text", ["9" * 400 + ".5GB", "9" * 5000, "9" * 5000 + "bpw", "1e999bpw", "like:x (" + "9" * 5000 + " bytes)"], ids=range(5)
)
def test_budgets_beyond_all_numbers(text: str) -> None:
    assert isinstance(answered(lambda: check_choices(text, None, "auto", "budget")), str)


def test_every_type_is_read(tmp_path: Path) -> None:
    """The readers' table of types is ggml's: none of them is an error by itself."""
    for kind in TYPES:
        header, placed = gg.build_header({}, [Tensor("x", kind, (256, 1))])
        (tmp_path / "x.gguf").write_bytes(header + bytes(gg.pad(placed[0].n_bytes)))
        assert gg.read_header(tmp_path / "x.gguf").tensors["x"].type == kind
