"""Cards: of the demo model built by the command, with what was measured on it; nothing is in a card that no file holds."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from writing.samples import base_model, calibration_of

from rq_gguf.calibration.file import write_calibration
from rq_gguf.card.facts import gather
from rq_gguf.card.page import card
from rq_gguf.cli import main
from rq_gguf.gguf_file import read_header, string
from rq_gguf.writing.source import Source

NAME = re.compile(r"Demo-16x5.8M-RQ-[\d.]+bpw\.gguf")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def built(demo_base, runtime, tmp_path_factory) -> Path:
    """A file from the demo model's GGUF and a made-up calibration, as build leaves it, its plan beside it."""
    folder = tmp_path_factory.mktemp("built")
    with Source(demo_base) as source:
        write_calibration(folder / "calibration.gguf", replace(calibration_of(source), text_sha256="ab" * 32, model="demo"))
    done = run("build", demo_base, folder / "out.gguf", "--calibration", folder / "calibration.gguf", "--budget", "q8_0", "--replicas", "1")
    assert done.exit_code == 0, done.output
    assert NAME.search(done.stdout), done.stdout
    return folder / "out.gguf"


@pytest.fixture
def measured(built) -> dict[str, Any]:
    """What `eval --json` writes, with figures of its own."""
    figure = {"value": 0.25, "error": 0.125}
    labels = ("Mean PPL(Q)", "Mean PPL(base)", "Mean KLD", "99.9% KLD", "RMS Δp", "Same top p")
    return {
        "file": "elsewhere/old-name.gguf",
        "base": "elsewhere/base.gguf",
        "file_bytes": built.stat().st_size,
        "base_bytes": 1,
        "texts": ["a.txt", "b.txt"],
        "quality": {"chunks": 7, **dict.fromkeys(labels, figure)},
        "balance": {"lis_before": 3.0, "lis_after": 1.5},
        "by_text": [],
    }


def speeds(built: Path) -> dict[str, Any]:
    """What `bench --json` writes."""
    one = {"median": 1234.0, "low": 1200.0, "high": 1300.0, "ratio": {"median": 1.0, "low": 1.0, "high": 1.0}, "samples": [1234.0]}
    own = {"name": "out.gguf", "file": "out.gguf", "file_bytes": built.stat().st_size, "tiered": True, "unpatched": False}
    stock = {"name": "q4.gguf", "file": "q4.gguf", "file_bytes": 5, "tiered": False, "unpatched": True}
    return {
        "rq_bench_version": 1, "rounds": 3, "interrupted": False, "repetitions": 2, "prompt": [512], "generate": [64], "sequences": [],
        "threads": 2, "arguments": ["-ngl", "99"], "machine": "a processor", "text": None,
        "files": [own | {"tests": {"pp512": one}}, stock | {"tests": {"pp512": one | {"median": 99.5}}}],
    }  # fmt: skip


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.runtime
@pytest.mark.e2e
def test_the_command(built, measured, tmp_path):
    out = tmp_path / "README.md"
    options = ["--eval", write(tmp_path / "eval.json", measured), "--bench", write(tmp_path / "bench.json", speeds(built))]
    done = run("card", built, *options, "--license", "mit", "--base-model", "some/model", "--repo", "me/mine", "-o", out)
    assert done.exit_code == 0, done.output
    text, head = out.read_text(encoding="utf-8"), ModelCard.load(out).data
    assert (head.license, head.base_model, head.library_name) == ("mit", "some/model", "gguf")
    assert {"gguf", "moe"} <= set(head.tags) and head["base_model_relation"] == "quantized"
    assert "quantized_by" not in head.to_dict()
    name = NAME.search(text)[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    file = dict(zip(rows[0], rows[2] if rows[1][0].startswith(":") else rows[1], strict=True))
    assert file["file"] == f"`{name}`" and file["copies"] == "4"
    assert (file["mean KLD"], file["pp512, t/s"]) == ("0.25000 ± 0.12500", "1,234")
    assert "7 chunks of 512 tokens of a.txt, b.txt" in text and "3.00 → 1.50" in text
    assert re.search(r"q4.gguf, unpatched llama.cpp +\| +99.5 \|", text) and "a processor with `-t 2 -ngl 99`" in text
    assert f"rq-gguf bench {name} q4.gguf -p 512 -n 64 -b 0 --rounds 3 --repetitions 2 --threads 2 --no-text --unpatched" in text
    assert f"rq-gguf eval {name} --base base.gguf --text a.txt --text b.txt --chunks 7 --json eval.json" in text
    assert "a text of sha256 `" + "ab" * 32 in text and "pip install rq-gguf\nrq-gguf runtime install" in text
    assert len(re.findall(r"^\| \d+ +\| .*q8_0", text, re.MULTILINE)) == 4  # the recipe's rows, a layer each
    lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("  hf upload me/mine ")]
    assert shlex.split(lines[1])[2:] == ["me/mine", str(built), name]
    assert [shlex.split(line)[-1] for line in lines] == ["README.md", name, "plan.json"]


