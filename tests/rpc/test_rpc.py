"""llama.cpp's RPC backend with files of experts in tiers: right results wherever layers and experts are, and clear words where it fails."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import need
from rpc.conftest import CHUNKS, ROOT, Programs
from rpc.network import SERVER, Network, can_make_networks, enter

from rq_gguf.runtime.rpc import Server, rpc_server

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

REFUSED = "cannot be used: it does not answer, has another version, or has no device"


@pytest.fixture(scope="module")
def servers(patched: Programs) -> Iterator[tuple[Server, Server]]:
    """Two of them on this machine."""
    with rpc_server(patched.server) as a, rpc_server(patched.server) as b:
        yield a, b


@pytest.fixture(params=["tiered", "primary", "stock"])
def case(request: pytest.FixtureRequest, tiered_demo: Path, stock_demo: Path) -> tuple[Path, tuple[str, ...]]:
    """(a model, options): tiers with copies, the same without the copies, a stock file."""
    if request.param == "stock":
        return stock_demo, ()
    return tiered_demo, ("--override-kv", "rq.dispatch=str:primary") if request.param == "primary" else ()


@pytest.mark.parametrize(
    "where", ["layers over two servers", "all on one server", "two layers on a server", "experts of two layers on a server"]
)
def test_the_same_text(
    where: str, case: tuple[Path, tuple[str, ...]], servers: tuple[Server, Server], patched: Programs, local_text: Callable[..., str]
) -> None:
    a, b = (s.endpoint for s in servers)
    options = {
        "layers over two servers": ["--rpc", f"{a},{b}", "-ngl", "99"],
        "all on one server": ["--rpc", a, "-ngl", "99"],
        "two layers on a server": ["--rpc", a, "-ngl", "2"],
        "experts of two layers on a server": ["--rpc", a, "-ngl", "0", "-ot", rf"blk\.[12]\.ffn_(gate|up|down)_exps.*=RPC0[{a}]"],
    }[where]
    model, more = case
    done = patched.generate(model, "--no-repack", "-v", *options, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"RPC\d.*(model|compute) buffer size = +[1-9.]", done.stderr), done.stderr[-3000:]
    assert done.stdout == local_text(model, *more)


def test_the_same_logits(tiered_demo: Path, servers: tuple[Server, Server], patched: Programs, tmp_path: Path) -> None:
    text = ROOT / "rq_gguf" / "data" / "heldout.txt"
    common = [
        str(patched.folder / "llama-perplexity"),
        "-m",
        str(tiered_demo),
        "-f",
        str(text),
        "--chunks",
        CHUNKS,
        "-c",
        "512",
        "-t",
        "1",
        "--no-repack",
    ]
    logits = ["--kl-divergence-base", str(tmp_path / "logits.bin")]
    subprocess.run([*common, *logits, "-ngl", "0"], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    a, b = (s.endpoint for s in servers)
    done = subprocess.run(
        [*common, *logits, "--kl-divergence", "--rpc", f"{a},{b}", "-ngl", "99"],
        check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found = re.search(r"Mean +KLD: +(-?[\d.]+)", done.stdout)
    assert found is not None, done.stdout[-2000:]
    # logits are kept in 16 bits, of the range that a position's take
    assert abs(float(found[1])) < 1e-5
    same = re.search(r"Same top p: +([\d.]+)", done.stdout)
    assert same is not None and float(same[1]) > 99.8


def test_split_mode_tensor(tiered_demo: Path, stock_demo: Path, servers: tuple[Server, Server], patched: Programs) -> None:
    """Each tensor cut over both servers: stock files run, tiers are refused with a sentence."""
    options = ("--rpc", ",".join(s.endpoint for s in servers), "-ngl", "99", "-sm", "tensor")
    assert patched.generate(stock_demo, *options, tokens=8).returncode == 0
    done = patched.generate(tiered_demo, *options, tokens=8)
    assert done.returncode == 1, done.returncode
    assert "split mode 'tensor' does not support experts in tiers, use split mode 'layer'" in done.stderr, done.stderr[-2000:]


def test_what_a_server_has_kept_is_not_sent_again(patched: Programs, large: Path, tmp_path: Path) -> None:
    texts, seconds = [], []
    with rpc_server(patched.server, "-c", cache=tmp_path / "cache") as server:
        for _ in range(2):
            begin = time.monotonic()
            done = patched.generate(large, "--no-repack", "--rpc", server.endpoint, "-ngl", "99", tokens=8)
            seconds.append(time.monotonic() - begin)
            assert done.returncode == 0, done.stderr[-2000:]
            texts.append(done.stdout)
            kept = {p.name for p in (tmp_path / "cache").glob("**/*") if p.is_file()}
            assert len(kept) >= 2, "no tensor was kept"
    assert texts[0] == texts[1] == patched.generate(large, "--no-repack", tokens=8).stdout


def test_an_unpatched_server_is_refused(patched: Programs, stock: Programs, tiered_demo: Path, stock_demo: Path) -> None:
    with rpc_server(stock.server) as server:
        for model in (tiered_demo, stock_demo):
            done = patched.generate(model, "--rpc", server.endpoint, "-ngl", "99")
            assert done.returncode == 1 and REFUSED in done.stdout + done.stderr, done.stderr[-2000:]
            assert "version mismatch: 7.0.0" in done.stdout + done.stderr
        bench = [str(patched.folder / "llama-bench"), "-m", str(tiered_demo), "-p", "8", "-n", "0", "--rpc", server.endpoint]
        done = subprocess.run(bench, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 1 and REFUSED in done.stderr
        assert server.process.poll() is None
        assert stock.generate(stock_demo, "--rpc", server.endpoint, "-ngl", "99").returncode == 0


def test_an_unpatched_client_is_refused(patched: Programs, stock: Programs, stock_demo: Path) -> None:
    """Stock llama.cpp ends itself (SIGABRT) wherever a handshake fails; it does here too, with its own sentence."""
    with rpc_server(patched.server) as server:
        done = stock.generate(stock_demo, "--rpc", server.endpoint, "-ngl", "99")
        assert done.returncode != 0
        assert "RPC server version mismatch: 8.0.0" in done.stdout + done.stderr, done.stderr[-2000:]
        assert server.process.poll() is None
        assert patched.generate(stock_demo, "--rpc", server.endpoint, "-ngl", "99").returncode == 0


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "127.0.0.1"])
def test_a_server_that_is_not_there(endpoint: str, patched: Programs, tiered_demo: Path) -> None:
    """Nothing listens at the port, or there is none in the name. Stock aborts."""
    for program in ("llama-completion", "llama-bench"):
        command = [str(patched.folder / program), "-m", str(tiered_demo), "-n", "1", "--rpc", endpoint]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 1 and f"RPC server {endpoint} {REFUSED}" in done.stdout + done.stderr, done.stderr[-2000:]


def generation(build: Programs, model: Path, server: Server | None, tokens: int, *before: str) -> list[str]:
    """The command of a client that generates until something ends it; without a server, of one that says what is right."""
    command = [*before, str(build.folder / "llama-completion"), "-m", str(model), "-p", "Once", "-n", str(tokens), "-no-cnv", "-c", "512"]
    command += ["--temp", "0", "-t", "1", "--ignore-eos", "--context-shift", "--no-repack"]
    return [*command, "--rpc", server.endpoint, "-ngl", "99"] if server else command


def start(command: list[str]) -> "tuple[subprocess.Popen[bytes], bytes]":
    """A client that has begun to generate, and what it printed by then. It prints no backtrace, which would be on stdout."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    client = subprocess.Popen(command, bufsize=0, env=environment, **pipes)
    assert client.stdout is not None
    begun = b""
    while len(begun) < 60 and (more := client.stdout.read(60)):
        begun += more
    return client, begun


