"""The main job on the embedded model, as a user runs it: build, run again, run the file, evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rq_gguf.evaluation.balance import COUNTS_VARIABLE, measure_balance, read_counts
from rq_gguf.writing.inspect import inspect

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = ROOT / "rq_gguf" / "data" / "heldout.txt"

pytestmark = [pytest.mark.e2e, pytest.mark.runtime, pytest.mark.slow]


def rq_gguf(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rq_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory, runtime) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo-rq.gguf"
    done = rq_gguf("build", "demo", path, "--replicas", 4, "--json", path.with_suffix(".json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def complete(runtime: Path, model: Path, *options: object, env: dict[str, str] | None = None) -> str:
    command = [runtime / "llama-completion", "-m", model, "-no-cnv", "-p", "Once upon a time", "-n", "24", "--temp", "0", "-t", "2"]
    done = subprocess.run(
        [*map(str, command), *map(str, options)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def alike(texts: list[str]) -> bool:
    """The same as far as they go: on a busy machine llama-completion may exit before its last words are printed."""
    length = min(len(text.rstrip()) for text in texts)
    return length > 40 and len({text[:length] for text in texts}) == 1


def test_file_is_valid_and_within_its_budget(out):
    found = inspect(out)
    assert found.budget_bytes is not None and found.expert_bytes <= found.budget_bytes
    assert all(sum(x.copies) > 0 for x in found.layers)


def test_finished_steps_are_skipped(out):
    before = out.stat().st_mtime_ns
    done = rq_gguf("build", "demo", out, "--replicas", 4)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_mtime_ns == before


def test_text_is_the_same_with_and_without_mmap_and_by_any_dispatch_of_one_sequence(out, runtime):
    # A prompt of a few tokens and one sequence never fill a block of 16, so all go to the primaries.
    options = [(), ("--load-mode", "none"), ("--override-kv", "rq.dispatch=str:primary"), ("--cpu-moe",)]
    texts = [complete(runtime, out, *o) for o in options]
    assert texts[0].startswith(" Once upon a time") and alike(texts)


def test_counts_follow_the_dispatch(out, runtime, tmp_path):
    found = {}
    for dispatch in ("balanced", "primary"):
        counts = tmp_path / f"{dispatch}.json"
        command = [runtime / "llama-perplexity", "-m", out, "-f", HELDOUT, "-c", "512", "--chunks", "4", "-t", "2"]
        command += ["--override-kv", f"rq.dispatch=str:{dispatch}"]
        subprocess.run(
            [str(c) for c in command],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, COUNTS_VARIABLE: str(counts)},
        )
        found[dispatch] = read_counts(counts)
    assert measure_balance(found["balanced"]).reduction > 1.5
    assert measure_balance(found["primary"]).reduction == pytest.approx(1.0)
    for layer in found["primary"].layers:
        assert len(layer.physical) > len(layer.logical) and (layer.physical > 0).sum() <= len(layer.logical)
    assert found["balanced"].n_tokens == 4 * 512


def test_counts_are_not_written_unasked(out, runtime, tmp_path):
    complete(runtime, out)
    assert not list(tmp_path.iterdir())


def test_eval(out, tmp_path):
    report = tmp_path / "eval.json"
    base = out.with_name(out.name + ".rq") / "base.gguf"
    done = rq_gguf("eval", out, "--base", base, "--text", HELDOUT, "--chunks", "8", "--json", report)
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(report.read_text())
    assert 0 < data["quality"]["Mean KLD"]["value"] < 0.01
    assert data["balance"]["reduction"] > 1.5
    for label in ("Mean PPL(Q)", "Mean KLD", "99.9% KLD", "RMS Δp", "Same top p"):
        assert label in done.stdout


def test_server_with_parallel_slots(out, runtime):
    """Four requests at once get what each gets alone."""
    import socket
    import time
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [runtime / "llama-server", "-m", out, "--port", str(port), "--host", "127.0.0.1", "-np", "4", "-c", "2048", "-t", "2"]
    server = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)

        def ask(prompt: str) -> str:
            body = json.dumps({"prompt": prompt, "n_predict": 16, "temperature": 0, "cache_prompt": False}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(json.load(answer)["content"])

        prompts = ["Once upon a time", "The king said", "In the year 1800", "A computer program"]
        alone = [ask(p) for p in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(ask, prompts))
        assert all(alone)
        # sums over batches of other sizes round differently, which may turn a near tie: most must agree
        assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 3
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_session_is_saved_and_restored(out, runtime, tmp_path):
    cache = tmp_path / "session.bin"
    first = complete(runtime, out, "--prompt-cache", cache)
    assert cache.stat().st_size > 0
    assert alike([first, complete(runtime, out, "--prompt-cache", cache)])
