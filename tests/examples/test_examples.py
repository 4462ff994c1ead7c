"""The scripts of examples/, and what they print against llama.cpp's own programs."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from examples.conftest import TEMPLATE
from jinja2 import Template

from rq_gguf.cli import main
from rq_gguf.runtime.tools import run_tool

pytestmark = [pytest.mark.runtime, pytest.mark.golden]

Example = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPTS = ("Once upon a time", "The history of science")
TEXTS = ("The owl hunts at night.", "Birds fly south.", "The price of corn rose.")


def completion(model: Path, prompt: str) -> str:
    """What llama-completion adds to a prompt, greedily: more than the 64 tokens of the scripts, since it may lose its last one."""
    args = ["-no-cnv", "--no-display-prompt", "-c", 2048, "-n", 72, "--temp", 0]
    return run_tool(["llama-completion", "-m", model, "-p", prompt, *map(str, args)]).stdout


def same_beginning(expected: str, found: str) -> None:
    """`expected` begins with the 64 tokens of `found`. Spaces at the ends aside: llama-completion may drop the first one."""
    text = found.strip()
    assert len(text.split()) > 10 and expected.strip()[: len(text)] == text


def printed(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_greedy_text_as_llama_completion(example: Example, tiered_file: Path, prompt: str) -> None:
    text = printed(example("complete.py", tiered_file, prompt))
    assert text.startswith(prompt)
    same_beginning(completion(tiered_file, prompt), text.removeprefix(prompt))
    assert printed(example("stream.py", tiered_file, prompt)) == text


def test_a_file_of_llama_cpp_itself(example: Example, base_file: Path, stock_runtime: Path) -> None:
    patched = printed(example("complete.py", base_file, PROMPTS[0]))
    assert patched == printed(example("complete.py", base_file, PROMPTS[0], LLAMA_CPP_LIB_PATH=str(stock_runtime)))


def test_the_runtimes_libraries(example: Example, tiered_file: Path) -> None:
    """The other way: LLAMA_CPP_LIB_PATH, as `runtime path --lib --export` says it."""
    line = CliRunner().invoke(main, ["runtime", "path", "--lib", "--export"]).stdout
    variables = dict(re.findall(r"(\w+)=(\S+)", line))
    assert set(variables) == {"LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"}
    text = printed(example("complete.py", tiered_file, PROMPTS[0], **variables))
    same_beginning(completion(tiered_file, PROMPTS[0]), text.removeprefix(PROMPTS[0]))


def test_stock_libraries_refuse_the_file(example: Example, tiered_file: Path, stock_runtime: Path) -> None:
    done = example("complete.py", tiered_file, PROMPTS[0], LLAMA_CPP_LIB_PATH=str(stock_runtime))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"ValueError: Failed to load model from file: {tiered_file}"


def test_chat_in_the_models_template(example: Example, tiered_file: Path) -> None:
    """The second answer too, to what was said before."""
    said = [{"role": "user", "content": "What is an owl?"}]
    done = example("chat.py", tiered_file, said[0]["content"])
    assert "no chat template" not in done.stderr
    first = printed(done)
    same_beginning(completion(tiered_file, rendered(said)), first)

    said += [{"role": "assistant", "content": first.removesuffix("\n")}, {"role": "user", "content": "And where does it live?"}]
    both = printed(example("chat.py", tiered_file, said[0]["content"], said[2]["content"]))
    assert both.startswith(first)
    same_beginning(completion(tiered_file, rendered(said)), both.removeprefix(first))


def rendered(said: list[dict[str, str]]) -> str:
    """The prompt of a conversation; llama-completion adds the first token itself."""
    return Template(TEMPLATE).render(bos_token="", messages=said)


def cosines(done: "subprocess.CompletedProcess[str]") -> np.ndarray:
    rows = [re.match(r"((?: *-?\d\.\d{3})+) (.*)", line) for line in printed(done).splitlines()]
    assert [row[2] for row in rows if row] == list(TEXTS)
    return np.array([[float(x) for x in row[1].split()] for row in rows if row])


def test_embeddings(example: Example, tiered_file: Path, base_file: Path) -> None:
    found = cosines(example("embeddings.py", tiered_file, *TEXTS))
    assert found.shape == (3, 3) and (np.diag(found) == 1).all() and (found == found.T).all()
    assert (found[np.triu_indices(3, 1)] < 0.99).all()
    np.testing.assert_allclose(found, cosines(example("embeddings.py", base_file, *TEXTS)), atol=0.02)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_without_arguments_they_say_how_to_call_them(example: Example, script: str) -> None:
    done = example(script)
    assert done.returncode == 1 and f"python examples/{script} OUT.gguf" in done.stderr and "Traceback" not in done.stderr
