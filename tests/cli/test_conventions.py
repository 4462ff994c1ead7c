"""What all commands share: verbosity, --json, completion, suggestions, no colours, quick help."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli.test_cli import refused, run
from synthetic import synthetic_calibration
from writing.samples import base_model, calibration_of

import rq_gguf as rq_gguf_package
from rq_gguf import verbosity
from rq_gguf.calibration.file import write_calibration
from rq_gguf.cli import main
from rq_gguf.progress import Bar
from rq_gguf.writing.source import Source


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(main))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    write_calibration(tmp_path / "calibration.gguf", synthetic_calibration(n_layers=2, n_expert=8))
    return tmp_path / "calibration.gguf"


@pytest.fixture
def inputs(runtime: Path, tmp_path: Path) -> list[str]:
    """Arguments of a build."""
    base_model(tmp_path / "base.gguf", n_expert=16)
    with Source(tmp_path / "base.gguf") as source:
        write_calibration(tmp_path / "measured.gguf", calibration_of(source))
    return [str(tmp_path / name) for name in ("base.gguf", "out.gguf")] + ["--calibration", str(tmp_path / "measured.gguf")]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_takes_both_options_once(path: tuple[str, ...]) -> None:
    texts = [text for option in ALL[path].params for text in option.opts]
    assert [texts.count(text) for text in ("-v", "--verbose", "-q", "--quiet")] == [1, 1, 1, 1]


@pytest.mark.runtime
def test_quiet_is_nothing_but_results(inputs: list[str]) -> None:
    done = run("build", *inputs, "--quiet")
    assert done.exit_code == 0 and done.stderr == "" and done.stdout.startswith("file ")
    again = run("-q", "build", *inputs, "--json")
    assert again.exit_code == 0 and again.stderr == ""
    assert json.loads(again.stdout)["file"].endswith("out.gguf")


@pytest.mark.runtime
def test_verbose_names_programs_and_times(inputs: list[str]) -> None:
    lines = run("build", *inputs, "-v").stderr.splitlines()
    assert any("s] $ " in line and "llama-quantize" in line and "--dry-run" in line for line in lines)
    for step in ("plan", "write"):
        assert any(f"] {step}: making" in line for line in lines) and any(f"] {step}: " in line and " s, " in line for line in lines)
    assert not any("] $ " in line for line in run("build", *inputs, "--force").stderr.splitlines())


def test_levels_end_with_the_command(calibration: Path, tmp_path: Path) -> None:
    run("-q", "plan", calibration, "-o", tmp_path / "plan.json")
    assert not verbosity.is_quiet()
    run("-q", "no-such-command")
    assert not verbosity.is_quiet()


def test_both_exclude_each_other(calibration: Path, tmp_path: Path) -> None:
    for arguments in (("-q", "plan", calibration, "-v"), ("-v", "-q", "plan", calibration), ("plan", calibration, "-qv")):
        refused(run(*arguments, "-o", tmp_path / "plan.json"), "--verbose and --quiet exclude each other")


def test_bars_and_step_lines_are_hushed(capsys: pytest.CaptureFixture[str]) -> None:
    for level, shown in ((verbosity.QUIET, False), (verbosity.NORMAL, True), (verbosity.VERBOSE, True)):
        verbosity.set_level(level)
        try:
            with Bar(total=1, desc="working") as bar:
                bar.update()
            verbosity.say("a step")
            verbosity.say("the reason", always=True)
        finally:
            verbosity.set_level(verbosity.NORMAL)
        err = capsys.readouterr().err
        assert ("working" in err, "a step" in err, "the reason" in err) == (shown, shown, True)


def test_rooms_draw_no_other_bars() -> None:
    """tqdm by itself would not know of --quiet."""
    package = Path(rq_gguf_package.__file__).parent
    users = {str(path.relative_to(package)) for path in package.rglob("*.py") if "import tqdm" in path.read_text(encoding="utf-8")}
    assert users == {"progress.py", "cli/verbosity.py"}


def test_warnings_stay_and_lines_of_detail_have_a_time(calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rq_gguf import build as steps

    def plan(*args: object, **kwargs: object) -> None:
        log = logging.getLogger("rq_gguf.anything")
        log.debug("a detail")
        log.warning("look out")
        raise SystemExit(0)

    monkeypatch.setattr(steps, "plan_calibration", plan)
    arguments = ("plan", calibration, "-o", tmp_path / "plan.json")
    assert run(*arguments, "-q").stderr == run(*arguments).stderr == "Warning: look out\n"
    detail, warning = run(*arguments, "-v").stderr.splitlines()
    assert detail.startswith("[") and detail.endswith(" s] a detail") and warning == "Warning: look out"


def test_json_without_a_name_is_stdout(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    for arguments in (("--json",), ("--json", "-"), ("--json=-",), ("--json", "-q")):
        result = run("plan", calibration, "-o", out, *arguments)
        assert json.loads(result.stdout)["policy"] == "budget"
    before = run("plan", "--json", calibration, "-o", out)  # a model's name behind --json is no name for JSON
    assert json.loads(before.stdout)["policy"] == "budget" and before.exit_code == 0
    assert run("plan", calibration, "-o", out, "--json", tmp_path / "figures.json").stdout.startswith("experts ")
    assert json.loads((tmp_path / "figures.json").read_text())["policy"] == "budget"
    run("plan", calibration, "-o", out, "--json", tmp_path / "figures.json")  # JSON may be replaced


def test_json_replaces_no_other_file(calibration: Path, tmp_path: Path) -> None:
    before = calibration.read_bytes()
    refused(run("plan", calibration, "-o", tmp_path / "plan.json", f"--json={calibration}"), "is no JSON file and will not be replaced")
    refused(run("plan", calibration, "-o", tmp_path / "plan.json", "--json", calibration), "Got unexpected extra argument")
    questions = tmp_path / "piqa.jsonl"
    questions.write_text('{"context": "a", "target": "b"}\n')
    refused(run("plan", calibration, "-o", tmp_path / "plan.json", f"--json={questions}"), "will not be replaced")
    assert calibration.read_bytes() == before and not (tmp_path / "plan.json").exists()


FIGURES = set(ALL) - {("runtime",), ("runtime", "install"), ("completion",), ("card",)}
"""All but those that only make or print something."""


@pytest.mark.parametrize("path", sorted(FIGURES), ids=" ".join)
def test_every_command_with_figures_has_json(path: tuple[str, ...]) -> None:
    (option,) = [option for option in ALL[path].params if "--json" in option.opts]
    assert option.make_metavar(click.Context(ALL[path])) == "[FILE]"


@pytest.mark.runtime
def test_path_as_json(runtime: Path) -> None:
    found = json.loads(run("runtime", "path", "llama-bench", "--json").stdout)
    assert found["tool"] == str(runtime / "llama-bench") and "llama-cli" in found["programs"]
    assert found["directory"] == str(runtime)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_clicks_own(shell: str, tmp_path: Path) -> None:
    printed = run("completion", shell)
    assert printed.exit_code == 0
    own = rq_gguf(tmp_path, _RQ_GGUF_COMPLETE=f"{shell}_source")
    assert printed.stdout.strip() == own.stdout.strip() and "_RQ_GGUF_COMPLETE" in own.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("rq-gguf bui", {"build"}),
        ("rq-gguf runtime pa", {"path"}),
        ("rq-gguf build --bud", {"--budget"}),
        ("rq-gguf plan --poli", {"--policy"}),
    ],
)
def test_what_completion_offers(words: str, found: set[str], tmp_path: Path) -> None:
    done = rq_gguf(tmp_path, _RQ_GGUF_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert {line.partition(",")[2] for line in done.stdout.split()} == found


def test_a_wrong_name_gets_a_suggestion() -> None:
    refused(run("bild"), "Did you mean 'build'?")
    refused(run("runtime", "intsall"), "Did you mean 'install'?")
    refused(run("build", "demo", "x.gguf", "--bugdet", "q8_0"), "--budget")


def test_help_says_what_statuses_mean() -> None:
    page = run("--help").stdout
    for status in ("0", "1", "2", "130"):
        assert f"\n    {status} " in page


@pytest.mark.parametrize("arguments", [("--help",), ("build", "--help"), ("inspect", "none.gguf"), ("-v", "runtime", "path")], ids=" ".join)
def test_no_colours_even_if_asked_for(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = rq_gguf(tmp_path, *arguments, FORCE_COLOR="1", CLICOLOR_FORCE="1", PY_COLORS="1")
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("path", [(), *ALL], ids=" ".join)
def test_help_of_every_command_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    """What keeps it below 0.3 s, without a clock."""
    code = (
        f"import sys; from rq_gguf.cli import main; main({[*path, '--help']}, standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert "rq_gguf.cli" in modules and not {"torch", "transformers", "numpy", "gguf", "tqdm", "huggingface_hub", "matplotlib"} & set(
        modules
    )


@pytest.mark.runtime
def test_without_llama_cli_a_build_says_how_to_get_it(
    inputs: list[str], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for file in runtime.iterdir():
        if file.name != "llama-cli":
            (programs / file.name).symlink_to(file.resolve())
    monkeypatch.setenv("RQ_GGUF_RUNTIME", str(programs))
    lines = run("build", *inputs).stdout.splitlines()
    assert lines[-3:] == [
        "run it:",
        "  rq-gguf runtime install",
        f"  \"$(rq-gguf runtime path llama-cli)\" -m {inputs[1]} -p 'Once upon a time'",
    ]


def rq_gguf(directory: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    root = str(Path(__file__).resolve().parents[2])
    program = directory / "rq-gguf"  # completion goes by the program's name
    program.write_text("from rq_gguf.cli import main\nmain()\n")
    env = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, str(program), *arguments], env=env, capture_output=True, text=True, check=False)
