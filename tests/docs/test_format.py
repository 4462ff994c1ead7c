"""docs/format.md names every key with its type, as files have them."""

import re
from pathlib import Path

import gguf
import pytest
from gguf.constants import GGUFValueType

from rq_gguf import format as fmt

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
KEYS = {value for name, value in vars(fmt).items() if name.startswith("KEY_")}


def table() -> dict[str, str]:
    """Key -> what the page calls its type."""
    rows = re.findall(r"^\| (`rq\.[^|]*) \| ([^|]*) \|", PAGE, re.MULTILINE)
    return {key: kind for keys, kind in rows for key in re.findall(r"`([^`]+)`", keys)}


def test_every_key_is_there() -> None:
    assert {key.replace("{i}", "{layer}") for key in table()} == KEYS


@pytest.mark.runtime
def test_types_are_those_of_a_file(tiered_demo: Path) -> None:
    known = table()
    found = {}
    for key, field in gguf.GGUFReader(tiered_demo).fields.items():
        if key.startswith("rq."):
            first, *inner = field.types
            name = first.name.lower() if first is not GGUFValueType.ARRAY else f"array of {inner[0].name.lower()}"
            found[re.sub(r"blk\.\d+", "blk.{i}", key)] = name
    assert found.keys() == known.keys() - {"rq.tensor_types"}  # there are none
    assert all(known[key].partition(",")[0] == name for key, name in found.items()), found


def test_names_of_tensors() -> None:
    assert fmt.tier_name(3, "up", 2) == "blk.3.ffn_up_exps.2.weight" and fmt.map_name(3) == "blk.3.ffn_log2phy"
    assert "`blk.{i}.ffn_{gate\\|up\\|gate_up\\|down}_exps.{t}.weight`" in PAGE and "`blk.{i}.ffn_log2phy`" in PAGE
    assert f"at most {fmt.MAX_TIERS}" in PAGE and f"; {fmt.DEFAULT_DISPATCH_BLOCK} if missing" in PAGE
