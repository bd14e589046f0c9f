"""The units: sound by systemd's own judgement, closed to what they do not need, and started in every
way that they can be.
"""

import json
import socket
from collections.abc import Callable

import pytest
from callers import call, call_udp
from machine import DROP_INS, ECHO, ENGINES, PATIENCE, PROXY, SHADOW, SPLIT, Machine, logs, until

pytest_plugins = ["installed"]

# the least exposed services of Debian 12 with sockets of their own are at 2.0
EXPOSURE = {"echo": 5, "proxy": 11, "front": 11, "split": 11}  # in tenths, at most


def units(machine: Machine) -> list[str]:
    """All units, the templates once for each engine."""
    folder = machine.path("/usr/local/lib/systemd/system")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert len(names) == 18
    return [name.replace("@.", f"@{each}.") for name in names for each in (ENGINES if "@." in name else [""])]


def test_systemd_finds_nothing_to_say_about_the_units(machine: Machine) -> None:
    said = machine("sh", "-c", 'systemd-analyze verify "$@" 2>&1', "sh", *units(machine))
    assert said == ""


@pytest.mark.parametrize("service", EXPOSURE)
def test_the_sandbox_leaves_little_exposed(
    machine: Machine, engine: str, service: str, tell: Callable[[str], None]
) -> None:
    unit = f"triptych-{service}@{engine}.service"
    gate = f"--threshold={EXPOSURE[service]}"
    # its exit code is the gate
    items = json.loads(machine("systemd-analyze", "security", "--offline=true", gate, "--json=short", unit))
    assert len(items) > 50
    said = machine("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
    tell(said.splitlines()[-1].strip("→ ").rpartition(" ")[0])


def test_the_sandbox_of_the_shadow_leaves_as_little_exposed(machine: Machine) -> None:
    command = ("systemd-analyze", "security", "--offline=true", "--threshold=11")
    machine(*command, "triptych-shadow.service")


def test_the_target_starts_the_three_side_by_side_and_stops_them(machine: Machine) -> None:
    machine("systemctl", "start", "triptych.target")
    for engine in ENGINES:
        assert call(ECHO[engine]) == call_udp(ECHO[engine]) == call(PROXY[engine]) == b"hello"
        for service in ("echo", "proxy"):
            status = machine.show(f"triptych-{service}@{engine}.service", "StatusText")
            assert status.startswith(f"{engine} on 127.0.0.1:"), status
    machine("systemctl", "stop", "triptych.target")
    # the target itself is quicker than the services, which drain
    left = ("systemctl", "list-units", "--plain", "--no-legend", "triptych-*")
    until(lambda: machine(*left) == "", "all stopped")
    for name, lines in logs(machine).items():
        engine = name.partition("-")[2]
        assert {(line["engine"], line["instance"]) for line in lines} == {(engine, engine)}
        assert lines[-1]["event"] == "service_stopped"
        assert all(line["inherited"] for line in lines if line["event"] == "listener_opened")


def test_the_first_client_starts_the_service_tcp(machine: Machine, engine: str) -> None:
    machine("systemctl", "start", f"triptych-proxy@{engine}.socket", f"triptych-echo@{engine}.socket")
    machine.write(
        "/etc/triptych/proxy.toml",
        machine.path("/etc/triptych/proxy.toml")
        .read_text(encoding="utf-8")
        .replace("7001", str(ECHO[engine]))
        .replace('    { address = "127.0.0.1:7002" },\n    { address = "127.0.0.1:7003" },\n', ""),
    )
    assert machine.show(f"triptych-proxy@{engine}.service", "ActiveState") == "inactive"
    assert call(PROXY[engine], b"x" * 100_000) == b"x" * 100_000
    assert machine.show(f"triptych-proxy@{engine}.service", "ActiveState") == "active"
    assert machine.show(f"triptych-echo@{engine}.service", "ActiveState") == "active"


def test_the_first_client_starts_the_service_udp(machine: Machine, engine: str) -> None:
    machine("systemctl", "start", f"triptych-echo-udp@{engine}.socket")
    assert machine.show(f"triptych-echo@{engine}.service", "ActiveState") == "inactive"
    assert call_udp(ECHO[engine]) == b"hello"
    assert machine.show(f"triptych-echo@{engine}.service", "ActiveState") == "active"


def test_the_split_deals_one_port_to_three_engines_and_a_control(machine: Machine) -> None:
    dealt = 400
    machine("systemctl", "start", "triptych-split.target", "triptych.target")
    for _ in range(dealt):
        assert call(SPLIT) == b"hello"
    machine("systemctl", "stop", "triptych-split.target")
    units = [f"triptych-split@{instance}.service" for instance in (*ENGINES, "control")]
    until(lambda: all(machine.show(unit, "ActiveState") == "inactive" for unit in units), "all stopped")
    found = logs(machine)
    shares = {}
    for instance in (*ENGINES, "control"):
        lines = [line for line in found[f"split-{instance}"] if line["event"] == "session_closed"]
        engine = "nonblocking" if instance == "control" else instance
        assert {(line["engine"], line["instance"]) for line in lines} == {(engine, instance)}
        shares[instance] = len(lines)
    assert sum(shares.values()) == dealt
    # a hundred each, give or take six standard deviations
    assert all(48 <= share <= 152 for share in shares.values()), shares


def test_the_shadow_is_started_by_its_first_client_compares_and_drains(machine: Machine) -> None:
    unit = "triptych-shadow.service"
    machine("systemctl", "start", "triptych-echo@nonblocking.service", "triptych-shadow.socket")
    assert machine.show(unit, "ActiveState") == "inactive"
    # as it was installed: without the extra, so without what its table needs
    assert not list(machine.path("/opt/triptych/lib").glob("python*/site-packages/rich"))
    assert call(SHADOW, b"x" * 100_000) == b"x" * 100_000
    assert machine.show(unit, "StatusText").startswith("on 127.0.0.1:8020; ")
    invocation = machine.show(unit, "InvocationID")
    machine("systemctl", "reload", unit)
    with socket.create_connection(("127.0.0.1", SHADOW), PATIENCE) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        machine("systemctl", "stop", "--no-block", "triptych-shadow.socket", unit)
        until(lambda: machine.show(unit, "StatusText").startswith("draining; "), "draining")
        client.sendall(b"world")
        assert client.recv(5) == b"world"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    until(lambda: machine.show(unit, "ActiveState") == "inactive", "stopped")
    assert machine.show(unit, "Result") == "success"
    *lines, last = logs(machine)["shadow"]
    assert (last["event"], last["sessions"], last["sessions_cut"]) == ("shadow_stopped", 2, 0)
    assert [line["bytes_c2s"] for line in lines] == [100_000, 10]
    for line in lines:
        assert [line[f"{name}_verdict"] for name in ("control", "blocking", "twisted")] == ["same"] * 3
    machine("journalctl", "--sync")
    told = machine.journal(f"_SYSTEMD_INVOCATION_ID={invocation}", "SYSLOG_IDENTIFIER=triptych-shadow")
    # what is no error is not told as one, and sessions are in the log alone
    assert {line["PRIORITY"] for line in told} == {"5"}
    assert 2 <= len(told) <= 3


def test_the_shadow_logs_to_the_journal_where_that_keeps_everything(machine: Machine) -> None:
    machine("cp", "-r", "/opt/triptych/journal/.", DROP_INS)
    machine("systemctl", "daemon-reload")
    machine("systemctl", "start", "triptych-echo@nonblocking.service", "triptych-shadow.service")
    pid = machine.show("triptych-shadow.service", "MainPID")
    assert call(SHADOW) == b"hello"
    machine("systemctl", "stop", "triptych-shadow.socket", "triptych-shadow.service")
    machine("journalctl", "--namespace=triptych", "--sync")
    entries = machine.journal("--namespace=triptych", f"_PID={pid}", "PRIORITY=6")
    lines = [json.loads(entry["MESSAGE"]) for entry in entries]
    assert [line["event"] for line in lines] == ["shadow_compared", "shadow_stopped"]


def test_a_faulty_file_of_the_shadow_is_tried_once_and_its_faults_are_errors(machine: Machine) -> None:
    unit = "triptych-shadow.service"
    machine.write("/etc/triptych/shadow.toml", 'lissten = "systemd:shadow"\nupstream = "127.0.0.1:7002"\n')
    machine("systemctl", "start", unit, code=1)
    until(lambda: machine.show(unit, "ActiveState") == "failed", "giving up")
    assert machine.show(unit, "NRestarts") == "0"
    machine("journalctl", "--sync")
    faults = machine.journal("--priority=err", f"_SYSTEMD_INVOCATION_ID={machine.show(unit, 'InvocationID')}")
    assert any("lissten: unknown key" in line["MESSAGE"] for line in faults), faults


def test_a_stopped_service_is_not_started_by_a_scrape_of_its_metrics(machine: Machine, engine: str) -> None:
    service, socket = f"triptych-echo@{engine}.service", f"triptych-echo-metrics@{engine}.socket"
    machine("systemctl", "start", service)
    assert machine.show(socket, "ActiveState") == "active"
    machine("systemctl", "stop", service)
    assert machine.show(socket, "ActiveState") == "inactive"
    assert machine.show(f"triptych-echo@{engine}.socket", "ActiveState") == "active"


def test_metrics_are_read_through_the_socket_of_the_unit(machine: Machine, engine: str) -> None:
    port = 9464 + ENGINES.index(engine)
    machine("systemctl", "start", f"triptych-echo@{engine}.service")
    assert call(ECHO[engine]) == b"hello"
    answer = call(port, b"GET /metrics HTTP/1.0\r\n\r\n").decode()
    assert answer.startswith("HTTP/1.")
    assert " 200 " in answer.splitlines()[0]
    assert f'engine="{engine}"' in answer


def test_a_service_runs_within_its_sandbox(machine: Machine, engine: str) -> None:
    machine("systemctl", "start", f"triptych-echo@{engine}.service")
    assert call(ECHO[engine]) == b"hello"
    status = machine.path("/proc") / machine.show(f"triptych-echo@{engine}.service", "MainPID") / "status"
    fields = dict(line.split(":\t", 1) for line in status.read_text(encoding="ascii").splitlines())
    assert (fields["Seccomp"], fields["NoNewPrivs"], int(fields["CapBnd"], 16)) == ("2", "1", 0)
    assert "0" not in fields["Uid"].split()
    # no network of its own: not even the loopback that its clients come from
    assert machine.path(f"/proc/{status.parent.name}/net/tcp").read_text(encoding="ascii").count("\n") == 1


def test_a_faulty_configuration_is_tried_once_and_its_faults_are_errors_in_the_journal(
    machine: Machine, engine: str
) -> None:
    unit = f"triptych-echo@{engine}.service"
    machine.write("/etc/triptych/echo.toml", 'engin = "twisted"\n')
    machine("systemctl", "start", unit, code=1)
    until(lambda: machine.show(unit, "ActiveState") == "failed", "giving up")
    assert machine.show(unit, "NRestarts") == "0"
    # still there, for when the file is mended
    assert machine.show(f"triptych-echo@{engine}.socket", "ActiveState") == "active"
    invocation = machine.show(unit, "InvocationID")
    faults = machine.journal("--priority=err", f"_SYSTEMD_INVOCATION_ID={invocation}")
    messages = [line["MESSAGE"] for line in faults]
    assert any('engin: unknown key (did you mean "engine"?)' in message for message in messages), messages
    assert not any("Traceback" in message for message in messages)


def test_older_systemd_ignores_the_drop_ins_for_newer_and_names_what_it_ignores(machine: Machine) -> None:
    machine("cp", "-r", "/opt/triptych/newer/triptych-.service.d", f"{DROP_INS}/triptych-.service.d")
    machine("systemctl", "daemon-reload")
    unit = "triptych-echo@twisted.service"
    assert "/60-newer.conf" in machine.show(unit, "DropInPaths")
    said = machine("sh", "-c", f"systemd-analyze verify {unit} 2>&1")
    for line in said.splitlines():
        assert "60-newer.conf" in line
        assert any(word in line for word in ("service type", "'RestartSteps'", "'RestartMaxDelaySec'")), line
    machine("systemctl", "start", unit)
    assert call(ECHO["twisted"]) == b"hello"
