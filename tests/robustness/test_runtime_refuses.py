"""Damaged tiered files: the patched llama.cpp refuses each with its load error, names the layer or tensor, and does not crash.

Also run under AddressSanitizer by `tools/sanitize.sh`, which sets RQ_GGUF_SANITIZED to the directory of such a build.
"""

import os
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, Value
from rq_gguf.runtime.tools import tool_path
from rq_gguf.writing.inspect import inspect


@dataclass
class File:
    """A tiered file taken apart: what a test changes is put together again as it stands."""

    values: dict[str, Value]
    tensors: dict[str, Tensor]
    data: dict[str, bytes] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        order = list(self.tensors)
        self.tensors = {new if n == old else n: replace(self.tensors[n], name=new) if n == old else self.tensors[n] for n in order}
        self.data[new] = self.data.pop(old)

    def table(self, layer: int, change: Callable[[np.ndarray], None]) -> None:
        name = fmt.map_name(layer)
        table = np.frombuffer(self.data[name], dtype="<i4").reshape(tuple(reversed(self.tensors[name].ne))).copy()
        change(table)
        self.data[name] = table.tobytes()

    def reshape(self, name: str, ne: tuple[int, ...], type_name: str | None = None) -> None:
        t = replace(self.tensors[name], ne=ne, type=type_name or self.tensors[name].type)
        self.tensors[name] = t
        self.data[name] = self.data[name][: t.n_bytes].ljust(t.n_bytes, b"\0")

    def write(self, path: Path) -> Path:
        header, placed = gg.build_header(self.values, self.tensors.values())
        with path.open("wb") as f:
            f.write(header)
            for t in placed:
                f.write(self.data[t.name].ljust(gg.pad(t.n_bytes), b"\0"))
        return path


def take_apart(path: Path) -> File:
    header = gg.read_header(path)
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = dict(header.tensors)
    return File(dict(header.values), tensors, {n: raw[t.offset : t.offset + t.n_bytes].tobytes() for n, t in tensors.items()})


def set_cell(group: int, expert: int, slot: int, value: int) -> Callable[[np.ndarray], None]:
    def change(table: np.ndarray) -> None:
        table[group, expert, slot] = value

    return change


def swap_copy_for_double(table: np.ndarray) -> None:
    table[1, 1, 1] = table[1, 0, 1]


FIRST, SECOND = fmt.tier_name(1, "gate", 0), fmt.tier_name(1, "gate", 1)
DOWN = fmt.tier_name(1, "down", 0)

