"""A daemon under test: a real process, from its configuration file to its last line.

However a test went, `Daemon.stop` holds the daemon to what every daemon owes: exit code 0, nothing
on stdout or stderr, every log line valid by the shipped schema, no line lost, no fault of its own,
and totals that agree with the lines.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from services.core.addresses import Address
from services.vocabulary import json_schema

PATIENCE = 10.0  # seconds for anything that a daemon should do at once
Line = dict[str, Any]


@cache
def validators() -> dict[str, Draft202012Validator]:
    """One for each event, by its name: which of them a line must satisfy is no question of trying."""
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    found = {}
    for choice in schema["oneOf"]:
        definition = schema["$defs"][choice["$ref"].rpartition("/")[2]]
        name = definition["properties"]["event"]["const"]
        found[name] = Draft202012Validator({**choice, "$defs": schema["$defs"]})
    return found


def configuration(
    engine: str,
    listeners: Sequence[Mapping[str, object]],
    pools: Mapping[str, Sequence[Address]] | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """A configuration file's text. `settings` are dotted keys, as in {"timeouts.idle": "1s"}."""

    def value(of: object) -> str:
        if isinstance(of, Mapping):
            return "{ " + ", ".join(f"{key} = {value(item)}" for key, item in of.items()) + " }"
        if isinstance(of, Sequence) and not isinstance(of, str):
            return "[" + ", ".join(map(value, of)) + "]"
        # what JSON writes for text, numbers and booleans, TOML reads as the same
        return json.dumps(of)

    lines = [f"{key} = {value(setting)}" for key, setting in {"engine": engine, **(settings or {})}.items()]
    lines.append(f"listener = {value(listeners)}")
    for name, upstreams in (pools or {}).items():
        lines.append(f"pool.{name}.upstreams = {value([{'address': str(each)} for each in upstreams])}")
    return "\n".join(lines) + "\n"


class Daemon:
    """`triptych serve`, ready when this returns."""

    def __init__(self, directory: Path, config: str, prefix: Sequence[str] = ()) -> None:
        path = directory / "triptych.toml"
        path.write_text(config, encoding="utf-8")
        self._log = directory / "log.jsonl"
        self._output = directory / "output.txt"
        self._lines: list[Line] = []
        self._offset = 0
        self.stopped = False
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "services.cli",
                    "serve",
                    "--config",
                    path,
                    "--log",
                    self._log,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid
        try:
            (ready,) = self.wait_for("service_ready")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self.addresses = [Address.parse(text) for text in ready["addresses"]]

    def lines(self, event: str | None = None) -> list[Line]:
        """The log so far, whole lines only."""
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._offset)
                text = log.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._lines += map(json.loads, whole.splitlines())
        return [line for line in self._lines if event in {None, line["event"]}]

    def follow_rotation(self) -> None:
        """The log was moved away and all of it has been read: go on at the beginning of the new one."""
        self._offset = 0

    def closed(self) -> list[Line]:
        return self.lines("session_closed")

    def wait_for(
        self,
        event: str,
        count: int = 1,
        predicate: Callable[[Line], bool] = lambda _: True,
        *,
        within: float = PATIENCE,
    ) -> list[Line]:
        """The lines of `event` that satisfy `predicate`, as soon as there are `count` of them."""
        deadline = time.monotonic() + within
        while True:
            found = [line for line in self.lines(event) if predicate(line)]
            if len(found) >= count:
                return found
            assert self._process.poll() is None or self.stopped, f"the daemon ended: {self._said()}"
            assert time.monotonic() < deadline, (
                f"{len(found)} of {count} {event} in {within} s; stderr: {self._said()}; "
                f"last lines: {self.lines()[-5:]}"
            )
            time.sleep(0.005)

    def stop(self) -> Line:
        """SIGTERM, the end, and what every daemon owes. Returns its last line."""
        if not self.stopped:
            os.kill(self.pid, signal.SIGTERM)
        return self.ended()

    def ended(self) -> Line:
        """The same for a daemon that was told to stop already."""
        if not self.stopped:
            self.stopped = True
            try:
                code = self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise
            assert code == 0, f"exit code {code}: {self._said()}"
            self._owes()
        return self.lines()[-1]

    def _owes(self) -> None:
        assert self._said() == ""
        lines = self.lines()
        for line in lines:
            assert line["event"] in validators(), f"no event of the vocabulary: {line}"
            faults = [error.message for error in validators()[line["event"]].iter_errors(line)]
            assert not faults, f"{faults} in {line}"
        assert not self.lines("engine_fault")
        assert [line["seq"] for line in lines] == list(range(len(lines)))
        last, closed = lines[-1], self.closed()
        assert last["event"] == "service_stopped"
        assert last["accepted"] == last["closed"] == len(closed)
        assert last["open_sessions"] == 0
        for total in ("bytes_c2s", "bytes_s2c"):
            assert last[total] == sum(line[total] for line in closed), total

    def _said(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")