def right_text(build: Programs, model: Path) -> bytes:
    """What 150 tokens are without a server."""
    return subprocess.run(generation(build, model, None, 150), capture_output=True, stdin=subprocess.DEVNULL, check=True).stdout.strip()


def same_as_far_as_both_go(printed: bytes, right: bytes) -> bool:
    printed = printed.strip()
    common = min(len(printed), len(right))
    return common >= 50 and printed[:common] == right[:common]


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_server_that_dies(end: str, patched: Programs, stock: Programs, tiered_demo: Path, stock_demo: Path) -> None:
    """The client ends at once and says why. Stock ends too, and often by SIGPIPE without a word."""
    for build, model in ((patched, tiered_demo), (stock, stock_demo)):
        with rpc_server(build.server) as server:
            client, begun = start(generation(build, model, server, 100_000))
            getattr(server.process, end)()
            begin = time.monotonic()
            rest, errors = client.communicate(timeout=60)
            assert time.monotonic() - begin < 10
            assert client.returncode != 0
            assert same_as_far_as_both_go(begun + rest, right_text(build, model))
            if build is patched:
                assert b"Remote RPC server crashed" in errors, errors[-2000:]


@pytest.fixture
def network() -> Iterator[Network]:
    why = can_make_networks()
    need(not why, why)
    with Network() as made:
        yield made


def generate(network: Network, server: Server, patched: Programs, model: Path, tokens: int = 32) -> "subprocess.CompletedProcess[str]":
    return patched.generate(
        model, "--no-repack", "--rpc", server.endpoint, "-ngl", "99", before=tuple(enter(network.client)), tokens=tokens
    )


def test_delay_and_loss_change_no_word(network: Network, patched: Programs, tiered_demo: Path, local_text: Callable[..., str]) -> None:
    network.delay, network.loss = 0.005, 0.01
    with rpc_server(patched.server, host=SERVER, before=enter(network.server)) as server:
        done = generate(network, server, patched, tiered_demo)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == local_text(tiered_demo)
    assert network.carried > 1000


@pytest.mark.parametrize("healed", [True, False])
def test_a_lost_connection(healed: bool, network: Network, patched: Programs, tiered_demo: Path) -> None:
    """One that comes back after three seconds changes nothing; one that does not is noticed after a minute."""
    network.delay = 0.01
    with rpc_server(patched.server, host=SERVER, before=enter(network.server)) as server:
        client, begun = start(generation(patched, tiered_demo, server, 150, *enter(network.client)))
        network.connected = False
        begin = time.monotonic()
        if healed:
            time.sleep(3)
            network.connected = True
        rest, errors = client.communicate(timeout=180)
    right = right_text(patched, tiered_demo)
    if healed:
        assert client.returncode == 0 and (begun + rest).strip() == right
    else:
        assert same_as_far_as_both_go(begun + rest, right)
        assert client.returncode != 0 and b"Remote RPC server crashed" in errors, errors[-2000:]
        assert 20 < time.monotonic() - begin < 100