DAMAGE: dict[str, tuple[Callable[[File], None], str]] = {
    "version": (
        lambda f: f.values.update({fmt.KEY_FORMAT_VERSION: gg.scalar(GGUFValueType.UINT32, 9)}),
        "rq.format_version is 9, this build reads version 1",
    ),
    "version of another kind": (lambda f: f.values.update({fmt.KEY_FORMAT_VERSION: gg.string("1")}), "rq.format_version .*wrong type"),
    "dispatch": (lambda f: f.values.update({fmt.KEY_DISPATCH: gg.string("random")}), "rq.dispatch is 'random'"),
    "block": (lambda f: f.values.update({fmt.KEY_DISPATCH_BLOCK: gg.scalar(GGUFValueType.UINT32, 0)}), "rq.dispatch_block is 0"),
    "map out of range": (lambda f: f.table(1, set_cell(0, 2, 1, 4000)), "layer 1: .* logical expert 2 of gate_up points to physical"),
    "map below zero": (lambda f: f.table(1, set_cell(1, 2, 1, -1)), "layer 1: .* logical expert 2 of down points to physical"),
    "no primary": (lambda f: f.table(0, set_cell(0, 3, 0, 0)), "layer 0: .* logical expert 3 of gate_up has no primary"),
    "more instances than slots": (lambda f: f.table(0, set_cell(0, 3, 0, 99)), "layer 0: .* claims 99 instances"),
    "negative count": (lambda f: f.table(0, set_cell(0, 3, 0, -5)), "layer 0: .* has no primary"),
    "mapped twice": (lambda f: f.table(2, swap_copy_for_double), "layer 2: .* mapped twice"),
    "map missing": (lambda f: f.tensors.pop(fmt.map_name(1)) and None, "layer 1: the map of experts is missing"),
    "map of floats": (lambda f: f.reshape(fmt.map_name(1), f.tensors[fmt.map_name(1)].ne, "f32"), "blk.1.ffn_log2phy"),
    "map of one group": (lambda f: f.reshape(fmt.map_name(1), (*f.tensors[fmt.map_name(1)].ne[:2], 1)), "blk.1.ffn_log2phy"),
    "map of too few experts": (
        lambda f: f.reshape(fmt.map_name(1), (f.tensors[fmt.map_name(1)].ne[0], 3, 2)),
        "blk.1.ffn_log2phy.* wrong shape",
    ),
    "map of one column": (lambda f: f.reshape(fmt.map_name(1), (1, *f.tensors[fmt.map_name(1)].ne[1:])), "blk.1.ffn_log2phy"),
    "tier of fewer rows": (
        lambda f: f.reshape(SECOND, (f.tensors[SECOND].ne[0], f.tensors[SECOND].ne[1] // 2, f.tensors[SECOND].ne[2])),
        "blk.1.ffn_gate_exps.1.weight.* wrong shape",
    ),
    "tier of fewer experts": (
        lambda f: f.reshape(SECOND, (*f.tensors[SECOND].ne[:2], f.tensors[SECOND].ne[2] - 1)),
        "layer 1: the tiers of .* differ",
    ),
    "tier of no weights": (lambda f: f.reshape(SECOND, f.tensors[SECOND].ne, "i32"), "blk.1.ffn_gate_exps.1.weight.* none of weights"),
    "tier of a type for activations": (
        lambda f: f.reshape(SECOND, f.tensors[SECOND].ne, "q8_1"),
        "blk.1.ffn_gate_exps.1.weight.* none of weights",
    ),
    "down of no weights": (lambda f: f.reshape(DOWN, f.tensors[DOWN].ne, "i32"), "blk.1.ffn_down_exps.0.weight.* none of weights"),
    "tier missing": (lambda f: f.tensors.pop(SECOND) and None, "layer 1: the tiers of .* differ"),
    "gap in the tiers": (lambda f: f.rename(FIRST, fmt.tier_name(1, "gate", 5)), "wrong number of tensors"),
    "a tensor too many": (lambda f: f.rename("output_norm.weight", "blk.0.ffn_gate_exps.9.weight"), "output_norm|wrong number of tensors"),
    "only down in tiers": (
        lambda f: [f.tensors.pop(fmt.tier_name(1, m, t)) for m in ("gate", "up") for t in (0, 1)] and None,
        "blk.1.ffn_(gate|up)_exps",
    ),
}


def load(path: Path) -> tuple[int, str]:
    """Exit status and output of a program that loads a model: the sanitized one if there is one."""
    sanitized = os.environ.get("RQ_GGUF_SANITIZED")
    if sanitized:
        command = [Path(sanitized) / "load-model", path]
    else:
        # unlike the other tools it writes what the library says before it exits
        command = [tool_path("llama-bench"), "-v", "-m", path, "-p", "8", "-n", "0", "-r", "1", "-t", "2"]
    done = subprocess.run([str(c) for c in command], capture_output=True, stdin=subprocess.DEVNULL, timeout=300, check=False)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def check_refused(path: Path, why: str) -> None:
    code, output = load(path)
    assert "AddressSanitizer" not in output and not re.search("tiers.*runtime error", output), output[-3000:]
    assert code >= 0, f"killed by signal {-code}: {output[-2000:]}"
    assert re.search(f"error loading model.*{why}", output), output[-2000:]
    assert code != 0


def test_good_file_loads(good):
    code, output = load(good)
    assert code == 0 and "error loading model" not in output, output[-2000:]
    assert "AddressSanitizer" not in output


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(good, tmp_path, name):
    change, why = DAMAGE[name]
    file = take_apart(good)
    change(file)
    path = file.write(tmp_path / "damaged.gguf")
    with pytest.raises(UserError, match="damaged.gguf"):
        inspect(path)
    check_refused(path, why)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_file_is_refused(good, tmp_path, share):
    data = good.read_bytes()
    path = tmp_path / "truncated.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    check_refused(path, "")


def test_override_of_some_tiers_is_refused(good, runtime):
    done = subprocess.run(
        [runtime / "llama-bench", "-v", "-m", good, "-p", "8", "-n", "0", "-r", "1", "-ot", r"gate_exps\.1=CPU"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode > 0
    assert b"only some of the tiers of 'blk.0.ffn_gate_exps.weight'" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("llama-quantize", ["{file}", "{tmp}/q.gguf", "Q4_K"]), ("llama-imatrix", ["-m", "{file}", "-f", "{text}", "-o", "{tmp}/i.gguf"])],
)
def test_tools_that_cannot_work_say_so(good, tmp_path, runtime, tool, arguments):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 200)
    command = [a.format(file=good, tmp=tmp_path, text=text) for a in arguments]
    done = subprocess.run([runtime / tool, *command], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode > 0
    assert b"the file that it was made from" in done.stdout + done.stderr
    assert not (tmp_path / "q.gguf").exists() and not (tmp_path / "i.gguf").exists()


def test_split_and_merge_keep_the_file(good, tmp_path, runtime):
    """llama-gguf-split knows nothing of tiers and need not: parts load, and merging restores every tensor."""
    split = [runtime / "llama-gguf-split", "--split", "--split-max-tensors", "20", good, tmp_path / "part"]
    subprocess.run(split, check=True, capture_output=True)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    code, output = load(parts[0])
    assert code == 0 and "error loading model" not in output, output[-2000:]
    subprocess.run([runtime / "llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf"], check=True, capture_output=True)
    assert take_apart(tmp_path / "merged.gguf").data == take_apart(good).data


def agrees(path: Path) -> None:
    """What `rq-gguf inspect` refuses, llama.cpp refuses as it loads, and what that accepts loads and runs."""
    try:
        inspect(path)
        why = ""
    except UserError as e:
        why = str(e)
    code, output = load(path)
    assert "AddressSanitizer" not in output and not re.search("tiers.*runtime error", output), output[-3000:]
    assert code >= 0, f"killed by signal {-code}: {output[-2000:]}"
    if why:
        assert code != 0 and re.search("error loading model|failed to (load|read|open)", output), f"{why}, but: {output[-2000:]}"
    else:
        assert code == 0, output[-2000:]


NUMBERS = st.one_of(st.integers(-3, 20), st.sampled_from([2**31 - 1, -(2**31), 255, 256, 4000]))
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 128, 255, 256, 257, 512]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """One or two changes of map entries, counts, sizes, types, names, keys, or places of data."""
    file = take_apart(good)
    experts = [name for name in file.tensors if fmt.parse_expert_name(name) is not None]
    maps = [name for name in file.tensors if fmt.parse_map_name(name) is not None]
    shifted = 0
    for _ in range(data.draw(st.integers(1, 2))):
        what = data.draw(st.sampled_from(["cell", "cell", "ne", "type", "drop", "rename", "key", "offset", "map ne"]))
        name = data.draw(st.sampled_from([n for n in (maps if what in ("cell", "map ne") else experts) if n in file.tensors]))
        if what == "cell":
            place = [data.draw(st.integers(0, size - 1)) for size in reversed(file.tensors[name].ne)]
            file.table(fmt.parse_map_name(name) or 0, set_cell(place[0], place[1], place[2], data.draw(NUMBERS)))
        elif what in ("ne", "map ne"):
            ne = list(file.tensors[name].ne)
            ne[data.draw(st.integers(0, len(ne) - 1))] = data.draw(SIZES)
            try:
                file.reshape(name, tuple(ne))
            except UserError:
                assume(False)  # rows of half a block cannot even be written
        elif what == "type":
            kind = data.draw(st.sampled_from(["f32", "f16", "i32", "i8", "q8_0", "q8_1", "q8_k", "q4_k", "q6_k", "f64"]))
            file.reshape(name, file.tensors[name].ne, kind)
        elif what == "drop":
            del file.tensors[name]
            experts, maps = [n for n in experts if n != name], [n for n in maps if n != name]
        elif what == "rename":
            layer, matrix, tier = fmt.parse_expert_name(name) or (0, "gate", 0)
            new = fmt.tier_name(layer + data.draw(st.integers(0, 1)), matrix, (tier or 0) + data.draw(st.integers(0, 8)))
            assume(new not in file.tensors)
            file.rename(name, new)
            experts = [new if n == name else n for n in experts]
        elif what == "key":
            key = data.draw(st.sampled_from([fmt.KEY_FORMAT_VERSION, fmt.KEY_DISPATCH_BLOCK, fmt.KEY_DISPATCH]))
            number = gg.scalar(GGUFValueType.UINT32, data.draw(st.sampled_from([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1])))
            file.values[key] = data.draw(
                st.sampled_from([number, gg.string("primary"), gg.string("1"), gg.scalar(GGUFValueType.BOOL, True)])
            )
        else:
            shifted = data.draw(st.sampled_from([1, 31, 32, 64, 2**31, 2**62]))
    path = file.write(tmp_path / "damaged.gguf")
    if shifted:
        shift_offset(path, data.draw(st.sampled_from(list(file.tensors))), shifted)
    agrees(path)


def shift_offset(path: Path, name: str, by: int) -> None:
    """Let a tensor's entry in the header point elsewhere."""
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (n_dims,) = struct.unpack_from("<I", raw, at)
    at += 4 + 8 * n_dims + 4
    struct.pack_into("<Q", raw, at, struct.unpack_from("<Q", raw, at)[0] + by)
    path.write_bytes(raw)
