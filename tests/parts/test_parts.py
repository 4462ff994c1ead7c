"""Experts by device: the logits and counts of one device, and experts where the packing says."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families.cases import CASES
from families.check import steps as family_steps
from families.check import stock_file
from families.vocabulary import SIZES
from gguf import GGUFReader
from golden.llama_lib import prompt, same_bits
from numpy.typing import NDArray
from parts.conftest import Overrides, Reader, divergence, several

from rq_gguf.errors import UserError
from rq_gguf.format import KEY_LOAD
from rq_gguf.placement.pack import pack
from rq_gguf.runtime.tools import run_tool

pytestmark = pytest.mark.runtime

BY_DEVICE: Overrides = {"rq.devices": "all"}
ONE_BY_ONE: Overrides = {"rq.dispatch_block": 1}
MOST_DIFFERENT = 1e-6
"""Nats, with weights in F32: sums in another order."""


@pytest.mark.parametrize("n_devices", [2, 3])
@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_the_bits_and_counts_of_one_device(
    kind: str, n_devices: int, reader: Reader, tokens: list[int], request: pytest.FixtureRequest
) -> None:
    """The demo model takes two experts, whose sum does not depend on where they are."""
    model, steps = request.getfixturevalue(kind), [*several(tokens), prompt(tokens[:200], 8)]
    whole = reader.read(model, steps, 1, ONE_BY_ONE if kind == "tiered_demo" else None)
    counted = reader.counts
    divided = reader.read(model, steps, n_devices, BY_DEVICE)
    assert same_bits(whole, divided)
    assert [(c["logical"], c["physical"]) for c in counted] == [(c["logical"], c["physical"]) for c in reader.counts]
    assert all(max(c["device"]) == n_devices - 1 for c in reader.counts)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "deepseek_v3", "mixtral", "lfm2_moe", "olmoe"])
def test_families(family: str, tmp_path: Path, reader: Reader) -> None:
    """Biases, merged or scaled gates, weights that come first, groups, dense layers, eight experts per token."""
    case = next(c for c in CASES if c.model_type == family)
    model, steps = stock_file(case, tmp_path, "F32"), family_steps(SIZES[case.vocabulary], 5)
    whole = reader.read(model, steps, 1, precise=True)
    divided = reader.read(model, steps, 2, BY_DEVICE, precise=True)
    assert divergence(whole.logits, divided.logits) < MOST_DIFFERENT
    assert any("device" in c for c in reader.counts)


def test_without_mapping(stock_demo: Path, reader: Reader, tokens: list[int]) -> None:
    steps = [prompt(tokens[:60])]
    assert same_bits(reader.read(stock_demo, steps, 1), reader.read(stock_demo, steps, 2, BY_DEVICE, mmap=False))


def packed_by(file: GGUFReader, layer: dict[str, Any], load: NDArray[np.float32], n_devices: int) -> bool:
    """Whether a layer's experts are where rq_gguf.placement.pack puts them. layer: of Reader.counts."""
    rows = next(t for t in file.tensors if t.name == f"blk.{layer['layer']}.ffn_log2phy").data[0]  # of gate and up
    placed = pack(load, rows[:, 0].astype(np.int64), n_devices)
    return [layer["device"][p] for row in rows for p in row[1 : 1 + row[0]]] == placed.devices.tolist()


def loads(file: GGUFReader, layer: dict[str, Any]) -> NDArray[np.float32]:
    return np.array(file.fields[KEY_LOAD.format(layer=layer["layer"])].contents(), dtype=np.float32)


@pytest.mark.parametrize("n_devices", [2, 3])
def test_experts_are_packed_by_load(n_devices: int, tiered_demo: Path, reader: Reader, tokens: list[int]) -> None:
    """As rq_gguf.placement.pack does."""
    reader.read(tiered_demo, [prompt(tokens[:400])], n_devices, BY_DEVICE)
    file = GGUFReader(tiered_demo)
    assert all(packed_by(file, layer, loads(file, layer), n_devices) for layer in reader.counts)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_loads_that_cannot_be(value: float, tiered_demo: Path, reader: Reader, tokens: list[int], tmp_path: Path) -> None:
    """One of them in a layer's loads, and all its experts count alike."""
    spoilt = tmp_path / "spoilt.gguf"
    shutil.copyfile(tiered_demo, spoilt)
    file = GGUFReader(spoilt, "r+")
    for name, field in file.fields.items():
        if name.startswith("rq.blk.") and name.endswith(".load"):
            field.parts[field.data[1]][:] = value
    file.data.flush()
    reader.read(spoilt, [prompt(tokens[:60])], 2, BY_DEVICE)
    assert all(packed_by(file, layer, np.ones_like(loads(file, layer)), 2) for layer in reader.counts)


def test_one_device_has_nothing_to_divide(stock_demo: Path, reader: Reader, tokens: list[int]) -> None:
    steps = [prompt(tokens[:60])]
    alone = reader.read(stock_demo, steps, 1, BY_DEVICE)
    assert same_bits(reader.read(stock_demo, steps, 1), alone)
    assert "no devices to divide experts among" in alone.log


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rq.devices": "some"}, "rq.devices is 'some', expected 'all'"),
        ({"rq.devices": 2}, "rq.devices must be given as a string"),
        ({"rq.devices": "all", "rq.vram": "50%"}, "rq.devices and rq.vram do not go together"),
    ],
)
def test_refusals(overrides: Overrides, words: str, stock_demo: Path, reader: Reader, tokens: list[int]) -> None:
    with pytest.raises(RuntimeError, match=words):
        reader.read(stock_demo, [prompt(tokens[:4])], 2, overrides)


def test_imatrix_is_refused(stock_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time " * 200)
    options = [
        "-m",
        stock_demo,
        "-f",
        tmp_path / "text.txt",
        "-o",
        tmp_path / "out.gguf",
        "-c",
        "64",
        "--override-kv",
        "rq.devices=str:all",
    ]
    with pytest.raises(UserError, match="run without rq.devices"):
        run_tool(["llama-imatrix", *options])
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("layers", [0, 3])
def test_layers_on_the_cpu_stay_whole(layers: int, stock_demo: Path, servers: tuple[str, ...]) -> None:
    """The same text, with none of the layers and with three on two devices."""
    words = [
        "llama-completion",
        "-m",
        stock_demo,
        "--rpc",
        ",".join(servers[:2]),
        "-ngl",
        str(layers),
        "-p",
        "The town",
        "-n",
        "16",
        "-no-cnv",
    ]
    words += ["-c", "128", "--temp", "0", "-t", "1", "--no-repack", "--ignore-eos"]
    whole, divided = run_tool(words), run_tool([*words, "--override-kv", "rq.devices=str:all"])
    assert whole.stdout == divided.stdout
    assert ("no layer with experts is on a device" in divided.stderr) == (layers == 0)
