"""What clients notice when a service is restarted, upgraded, or swapped for another engine: nobody is
refused, nobody is cut, and a long transfer that began before goes on to its end.
"""

from collections.abc import Callable
from pathlib import Path

from callers import Crowd, Transfer, call
from machine import ECHO, ENGINES, FRONT, ROOT, Machine, logs, until

pytest_plugins = ["installed"]

MORE = 40  # sessions, enough to see that clients are served


def test_a_restart_makes_clients_wait_but_refuses_none(
    machine: Machine, engine: str, tell: Callable[[str], None]
) -> None:
    unit, port = f"triptych-echo@{engine}.service", ECHO[engine]
    machine("systemctl", "start", unit)
    old = machine.show(unit, "MainPID")
    transfer = Transfer(port)
    with Crowd(port) as crowd:
        until(lambda: crowd.served > MORE, "clients before the restart")
        machine("systemctl", "restart", "--no-block", unit)
        until(lambda: machine.show(unit, "ActiveState") == "deactivating", "the drain")
        so_far = transfer.received
        until(lambda: transfer.received > so_far + 2**23, "8 MiB more while it drains")
        transferred = transfer.finish()
        until(lambda: machine.show(unit, "MainPID") not in {old, "0"}, "the next process")
        served = crowd.served
        until(lambda: crowd.served > served + MORE, "clients after the restart")
    tell(f"restart of {engine} under load: {crowd}; a transfer of {transferred} bytes ran through")
    assert (crowd.refused, crowd.cut, crowd.offered) == (0, [], crowd.served)
    machine("systemctl", "stop", unit)
    agree(machine, [f"echo-{engine}"], crowd.offered + 1, crowd.offered * crowd.size + transferred)


def test_a_swap_of_engines_is_not_noticed(machine: Machine, tell: Callable[[str], None]) -> None:
    machine("systemctl", "start", *(f"triptych-echo@{each}.service" for each in ENGINES))
    old = "nonblocking"
    machine("systemctl", "start", f"triptych-front@{old}.service")
    sessions = size = 0
    for new in ("twisted", "blocking", "nonblocking"):
        crowd, transferred = swap(machine, old, new)
        tell(f"swap of {old} for {new} under load: {crowd}; a transfer of {transferred} bytes ran through")
        assert (crowd.refused, crowd.cut, crowd.offered) == (0, [], crowd.served)
        sessions += crowd.offered + 1
        size += crowd.offered * crowd.size + transferred
        old = new
    machine("systemctl", "stop", f"triptych-front@{old}.service")
    agree(machine, [f"front-{each}" for each in ENGINES], sessions, size)


def swap(machine: Machine, old: str, new: str) -> tuple[Crowd, int]:
    """The clients that there were meanwhile, and the bytes of a transfer that began before."""
    transfer = Transfer(FRONT)
    with Crowd(FRONT) as crowd:
        until(lambda: crowd.served > MORE, "clients before the swap")
        machine("systemctl", "start", f"triptych-front@{new}.service")
        machine("systemctl", "stop", "--no-block", f"triptych-front@{old}.service")
        until(lambda: machine.show(f"triptych-front@{old}.service", "ActiveState") == "deactivating", "drain")
        served, so_far = crowd.served, transfer.received
        until(lambda: crowd.served > served + MORE, "clients of the new engine")
        until(lambda: transfer.received > so_far + 2**23, "8 MiB more through the old engine")
        transferred = transfer.finish()
        until(lambda: machine.show(f"triptych-front@{old}.service", "ActiveState") == "inactive", "its end")
    return crowd, transferred


def test_an_upgrade_is_not_noticed(machine: Machine, wheels: Path, tell: Callable[[str], None]) -> None:
    machine("systemctl", "start", *(f"triptych-echo@{each}.service" for each in ENGINES))
    machine("systemctl", "start", "triptych-front@nonblocking.service")
    with Crowd(FRONT, clients=1) as crowd:
        until(lambda: crowd.served > MORE, "clients before the upgrade")
        machine(ROOT / "deploy/install", "--wheels", wheels)
        # the old version runs on; then there and back again
        for old, new in (("nonblocking", "twisted"), ("twisted", "nonblocking")):
            machine("systemctl", "start", f"triptych-front@{new}.service")
            machine("systemctl", "stop", f"triptych-front@{old}.service")
    tell(f"upgrade and two swaps under load: {crowd}")
    assert (crowd.refused, crowd.cut, crowd.offered) == (0, [], crowd.served)
    assert call(FRONT) == b"hello"


def agree(machine: Machine, names: list[str], sessions: int, size: int) -> None:
    """The logs know of every session that there was, and of every byte."""
    closed = [line for name in names for line in logs(machine)[name] if line["event"] == "session_closed"]
    assert len(closed) == sessions
    assert {line["termination"] for line in closed} == {"--"}
    assert sum(line["bytes_s2c"] for line in closed) == size
