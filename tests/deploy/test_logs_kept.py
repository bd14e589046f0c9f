"""Logs at the highest rate that clients here reach: nothing is lost, neither while files are rotated
nor where the journal keeps it all.
"""

import json
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable

from callers import HOST, call
from machine import DROP_INS, ECHO, Machine, logs, until, whole

from comparisons.load.burst import Opener
from comparisons.load.job import Job

pytest_plugins = ["installed"]

SESSIONS = 8000


def burst(port: int) -> tuple[int, float]:
    """So many sessions, as fast as one process can have them: their number and the seconds it took."""
    opener = Opener(Job(kind="burst", address=f"{HOST}:{port}"))
    begun = time.monotonic()
    sessions = opener.open_while(lambda opened: opened < SESSIONS, array("q", [0]) * SESSIONS, close=True)
    return sessions, time.monotonic() - begun


def test_files_are_complete_though_they_are_rotated_under_load(
    machine: Machine, engine: str, tell: Callable[[str], None]
) -> None:
    unit = f"triptych-echo@{engine}.service"
    machine("systemctl", "start", unit)
    assert call(ECHO[engine]) == b"hello"
    rotate = threading.Timer(0.3, machine, ("logrotate", "--force", "/etc/logrotate.d/triptych"))
    rotate.start()
    sessions, seconds = burst(ECHO[engine])
    rotate.join()
    rotated = machine.path(f"/var/log/private/triptych/echo-{engine}/log.jsonl.1")
    fresh = rotated.with_suffix("")
    until(fresh.exists, "a new file after the rotation")
    machine("systemctl", "stop", unit)
    assert rotated.read_text(encoding="ascii").count("session_closed") > 0
    assert fresh.read_text(encoding="ascii").count("session_closed") > 0
    lines = logs(machine)[f"echo-{engine}"]
    whole(lines)
    assert (lines[-1]["event"], lines[-1]["lines_dropped"]) == ("service_stopped", 0)
    closed = sum(line["event"] == "session_closed" for line in lines)
    assert closed == lines[-1]["accepted"] == sessions + 1
    tell(
        f"files of {engine}: {lines[-1]['seq'] + 1} lines written, {len(lines)} read, "
        f"{sessions / seconds:.0f} sessions a second, rotated meanwhile"
    )
    # what the journal has is the outline of the same log
    outline = [
        json.loads(line["MESSAGE"])
        for line in machine.journal(f"_SYSTEMD_UNIT={unit}", f"_PID={lines[0]['pid']}", "--boot")
        if line["MESSAGE"].startswith("{")
    ]
    events = [line["event"] for line in outline]
    assert {"listener_opened", "service_ready", "config_reloaded", "service_stopped"} <= set(events)
    assert not {"session_closed", "engine_stats"} & set(events)
    assert all(line in lines for line in outline)


def test_the_journal_is_complete_where_it_keeps_everything(
    machine: Machine, engine: str, tell: Callable[[str], None]
) -> None:
    unit = f"triptych-echo@{engine}.service"
    machine("cp", "-r", "/opt/triptych/journal/.", DROP_INS)
    machine("systemctl", "daemon-reload")
    machine("systemctl", "start", unit)
    pid = machine.show(unit, "MainPID")
    sessions, seconds = burst(ECHO[engine])
    machine("systemctl", "stop", unit)
    machine("journalctl", "--namespace=triptych", "--sync")
    entries = machine.journal("--namespace=triptych", f"_PID={pid}")
    lines = [json.loads(entry["MESSAGE"]) for entry in entries]
    whole(lines)
    assert (lines[-1]["event"], lines[-1]["lines_dropped"]) == ("service_stopped", 0)
    assert sum(line["event"] == "session_closed" for line in lines) == sessions
    assert {(entry["PRIORITY"], line["level"]) for entry, line in zip(entries, lines, strict=True)} == {
        ("6", "info")
    }
    journal = machine("journalctl", "--output=json", "--namespace=triptych", f"_PID={pid}")
    summary = subprocess.run(
        [sys.executable, "-m", "services.cli", "logs", "summary", "--json", "-"],
        input=journal,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(summary.stdout)["sessions"] == sessions
    tell(
        f"journal of {engine}: {lines[-1]['seq'] + 1} lines written, {len(lines)} read, "
        f"{sessions / seconds:.0f} sessions a second"
    )
