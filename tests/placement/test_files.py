"""What says how busy experts are, and what refuses to."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from placement.samples import sample_trace
from synthetic import synthetic_calibration

from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.calibration.trace import Recorder, is_trace, read_trace, write_trace
from rq_gguf.errors import UserError
from rq_gguf.placement.files import read_loads
from rq_gguf.planning.file import write_plan
from rq_gguf.planning.policy import make_plan


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.npz"
    write_trace(path, sample_trace())
    return path


def test_a_trace_comes_back(trace_file: Path) -> None:
    a, b = sample_trace(), read_trace(trace_file)
    assert (a.model, a.n_expert, a.n_embd, a.n_ff, a.layers) == (b.model, b.n_expert, b.n_embd, b.n_ff, b.layers)
    assert all(x.dtype == np.uint8 and (x == y).all() for x, y in zip(b.ids, a.ids, strict=True))
    assert (a.starts == b.starts).all() and is_trace(trace_file)
    loads = read_loads(trace_file)
    assert (loads.load == a.selections()).all() and loads.n_expert_used == 2 and loads.trace is not None


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.begin([2])
    recorder.add(5, np.array([[300, 1], [2, 511]]))
    trace = recorder.trace("m", 512, 8, 8)
    write_trace(tmp_path / "t.npz", trace)
    back = read_trace(tmp_path / "t.npz")
    assert back.layers == (5,) and back.ids[0].dtype == np.uint16 and back.ids[0].tolist() == [[300, 1], [2, 511]]


def damaged(trace_file: Path, **changes: object) -> Path:
    with np.load(trace_file) as f:
        held = {k: f[k] for k in f.files}
    for name, value in changes.items():
        held.pop(name, None)
        if value is not None:
            held[name] = np.asarray(value)
    out = trace_file.with_name("damaged.npz")
    np.savez(out, **held)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rq_trace_version": 9}, "version 9"),
        ({"n_expert": None}, "n_expert"),
        ({"n_expert": 3}, "names expert"),
        ({"n_embd": -1}, "n_embd"),
        ({"starts": [0, 5, 5]}, "sequences"),
        ({"starts": None}, "sequences"),
        ({"starts": [0, 10]}, "for 10 tokens"),
        ({"layer_1": np.zeros((3, 2), np.uint8)}, "layer 1"),
        ({"layer_1": np.zeros((384, 2), np.float32)}, "layer 1"),
        ({"layer_x": np.zeros((384, 2), np.uint8)}, "no layers"),
        ({"layer_0": None, "layer_1": None, "layer_3": None}, "no layers"),
    ],
)
def test_damaged_traces_are_refused(trace_file: Path, changes: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        read_trace(damaged(trace_file, **changes))


def test_truncated_and_foreign_files_are_refused(trace_file: Path, tmp_path: Path) -> None:
    data = trace_file.read_bytes()
    for n in (0, 3, 10, 100, len(data) // 2, len(data) - 1):
        cut = tmp_path / "cut.npz"
        cut.write_bytes(data[:n])
        with pytest.raises(UserError, match="cut.npz"):
            read_loads(cut)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as z:
        z.writestr("a.txt", "b")
    with pytest.raises(UserError, match="neither a trace"):
        read_loads(tmp_path / "other.zip")
    for text in ("{", "{}", '{"rq_plan_version": 2}', '{"rq_plan_version": 2, "model": "m", "layers": [{"layer": 0}]}', "hello"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="x.json"):
            read_loads(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_loads(tmp_path / "absent")


def test_nothing_in_a_file_can_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"logical_count": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="neither a trace"):
        read_loads(tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", rq_trace_version=np.array([Evil()], dtype=object))
    with pytest.raises(UserError):
        read_loads(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


def test_calibration_and_plan(tmp_path: Path) -> None:
    c = synthetic_calibration()
    write_calibration(tmp_path / "c.gguf", c)
    loads = read_loads(tmp_path / "c.gguf")
    assert (loads.load == [layer.selections for layer in c.layers]).all()
    assert (loads.n_expert_used, loads.n_embd, loads.n_ff, loads.instances) == (2, 256, 256, None)
    plan = make_plan(c, budget="q8_0", types=c.types, replicas=2, policy="budget", other_bytes=0, calibration_sha256="0")
    write_plan(tmp_path / "plan.json", plan, c)
    planned = read_loads(tmp_path / "plan.json")
    assert planned.instances is not None
    assert planned.instances.tolist() == [[1 + n for n in layer.copies] for layer in plan.layers]
    assert planned.load == pytest.approx(loads.load / loads.load.sum(axis=1, keepdims=True), rel=0.01)
    broken = json.loads((tmp_path / "plan.json").read_text())
    del broken["layers"][1]["experts"][3]["share"]
    (tmp_path / "plan.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="layer 1: an expert has no share"):
        read_loads(tmp_path / "plan.json")


@pytest.mark.parametrize("form", ["pt", "steps", "json"])
def test_recorded_distributions(tmp_path: Path, form: str) -> None:
    counts = np.zeros((4, 8), dtype=np.int64)
    counts[[1, 3]] = np.arange(16).reshape(2, 8)
    path = tmp_path / ("r.json" if form == "json" else "r.pt")
    if form == "json":
        path.write_text(json.dumps({"logical_count": counts.tolist()}))
    else:
        tensor = torch.from_numpy(counts)
        torch.save({"rank": 0, "logical_count": tensor if form == "pt" else torch.stack([tensor, 2 * tensor])}, path)
    loads = read_loads(path)
    # Layers without experts count nothing.
    assert loads.layers == (1, 3) and loads.n_expert_used is None
    assert (loads.load == counts[[1, 3]] * (3 if form == "steps" else 1)).all()


@pytest.mark.parametrize("value", [[[0, 0]], [[-1, 2]], [1, 2], [["a"]], [[[[1]]]], [[1, 2], [3]], []])
def test_bad_distributions_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"logical_count": value}))
    with pytest.raises(UserError, match="logical_count"):
        read_loads(tmp_path / "r.json")


def test_planning_says_that_errors_are_missing(trace_file: Path, tmp_path: Path) -> None:
    torch.save({"logical_count": torch.ones(2, 8)}, tmp_path / "r.pt")
    (tmp_path / "r.json").write_text('{"logical_count": [[1, 2]]}')
    for path in (trace_file, tmp_path / "r.pt", tmp_path / "r.json"):
        with pytest.raises(UserError, match="not what types do to them.*to plan, calibrate"):
            read_any(path)
