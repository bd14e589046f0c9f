"""A whole Debian with systemd as its first process, booted in a container for the tests.

Its root is made once by debootstrap and kept below the system's folder for temporary files; nothing
ever writes to it, since each machine runs on an overlay in memory that is gone when it is switched
off. A machine shares the host's network unless told otherwise: 127.0.0.1 in it is 127.0.0.1 here.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

CACHE = Path(tempfile.gettempdir()) / "triptych-tests"
# beside Debian's minimal system; a part of the name under which the root is kept
PACKAGES = ("dbus", "logrotate", "python3", "python3-venv", "systemd", "systemd-sysv")
ROOT = Path(__file__).parents[2]
ENGINES = ("blocking", "nonblocking", "twisted")
# as in deploy/units
ECHO = {"blocking": 7001, "nonblocking": 7002, "twisted": 7003}
PROXY = {"blocking": 8001, "nonblocking": 8002, "twisted": 8003}
FRONT = 8000
SPLIT = 8010
SHADOW = 8020
# drop-ins of a test: gone with the machine, and before that with the test
DROP_INS = "/run/systemd/system"
LOGS = "/var/log/private/triptych"
PATIENCE = 30.0  # seconds for what takes one or two on an idle machine


def run(*command: str | Path, code: int = 0, within: float = 300, **more: Any) -> str:
    """What a command says on stdout. It must end with `code`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=within, **more)
    assert done.returncode == code, f"{command}: exit code {done.returncode}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def until(true: Callable[[], bool], what: str, within: float = PATIENCE) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not in {within:g} s: {what}"
        time.sleep(0.02)


@cache
def debian() -> Path:
    """The root of the Debian release that this machine runs, from the mirror that this machine uses."""
    suite = run("sh", "-c", '. /etc/os-release; printf %s "$VERSION_CODENAME"')
    root = CACHE / f"{suite}-{hashlib.sha256(' '.join(PACKAGES).encode()).hexdigest()[:8]}"
    if not root.exists():
        form = "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)"
        targets = map(str.split, run("apt-get", "indextargets", "--format", form).splitlines())
        mirror = next(words[3] for words in targets if words[:3] == ["Packages", suite, "main"])
        CACHE.mkdir(mode=0o700, exist_ok=True)
        # moved in place once it is whole
        unfinished = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            run(
                "debootstrap",
                "--variant=minbase",
                f"--include={','.join(PACKAGES)}",
                suite,
                unfinished,
                mirror,
            )
            shutil.rmtree(unfinished / "var/cache/apt/archives")
            unfinished.chmod(0o755)
            unfinished.rename(root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


class Machine:
    """Booted when this returns. `folders` of the host are there too, read-only, by the same names."""

    def __init__(self, root: Path, folders: Sequence[Path] = (), *, network: bool = True) -> None:
        self._console = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the machine runs
        self._nspawn = subprocess.Popen(
            [
                "systemd-nspawn",
                "--quiet",
                "--boot",
                f"--directory={root}",
                "--volatile=overlay",
                "--register=no",
                "--keep-unit",
                "--console=pipe",
                *([] if network else ["--private-network"]),
                *(f"--bind-ro={folder}" for folder in folders),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=self._console,
        )
        try:
            until(self._is_booted, "the end of its start")
        except BaseException as error:
            self._console.seek(0)
            error.add_note(self._console.read().decode(errors="replace"))
            self._leave()
            raise

    def __call__(self, *command: str | Path, code: int = 0, **more: Any) -> str:
        """What a command says that root runs in the machine. It must end with `code`."""
        return run(*self._enter(), *command, code=code, **more)

    def path(self, inside: str) -> Path:
        """Where the host finds a file of the machine (but for links that begin with /)."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def write(self, inside: str, text: str) -> None:
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text, encoding="utf-8")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit, such as MainPID."""
        return self("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, *arguments: str) -> list[dict[str, Any]]:
        lines = self("journalctl", "--output=json", "--all", *arguments).splitlines()
        return [json.loads(line) for line in lines]

    def off(self) -> None:
        """Shuts it down; it is gone when this returns."""
        try:
            # what an init takes for `poweroff` (systemd(1))
            os.kill(self.leader, signal.SIGRTMIN + 4)
            self._nspawn.wait(PATIENCE)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._nspawn.kill()
        self._nspawn.wait()
        self._console.close()

    def _enter(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.leader}", "--all", "--")

    def _is_booted(self) -> bool:
        # systemd-nspawn has another child for a moment, before the one that is the machine's init
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        pids = children.read_text(encoding="ascii").split()
        if not pids:
            return False
        self.leader = int(pids[-1])
        asked = subprocess.run(
            [*self._enter(), "systemctl", "is-system-running"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() in {"running", "degraded"}


def logs(machine: Machine) -> dict[str, list[dict[str, Any]]]:
    """Every log by its name, such as echo-blocking; a rotated one's lines come before the newer ones."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(machine.path(LOGS).glob("*/log.jsonl*"), reverse=True):
        lines = path.read_text(encoding="ascii").splitlines()
        found.setdefault(path.parent.name, []).extend(map(json.loads, lines))
    return found


def whole(lines: list[dict[str, Any]]) -> None:
    expected: dict[int, int] = {}
    for line in lines:
        assert line["seq"] == expected.get(line["pid"], 0), line
        expected[line["pid"]] = line["seq"] + 1
        assert line["event"] not in {"log_dropped", "engine_fault"}, line
