"""A daemon with everything a scenario may ask for, and the upstreams that it dials.

One listener for each service and transport, one upstream listener for each proxy (and a proxy with
two), so that scenarios share a daemon: only other settings need another one.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from daemons import Daemon, Line, configuration

from comparisons.conformance.lines import Ended
from comparisons.scenarios.rules import Rule, Transport
from comparisons.scenarios.wire import Subject, bound, clear, listen
from services.core.addresses import Address

SETTINGS = {"log.level": "debug", "limits.buffer": "64KiB", "timeouts.udp_idle": "1s"}


class Stage:
    """A daemon of `engine` with `settings`, its upstreams and its log; its proxies suffer `faults`."""

    def __init__(
        self,
        engine: str,
        settings: Mapping[str, str],
        prefix: Sequence[str] = (),
        faults: Sequence[Mapping[str, object]] = (),
    ) -> None:
        self._settings = {**SETTINGS, **settings}
        self._stack = ExitStack()
        # a UNIX socket's path has at most 107 bytes, and pytest's directories are deep
        self._directory = Path(tempfile.mkdtemp(prefix="triptych-"))
        self._stack.callback(shutil.rmtree, self._directory)
        hosts = {
            "tcp4": Address("tcp", "127.0.0.1"),
            "tcp6": Address("tcp", "::1"),
            "unix": Address("unix", f"{self._directory}/upstream.sock"),
        }
        pools = {"tcp4x1": ("tcp4",), "tcp4x2": ("tcp4", "tcp4"), "tcp6x1": ("tcp6",), "unixx1": ("unix",)}
        self._upstreams = {
            pool: tuple(self._stack.enter_context(listen(hosts[host])) for host in members)
            for pool, members in pools.items()
        }
        hosts["unix"] = Address("unix", f"{self._directory}/listener.sock")
        listeners: list[dict[str, object]] = [
            {"name": f"echo-{transport}", "address": address, "service": "echo"}
            for transport, address in (
                ("tcp4", "127.0.0.1:0"),
                ("tcp6", "[::1]:0"),
                ("unix", f"unix:{self._directory}/echo.sock"),
                ("udp4", "udp:127.0.0.1:0"),
                ("udp6", "udp:[::1]:0"),
            )
        ]
        listeners += [
            {
                "name": f"proxy-{pool}",
                "address": str(hosts[pool[:4]]),
                "service": "proxy",
                "pool": pool,
                "faults": faults,
            }
            for pool in pools
        ]
        config = configuration(
            engine,
            listeners,
            {pool: [bound(sock) for sock in sockets] for pool, sockets in self._upstreams.items()},
            self._settings,
        )
        try:
            self.daemon = Daemon(self._directory, config, prefix)
        except BaseException:
            self._stack.close()
            raise
        self._addresses = {
            str(listener["name"]): address
            for listener, address in zip(listeners, self.daemon.addresses, strict=True)
        }
        self._mark = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._stack:
            self.daemon.stop()

    def subject(self, service: str, transport: Transport = "tcp4", upstreams: int = 1) -> Subject:
        """What a scenario gets; from here on `ended` counts."""
        self._settle()
        self._mark = len(self.daemon.closed())
        if service == "echo":
            return Subject(self._addresses[f"echo-{transport}"], (), self.daemon.pid)
        pool = f"{transport}x{upstreams}"
        for listener in self._upstreams[pool]:
            clear(listener)
        return Subject(self._addresses[f"proxy-{pool}"], self._upstreams[pool], self.daemon.pid)

    def subject_of(self, rule: Rule, transport: Transport) -> Subject:
        return self.subject(rule.service, transport, rule.upstreams)

    def ended(self, count: int = 1) -> list[Line]:
        """The session_closed lines since `subject`, when there are `count`; more would be wrong."""
        found = self.daemon.wait_for("session_closed", self._mark + count)[self._mark :]
        assert len(found) == count
        for line in found:
            assert line["peak_buffer"] <= self._buffer(), f"more in user space than the limit: {line}"
        assert not self.daemon.lines("engine_fault")
        return found

    def endings(self, count: int = 1) -> list[Ended]:
        """The same lines, down to what every engine must say alike."""
        return [Ended.of(line) for line in self.ended(count)]

    def _settle(self) -> None:
        """A test that failed may have left sessions open: their lines are not the next one's."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            if len(self.daemon.lines("session_opened")) == len(self.daemon.closed()):
                return
            time.sleep(0.005)

    def _buffer(self) -> int:
        return {"1B": 1, "1KiB": 1024, "64KiB": 65_536}[self._settings["limits.buffer"]]
