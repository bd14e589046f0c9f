"""A service's life under systemd: it comes back when it was killed or hangs, takes a new
configuration, and ends with its sessions, or at their deadline.
"""

import ctypes
import os
import socket
from pathlib import Path

import pytest
from callers import HOST, PATIENCE, call
from machine import DROP_INS, ECHO, Machine, logs, until

pytest_plugins = ["installed"]

# ptrace(2)
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000  # __WALL of waitpid(2): a thread of another process


def start(machine: Machine, engine: str, **settings: str) -> str:
    """The echo service of an engine, with these settings in a drop-in; the unit's name."""
    unit = f"triptych-echo@{engine}.service"
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    machine.write(f"{DROP_INS}/{unit}.d/90-test.conf", "[Service]\n" + "".join(lines))
    machine("systemctl", "daemon-reload")
    machine("systemctl", "start", unit)
    assert call(ECHO[engine]) == b"hello"
    return unit


def configure(machine: Machine, old: str, new: str) -> None:
    config = machine.path("/etc/triptych/echo.toml").read_text(encoding="utf-8")
    assert old in config
    machine.write("/etc/triptych/echo.toml", config.replace(old, new))


class Client:
    """An open session."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), PATIENCE)
        self.echoes()

    def echoes(self) -> None:
        self.socket.sendall(b"still there?")
        assert self.socket.recv(100) == b"still there?"


def test_who_is_killed_is_started_again_and_clients_wait_meanwhile(machine: Machine, engine: str) -> None:
    unit = start(machine, engine)
    killed = machine.show(unit, "MainPID")
    machine("systemctl", "kill", "--signal=KILL", unit)
    until(lambda: machine.show(unit, "MainPID") != killed, "the end of the killed one")
    assert call(ECHO[engine]) == b"hello"
    assert machine.show(unit, "NRestarts") == "1"


def test_a_loop_that_hangs_is_ended_by_the_watchdog(machine: Machine, engine: str) -> None:
    unit = start(machine, engine, WatchdogSec="2s", LimitCORE="0")
    inside = machine.show(unit, "MainPID")
    # only the thread that serves is held: those that report to systemd go on
    traced = host_pid(inside)
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        assert libc.ptrace(request, traced, None, None) == 0, os.strerror(ctypes.get_errno())
    until(lambda: os.waitpid(traced, WALL | os.WNOHANG)[0] == traced, "the hold")
    until(lambda: os.waitpid(traced, WALL | os.WNOHANG)[0] == traced, "the end of the one that hangs")
    assert call(ECHO[engine]) == b"hello"
    assert machine.show(unit, "NRestarts") == "1"
    said = [line["MESSAGE"] for line in machine.journal(f"--unit={unit}", "--boot")]
    assert any("Watchdog timeout (limit 2s)!" in message for message in said)


def host_pid(inside: str) -> int:
    """The host's number of a process that the machine calls `inside`."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text(encoding="utf-8")
        except ProcessLookupError:
            continue
        if f"NSpid:\t{status.parent.name}\t{inside}\n" in text:
            return int(status.parent.name)
    raise AssertionError(f"no process is {inside} in the machine")


def test_who_works_is_left_alone_by_the_watchdog(machine: Machine, engine: str) -> None:
    unit = start(machine, engine, WatchdogSec="2s")
    pid = machine.show(unit, "MainPID")

    def last_ping() -> int:
        return int(machine.show(unit, "WatchdogTimestampMonotonic"))

    first = last_ping()
    until(lambda: last_ping() > first + 3_000_000, "pings for longer than that")
    assert machine.show(unit, "MainPID") == pid


