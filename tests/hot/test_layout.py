"""Which layers are whole in fast memory and how many slots the others get: forced, chosen, by given, measured and remembered speeds."""

import re
import subprocess
from pathlib import Path

import pytest
from golden.llama_lib import same_bits
from hot.conftest import Reader, hits, reading

pytestmark = pytest.mark.runtime

GIVEN = "ram=1e9,vram=1e11,handover=1e-3"
"""A hand-over as long as many experts: whole layers are worth it."""
PREDICTED = re.compile(r"predicted: ([0-9.]+) tokens/s, ([0-9.]+) in stock's layout")
MEASURED = re.compile(r"llama_hot: measured in ([0-9.]+) s")
SAID = re.compile(r"llama_hot: \S+: (ram=\S+)")


def figures_of(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (figure.split("=") for figure in text.split(","))}


def prediction(log: str) -> tuple[float, float]:
    """Tokens per second: of the layout, of stock's. Raises AssertionError if the log does not say."""
    found = PREDICTED.findall(log)
    assert len(found) == 1, log[-3000:]
    return float(found[0][0]), float(found[0][1])


@pytest.mark.parametrize(
    ("layout", "speeds", "said"),
    [
        ("slots", GIVEN, r"\d+ to \d+ of 16 in each of 4 layers;"),
        ("layers", GIVEN, r"all in 2 layers, none in 2 others;"),
        ("auto", GIVEN, r"\d+(?: to \d+)? of 16 in each of 2 layers, all in 2 others;|all in 2 layers, none in 2 others;"),
        ("auto", "ram=1e9,vram=1e11,handover=1e-9", r"\d+(?: to \d+)? of 16 in each of 4 layers;"),
        ("auto", "ram=1e11,vram=1e9,handover=0", r"none, the device is not faster than the host"),
    ],
)
@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_every_layout_gives_the_same_logits(
    kind: str, layout: str, speeds: str, said: str, read: Reader, tokens: list[int], request: pytest.FixtureRequest
) -> None:
    model, steps = request.getfixturevalue(kind), reading(tokens[:120], 64)
    whole = read(model, steps, {"rq.dispatch": "primary"})
    split = read(model, steps, {"rq.dispatch": "primary", "rq.vram": "55%", "rq.vram_layout": layout, "rq.vram_speeds": speeds})
    assert re.search(f"experts in fast memory: (?:{said})", split.log), split.log[-3000:]
    assert same_bits(whole, split)
    if "in each of" in split.log:
        assert hits(split).exchanged > 0
        ours, stock = prediction(split.log)
        assert layout == "slots" or ours >= stock