@pytest.mark.runtime
def test_the_build_command_in_a_card(built, demo_base, tmp_path):
    """It builds these very bytes, from the same model and calibration."""
    found = gather([built])
    words = shlex.split(found.files[0].command)
    assert words[:3] == ["rq-gguf", "build", "demo"] and "--replicas" in words
    again = tmp_path / "again.gguf"
    words[2], words[3], words[-1] = str(demo_base), str(again), str(built.parent / "calibration.gguf")
    assert run(*words[1:]).exit_code == 0
    assert again.read_bytes() == built.read_bytes()


@pytest.mark.runtime
def test_without_measurements_there_are_no_figures(built):
    done = run("card", built)
    assert done.exit_code == 0
    assert "KLD" not in done.stdout and "t/s" not in done.stdout and "license" not in done.stdout and "base_model" not in done.stdout
    assert "--license" in done.stderr and "--base-model" in done.stderr
    assert "OWNER/REPOSITORY" in done.stdout


@pytest.mark.runtime
def test_what_the_file_says_is_taken(built):
    """Its licence, its languages, and the model on the hub that it was made from."""
    found = gather([built])
    values = {
        "general.license": string("apache-2.0"),
        "general.source.repo_url": string("https://huggingface.co/maker/Model-1B"),
    }
    described = replace(found, license="apache-2.0", base_model="maker/Model-1B", values=replace(found.values, values=values))
    assert "license: apache-2.0" in card(described) and "[maker/Model-1B](https://huggingface.co/maker/Model-1B)" in card(described)


@pytest.mark.runtime
def test_refused(built, measured, tmp_path, demo_base):
    other = write(tmp_path / "other.json", measured | {"file_bytes": 3})
    stale = write(tmp_path / "stale.json", measured | {"file_bytes": 3, "file": "x/out.gguf"})
    short = write(tmp_path / "short.json", {key: value for key, value in measured.items() if key != "base"})
    bare = write(tmp_path / "bare.json", {"quality": 3})
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n")
    for arguments, message in [
        ([built, "--eval", other], "other.json says nothing of out.gguf"),
        ([built, "--eval", stale], f"measured on a out.gguf of 3 bytes, and {built} has"),
        ([built, "--eval", short], "short.json is no JSON of rq-gguf eval or compare (KeyError: 'base')"),
        ([built, "--eval", bare], "bare.json is no JSON of rq-gguf eval"),
        ([built, "--bench", other], "other.json is no JSON of rq-gguf bench or compare"),
        ([built, "--bench", readme], "README.md is no JSON that rq-gguf wrote"),
        ([built, "-o", readme], "README.md is no card that rq-gguf wrote; use --force"),
        ([built, "--base-model", "nonsense"], "--base-model nonsense is no hub id"),
        ([demo_base], "it is a stock file"),
        ([base_model(tmp_path / "x.gguf")], "it is a stock file"),
    ]:
        done = run("card", *arguments)
        assert done.exit_code == 2 and message in done.stderr, (arguments, done.stderr)
    assert readme.read_text() == "# Mine\n"
    assert read_header(built).get("general.file_type") is not None