def test_a_good_file_is_taken_up_by_reload_and_open_sessions_stay(machine: Machine, engine: str) -> None:
    unit = start(machine, engine)
    client = Client(ECHO[engine])
    configure(
        machine, '[[listener]]\nname = "echo-udp"\naddress = "systemd:echo-udp"\nservice = "echo"\n', ""
    )
    machine("systemctl", "reload", unit)
    until(lambda: "udp" not in machine.show(unit, "StatusText"), "a status without the listener")
    client.echoes()
    assert call(ECHO[engine]) == b"hello"
    [line] = [line for line in logs(machine)[f"echo-{engine}"] if line["event"] == "config_reloaded"]
    assert (line["removed"], line["kept"]) == (["echo-udp"], ["echo"])
    until(lambda: machine.show(unit, "ActiveState") == "active", "the end of the reload")
    client.socket.close()


def test_a_bad_file_fails_the_reload_and_the_daemon_never_hears_of_it(machine: Machine, engine: str) -> None:
    unit = start(machine, engine)
    client = Client(ECHO[engine])
    configure(machine, '"30s"', '"soon"')
    machine("systemctl", "reload", unit, code=1)
    client.echoes()
    assert call(ECHO[engine]) == b"hello"
    messages = [line["MESSAGE"] for line in machine.journal(f"--unit={unit}", "--priority=err", "--boot")]
    assert any("timeouts.drain: expected a duration" in message for message in messages), messages
    assert not [line for line in logs(machine)[f"echo-{engine}"] if line["event"].startswith("config_")]
    client.socket.close()


def test_a_bad_file_at_sighup_is_refused_by_the_daemon_and_named_in_the_journal(
    machine: Machine, engine: str
) -> None:
    unit = start(machine, engine)
    client = Client(ECHO[engine])
    configure(machine, '"30s"', '"soon"')
    machine("systemctl", "kill", "--kill-whom=main", "--signal=HUP", unit)

    def refusals() -> list[str]:
        journal = machine.journal(f"--unit={unit}", "--priority=err", "--boot")
        return [line["MESSAGE"] for line in journal if "config_refused" in line["MESSAGE"]]

    until(lambda: bool(refusals()), "a refusal in the journal")
    assert "timeouts.drain: expected a duration" in refusals()[0]
    client.echoes()
    assert call(ECHO[engine]) == b"hello"
    [line] = [line for line in logs(machine)[f"echo-{engine}"] if line["event"] == "config_refused"]
    assert line["level"] == "error"
    client.socket.close()


def test_stopping_waits_for_an_open_session_also_beyond_its_timeout(machine: Machine, engine: str) -> None:
    # the daemon has it extended while it drains
    unit = start(machine, engine, TimeoutStopSec="2s", WatchdogSec="2s")
    client = Client(ECHO[engine])
    machine("systemctl", "stop", "--no-block", unit)
    until(lambda: machine.show(unit, "ActiveState") == "deactivating", "the drain")
    until(lambda: machine.show(unit, "StatusText") == f"{engine} draining; 1 sessions", "its status")
    since = os.times().elapsed
    until(lambda: os.times().elapsed > since + 3, "more than its timeout")
    client.echoes()
    client.socket.close()
    until(lambda: machine.show(unit, "ActiveState") == "inactive", "the end of the drain")
    assert (machine.show(unit, "Result"), machine.show(unit, "ExecMainStatus")) == ("success", "0")
    last = logs(machine)[f"echo-{engine}"][-1]
    assert (last["event"], last["cut"]) == ("service_stopped", 0)


def test_a_session_that_goes_on_is_cut_at_the_drain_deadline(machine: Machine, engine: str) -> None:
    configure(machine, '"30s"', '"1s"')
    unit = start(machine, engine)
    client = Client(ECHO[engine])
    machine("systemctl", "stop", unit)
    with pytest.raises(ConnectionResetError):
        client.socket.recv(100)
    assert (machine.show(unit, "Result"), machine.show(unit, "ExecMainStatus")) == ("success", "0")
    lines = logs(machine)[f"echo-{engine}"]
    assert (lines[-1]["event"], lines[-1]["cut"]) == ("service_stopped", 1)
    assert "KD" in {line.get("termination") for line in lines}
    client.socket.close()
