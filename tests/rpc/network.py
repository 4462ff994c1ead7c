"""A network between two namespaces whose delay, loss and connection a test decides.

The kernel's own netem is not everywhere. Here each side has a TUN device in a network namespace of its own, and a thread of the test
carries packets from one to the other: what TCP sees (delay, lost segments, silence) is what it would see on a wire.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_CLONE_NEWNET = 0x40000000
CLIENT, SERVER = "10.93.0.1", "10.93.0.2"


def enter(process: int | None) -> list[str]:
    """The words before a command that is to run in a process's network."""
    return [] if process is None else ["nsenter", f"--net=/proc/{process}/ns/net"]


class Network:
    """Two namespaces, `client` and `server` (a process in each), and the wire between them. Needs root."""

    def __init__(self) -> None:
        self.delay = 0.0
        """Seconds, one way."""
        self.loss = 0.0
        """Share of packets that are lost."""
        self.connected = True
        self.carried = 0
        """Packets delivered."""
        self._random = random.Random(7)
        self._stack = ExitStack()

    def __enter__(self) -> "Network":
        with ExitStack() as stack:
            self.client, self.server = (stack.enter_context(_namespace()) for _ in range(2))
            ends = [_tun(self.client, CLIENT), _tun(self.server, SERVER)]
            for fd in ends:
                stack.callback(os.close, fd)
            stop = threading.Event()
            wire = threading.Thread(target=self._carry, args=(ends, stop), daemon=True)
            wire.start()
            stack.callback(wire.join)
            stack.callback(stop.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _carry(self, ends: list[int], stop: threading.Event) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not stop.is_set():
            wait = min(0.05, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.05
            for fd in select.select(ends, [], [], wait)[0]:
                packet = os.read(fd, 65536)
                if self.connected and self._random.random() >= self.loss:
                    number += 1
                    heapq.heappush(under_way, (time.monotonic() + self.delay, number, ends[1 - ends.index(fd)], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(under_way)
                if self.connected:
                    os.write(fd, packet)
                    self.carried += 1


@contextmanager
def _namespace() -> Iterator[int]:
    """A process in a network namespace of its own."""
    process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{process.pid}/ns/net") == ours:
            assert process.poll() is None, "unshare --net failed"
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _tun(process: int, address: str) -> int:
    """The file of a TUN device in a process's namespace, with an address."""
    opened: list[int] = []

    def in_namespace() -> None:
        """Of this thread only."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{process}/ns/net") as f:
            assert libc.setns(f.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN_NO_PI))
        opened.append(fd)

    thread = threading.Thread(target=in_namespace)
    thread.start()
    thread.join()
    assert opened, "no TUN device could be opened"
    for command in (f"ip addr add {address}/24 dev wire", "ip link set wire up", "ip link set lo up"):
        subprocess.run([*enter(process), *command.split()], check=True)
    return opened[0]


def can_make_networks() -> str:
    """Why not, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    done = subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"no network namespace can be made: {done.stderr.decode(errors='replace').strip()}"
