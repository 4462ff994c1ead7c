"""Models in several files: where they are cut, what they hold, and that all readers take them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from writing.samples import base_model, calibration_of, uniform_plan

from rq_gguf import gguf_file as gg
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import Tensor, read_header, read_headers, total_size
from rq_gguf.runtime import tools
from rq_gguf.writing.source import Source
from rq_gguf.writing.split import parse_split_size, part_names, split_headers
from rq_gguf.writing.tiered import open_tiered
from rq_gguf.writing.write import WriteReport, write_model

VALUES = {"general.architecture": gg.string("llama")}


def test_sizes() -> None:
    assert [parse_split_size(t) for t in (None, "4G", "4GB", "900M", "5GiB")] == [None, 4 * 10**9, 4 * 10**9, 900 * 10**6, 5 << 30]
    for text in ("", "0", "-1", "q8_0", "4GG"):
        with pytest.raises(UserError, match=f"--split-max-size {text} is not understood; give a size"):
            parse_split_size(text)


def test_names() -> None:
    assert part_names(Path("d/out.gguf"), 1) == (Path("d/out.gguf"),)
    assert part_names(Path("d/a.b.gguf"), 2) == (Path("d/a.b-00001-of-00002.gguf"), Path("d/a.b-00002-of-00002.gguf"))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(200, 3000))
def test_no_file_is_larger(rows: list[int], most: int) -> None:
    """Every tensor once and in order; a file is larger only if it holds one tensor; no two neighbours would fit in one."""
    tensors = [Tensor(f"t{i}", "f32", (8, n)) for i, n in enumerate(rows)]
    parts = split_headers(VALUES, tensors, most)
    assert [t.name for _, placed in parts for t in placed] == [t.name for t in tensors]
    sizes = [placed[-1].offset + gg.pad(placed[-1].n_bytes) for _, placed in parts]
    for i, (size, (header, placed)) in enumerate(zip(sizes, parts, strict=True)):
        assert size <= most or len(placed) == 1
        assert placed[0].offset == len(header)
        if len(parts) > 1:
            assert {t.file for t in placed} == {i}
        if i + 1 < len(parts):
            following = parts[i + 1][1][0]
            assert size + 100 + gg.pad(following.n_bytes) > most


def test_too_many_files() -> None:
    tensors = [Tensor(f"t{i}", "f32", (8, 1)) for i in range(65536)]
    with pytest.raises(UserError, match="--split-max-size makes 65536 files, and a model can have 65535"):
        split_headers(VALUES, tensors, 1)


def written(tmp_path: Path, name: str, most: int | None) -> WriteReport:
    base = base_model(tmp_path / "base.gguf")
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q4_k")
    return write_model(base, plan, calibration, tmp_path / name, ggml=Ggml(tools.library_path()), split_bytes=most)


@pytest.mark.runtime
def test_the_same_tensors_in_several_files(tmp_path: Path, runtime: Path) -> None:
    one, several = written(tmp_path, "one.gguf", None), written(tmp_path, "several.gguf", 200_000)
    assert one.paths == (tmp_path / "one.gguf",) and len(several.paths) > 3
    assert sorted(several.paths) == sorted(tmp_path.glob("several*"))
    assert several.expert_bytes == one.expert_bytes
    assert several.total_bytes == total_size(several.paths[0]) == sum(p.stat().st_size for p in several.paths)
    ours, whole = read_headers(several.paths[0]), read_header(one.paths[0])
    assert [name for h in ours for name in h.tensors] == list(whole.tensors)
    assert {k for k in ours[0].values if not k.startswith("split.")} == whole.values.keys()
    assert all(k.startswith("split.") for h in ours[1:] for k in h.values)
    assert ours[0].values["split.count"].type == ours[0].values["split.no"].type == GGUFValueType.UINT16

    tools.run_tool(["llama-gguf-split", "--merge", str(several.paths[0]), str(tmp_path / "merged.gguf")])
    a, b = gguf.GGUFReader(tmp_path / "merged.gguf"), gguf.GGUFReader(one.paths[0])
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.name == y.name and np.array_equal(x.data, y.data), x.name


@pytest.mark.runtime
def test_a_tiered_model_in_several_files_is_read(tmp_path: Path) -> None:
    one, several = written(tmp_path, "one.gguf", None), written(tmp_path, "several.gguf", 200_000)
    a, b = open_tiered(one.paths[0]), open_tiered(several.paths[0])
    assert [x.layer for x in a.layers] == [x.layer for x in b.layers] and b.header.size == several.total_bytes
    for x, y in zip(a.layers, b.layers, strict=True):
        for matrix, tiers in x.matrices.items():
            for t, u in zip(tiers, y.matrices[matrix], strict=True):
                assert np.array_equal(a.read(t, 1, 2), b.read(u, 1, 2))
    several.paths[2].unlink()
    with pytest.raises(UserError, match=f"cannot read .*{several.paths[2].name}"):
        open_tiered(several.paths[0])
    with pytest.raises(UserError, match="is not the first file of its model"):
        open_tiered(several.paths[1])
    several.paths[2].write_bytes(several.paths[1].read_bytes())
    with pytest.raises(UserError, match="is not file 3 of"):
        open_tiered(several.paths[0])


@pytest.mark.runtime
def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rq_gguf.writing.write._put", fail)
    with pytest.raises(UserError, match="no space left on device; nothing was left behind"):
        written(tmp_path, "several.gguf", 200_000)
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