def test_less_memory_than_asked_for(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    log = read(stock_demo, reading(tokens[:8], 6), {"rq.vram": "50%", "rq.vram_layout": "auto", "rq.vram_keep": 1 << 50}).log
    assert re.search(r"RPC0 has no room for [0-9.]+ MiB of experts, trying 0\.0 MiB", log)
    assert "fast memory: none, there is no room for one per layer" in log


def test_without_adapting_less_is_expected(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    options: dict[str, str | int | bool] = {"rq.vram": "50%", "rq.vram_speeds": GIVEN}
    adapted, fixed = (read(stock_demo, reading(tokens[:8], 6), {**options, "rq.vram_adapt": adapt}) for adapt in (True, False))
    assert prediction(adapted.log)[0] > prediction(fixed.log)[0]


def test_speeds_are_measured_three_times(stock_demo: Path, read: Reader, tokens: list[int], tmp_path: Path) -> None:
    def load(**options: str | int | bool) -> str:
        settings = {"rq.vram": "50%", "rq.vram_layout": "auto", **{f"rq.{k}": v for k, v in options.items()}}
        return read(stock_demo, reading(tokens[:8], 6), settings).log

    file = tmp_path / "cache" / "expert-speeds.txt"
    logs = []
    for times in (1, 2, 3, 3):
        logs.append(load())
        lines = [line.split() for line in file.read_text().splitlines()]
        assert [p.name for p in file.parent.iterdir()] == [file.name] and len(lines) == times and len({line[0] for line in lines}) == 1
    assert all(float(MEASURED.findall(log)[0]) < 2 for log in logs[:3]) and not MEASURED.search(logs[3])
    # What counts is the middle one of each figure, so that a bad moment of the machine does not.
    [said] = SAID.findall(logs[3])
    found = [figures_of(line[1]) for line in lines]
    assert figures_of(said) == pytest.approx({name: sorted(f[name] for f in found)[1] for name in found[0]}, rel=1e-3)
    assert prediction(logs[2]) == pytest.approx(prediction(logs[3]), rel=0.01)
    # Other threads, another entry; asked for, another measurement in the same one.
    assert MEASURED.search(load(vram_threads=1)) and len(file.read_text().splitlines()) == 4
    assert MEASURED.search(load(vram_threads=1, vram_speeds="new")) and len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("content", [b"", b"\0\xff" * 4000, b"ram=1e10\n" * 3000, None])
def test_a_spoilt_file_is_replaced(content: bytes | None, stock_demo: Path, read: Reader, tokens: list[int], tmp_path: Path) -> None:
    """None: the right entry with speeds that no machine has."""
    file, options = tmp_path / "cache" / "expert-speeds.txt", {"rq.vram": "50%"}
    file.parent.mkdir()
    if content is None:
        prediction(read(stock_demo, reading(tokens[:8], 6), options).log)
        content = file.read_bytes().split()[0] + b" ram=0,vram=nan\n"
    file.write_bytes(content)
    log = read(stock_demo, reading(tokens[:8], 6), options).log
    assert MEASURED.search(log) and prediction(log)[0] > 0
    assert re.fullmatch(rb"[0-9a-f]{16} ram=\S+\n", file.read_bytes())


def test_no_place_to_remember(stock_demo: Path, read: Reader, tokens: list[int], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    log = read(stock_demo, reading(tokens[:8], 6), {"rq.vram": "50%"}).log
    assert MEASURED.search(log) and prediction(log)[0] > 0
    assert (tmp_path / "cache").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rq.vram_layout": "rows"}, r"rq\.vram_layout: 'rows' is none of auto, slots and layers"),
        ({"rq.vram_layout": True}, r"rq\.vram_layout must be a string"),
        ({"rq.vram_speeds": "fast"}, r"rq\.vram_speeds: 'fast': no value for a name"),
        ({"rq.vram_speeds": "ram=1e9,vram=1e11,q99_k=1"}, r"rq\.vram_speeds: .*: unknown name 'q99_k'"),
        ({"rq.vram_speeds": "ram=0,vram=1e11"}, r"rq\.vram_speeds: .*: no such machine"),
        ({"rq.vram_threads": "8"}, r"rq\.vram_threads must be a number"),
    ],
)
def test_refused(options: dict[str, str | int | bool], said: str, stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    with pytest.raises(RuntimeError, match=said):
        read(stock_demo, reading(tokens[:4], 3), {"rq.vram": "50%", **options})


def test_auto_leaves_room_for_the_context(runtime: Path, server: str, stock_demo: Path, tmp_path: Path) -> None:
    """All experts beside a short context, none beside one that takes all that --fit-target leaves."""

    def load(context: int, target: int) -> str:
        command = [runtime / "llama-completion", "-m", stock_demo, "--rpc", server, "-ngl", "99", "--expert-vram", "auto", "-lv", "4"]
        command += ["-c", str(context), "-fitt", str(target), "-n", "1", "-p", "The", "-no-cnv", "-t", "1"]
        env = {"LLAMA_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    free = int(re.findall(r"vs\. (\d+) MiB of free device memory", load(64, 0))[0])
    assert "--expert-vram auto: 100% of the experts" in load(64, max(free - 400, 0))
    assert "--expert-vram auto: 0 bytes" in load(1 << 18, max(free - 400, 0))
