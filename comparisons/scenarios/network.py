"""A network of one's own in which a peer can die without a word.

Needs root, iproute2 and nftables. The namespace has nothing but its loopback, so what is dropped
in it touches nobody else.
"""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

CLONE_NEWNET = 0x40000000  # sched.h; os.setns came with Python 3.12

Result = TypeVar("Result")


class Namespace:
    """A network namespace. Processes enter it with `command`, functions with `call`."""

    def __init__(self) -> None:
        self.name = f"triptych-{os.getpid()}-{threading.get_native_id()}"
        self.command = ("ip", "netns", "exec", self.name)

    def __enter__(self) -> Self:
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        _run(
            *self.command,
            "nft",
            "add table inet dead; add chain inet dead in { type filter hook input priority 0; }",
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        _run("ip", "netns", "delete", self.name)

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """`function(*arguments)` in a thread inside the namespace: its new sockets belong to it."""

        def inside() -> Result:
            libc = ctypes.CDLL(None, use_errno=True)
            with Path("/run/netns", self.name).open("rb") as handle:
                if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return function(*arguments)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()

    def silence(self, port: int) -> None:
        """Lose every packet from and to this TCP port, from now on."""
        for side in ("sport", "dport"):
            _run(*self.command, "nft", f"add rule inet dead in tcp {side} {port} drop")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)
