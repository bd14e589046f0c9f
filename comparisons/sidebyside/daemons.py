"""The daemons behind a split or a shadow: what they are told, and their processes.

A daemon gets its sockets as a service manager would hand them over (sd_listen_fds(3)), so it is the same
`triptych serve` as anywhere. All that is known of its sessions is its log.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.systemd import FIRST

# what the sockets are handed over as, and the listener is called in the log
LISTENER = "front"
# a daemon of ours is none of the service manager's that may have started us
NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def configuration(
    engine: str,
    service: str,
    upstreams: Sequence[str],
    *,
    log: Mapping[str, object],
    listener: Mapping[str, object],
    timeouts: Mapping[str, object],
) -> str:
    """What `triptych serve` is told, as TOML; `listener` is what it has beside name, address and service."""
    own = {"name": LISTENER, "address": f"systemd:{LISTENER}", "service": service, **listener}
    if upstreams:
        own["pool"] = "upstream"
    keys: dict[str, object] = {"engine": engine, "log": log, "timeouts": timeouts, "listener": [own]}
    if upstreams:
        keys["pool"] = {"upstream": {"upstreams": [{"address": each} for each in upstreams]}}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in keys.items())


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(of)}" for key, of in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # what JSON writes for text, numbers and booleans, TOML reads as the same
    return json.dumps(value)


class Daemon:
    """A child of ours that runs `triptych serve`; `name` is the instance in its log."""

    def __init__(self, name: str, config: Path, sockets: Sequence[socket.socket], stderr: Path) -> None:
        self._name = name
        self._stderr = stderr
        self._status: int | None = None
        root = str(Path(__file__).parents[2])
        environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment["LISTEN_FDS"] = str(len(sockets))
        environment["LISTEN_FDNAMES"] = ":".join([LISTENER] * len(sockets))
        arguments = [sys.executable, "-P", "-m", "services.cli", "serve"]
        arguments += ["--config", str(config), "--instance", name]
        with contextlib.ExitStack() as stack:
            # out of the way of the numbers that they get in the child
            above = FIRST + len(sockets)
            copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in sockets]
            for copy in copies:
                stack.callback(os.close, copy)
            # the protocol wants to know the child's own pid, which the child alone knows before it is another
            # program; a session of its own, so that Ctrl-C reaches only us
            self.pid = os.posix_spawnp(
                "sh",
                ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *arguments],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(stderr), os.O_WRONLY | os.O_CREAT, 0o600),
                    *((os.POSIX_SPAWN_DUP2, copy, FIRST + at) for at, copy in enumerate(copies)),
                ],
                setsid=True,
                setsigmask=(),
            )

    def send(self, number: signal.Signals) -> None:
        if self.runs():
            os.kill(self.pid, number)

    def runs(self) -> bool:
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is None

    def how_it_ended(self) -> str:
        status = self._status or 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        said = [line for line in self._stderr.read_text(errors="replace").splitlines() if line.strip()]
        return f"the daemon of {self._name} ended with {how}: {said[-1] if said else 'nothing on stderr'}"

    def kill(self) -> None:
        if self.runs():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
