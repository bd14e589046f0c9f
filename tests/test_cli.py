"""The command as a user meets it: as a process, with its exit code and its one line for each fault."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "services.cli"]
ENGINES = ["blocking", "nonblocking", "twisted"]

ECHO = '[[listener]]\nname = "e"\naddress = "127.0.0.1:0"\nservice = "echo"\n'


def triptych(*arguments: str | Path, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def fault(*arguments: str | Path, prefix: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and message of a command that must fail with one line, and say nothing else."""
    done = triptych(*arguments, prefix=prefix)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("triptych: ")
    return done.returncode, line.removeprefix("triptych: ")


class Running:
    """A daemon in the background, and the lines of its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    def read_until(self, event: str, count: int = 1) -> None:
        assert self.process.stdout is not None
        while sum(line["event"] == event for line in self.lines) < count:
            text = self.process.stdout.readline()
            assert text, f"the daemon ended before {event}"
            self.lines.append(json.loads(text))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Exit code after the signal; reads the log to its end."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        output, _ = self.process.communicate(timeout=30)
        self.lines += [json.loads(line) for line in output.splitlines()]
        return self.process.returncode


@contextmanager
def running(*arguments: str | Path, ready: int = 1) -> Iterator[Running]:
    """A daemon whose `service_ready` has been read, `ready` times."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *arguments], stdout=pipe, stderr=pipe, text=True) as process:
        daemon = Running(process)
        try:
            daemon.read_until("service_ready", ready)
            yield daemon
        finally:
            if process.poll() is None:
                process.terminate()


def echoes(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as client:
        client.sendall(b"ping")
        return client.recv(100) == b"ping"


# Usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nope"], "No such command 'nope'; see triptych --help", id="command"),
        pytest.param(
            ["echo"], "Missing option '--listen'; see triptych echo --help", id="nothing to listen on"
        ),
        pytest.param(
            ["echo", "--engine", "asyncio", "--listen", "127.0.0.1:0"],
            "Invalid value for '--engine': 'asyncio' is not one of 'blocking', 'nonblocking', 'twisted', 'all'; "
            "see triptych echo --help",
            id="engine",
        ),
        pytest.param(
            ["echo", "--listen", "nowhere"],
            "--listen: 'nowhere': expected HOST:PORT, as in 127.0.0.1:7007",
            id="listen",
        ),
        pytest.param(
            ["echo", "--engine", "all", "--listen", "nowhere"],
            "--listen: 'nowhere': expected HOST:PORT, as in 127.0.0.1:7007",
            id="listen of all",
        ),
        pytest.param(
            ["echo", "--engine", "all", "--listen", "127.0.0.1:65534"],
            "--listen: 127.0.0.1:65534: three engines need three ports, up to 65535",
            id="no port left",
        ),
        pytest.param(
            ["echo", "--engine", "all", "--listen", "systemd:x"],
            "--listen: systemd:x: one handed over socket cannot serve three engines",
            id="one socket for all",
        ),
        pytest.param(
            ["proxy", "--listen", "127.0.0.1:0", "--upstream", "127.0.0.1"],
            "--upstream: '127.0.0.1': expected HOST:PORT, as in 127.0.0.1:7007",
            id="upstream",
        ),
        pytest.param(
            ["proxy", "--listen", "udp:127.0.0.1:0", "--upstream", "127.0.0.1:7"],
            "--listen: a udp listener needs upstreams as in udp:127.0.0.1:53, and upstream has others",
            id="udp proxy",
        ),
        pytest.param(["check"], "Missing option '--config'; see triptych check --help", id="no file"),
    ],
)
def test_wrong_usage_is_64_and_one_line(arguments: list[str], message: str) -> None:
    assert fault(*arguments) == (64, message)


def test_no_command_at_all_is_64_and_shows_the_help() -> None:
    done = triptych()
    assert done.returncode == 64
    assert "Commands:" in done.stderr


def test_help_names_every_command() -> None:
    done = triptych("--help")
    assert done.returncode == 0
    for command in ("echo", "proxy", "serve", "check", "compare", "logs"):
        assert f"\n  {command} " in done.stdout


# Configuration files -----------------------------------------------------------------------------


def test_check_tells_every_fault_with_its_path_and_is_78(tmp_path: Path) -> None:
    path = tmp_path / "triptych.toml"
    path.write_text(f'{ECHO}adress = "x"\n[timeouts]\nidle = 60\n')
    done = triptych("check", "--config", path)
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f'triptych: {path}: listener[0].adress: unknown key (did you mean "address"?)',
        f'triptych: {path}: timeouts.idle: expected a duration such as "60s", not 60',
    ]
    assert triptych("serve", "--config", path).stderr == done.stderr


def test_check_of_a_good_file_is_0(tmp_path: Path) -> None:
    path = tmp_path / "triptych.toml"
    path.write_text(ECHO)
    done = triptych("check", "--config", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: ok\n", "")


def test_a_file_that_is_not_there_is_78(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    for command in ("check", "serve"):
        assert fault(command, "--config", path) == (78, f"{path}: cannot be read: No such file or directory")


# Faults at the start -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_port_in_use_is_69(engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert fault("echo", "--engine", engine, "--listen", address) == (
            69,
            f"{address}: already in use; stop what uses it or choose another port",
        )


def test_a_port_without_permission_is_77() -> None:
    # root may bind any port by a capability, which is dropped here
    drop = ["--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"]
    prefix = ["setpriv", *drop] if os.geteuid() == 0 else []
    assert fault("echo", "--listen", "127.0.0.1:80", prefix=prefix) == (
        77,
        "127.0.0.1:80: no permission to bind; use a port of 1024 or above, or grant CAP_NET_BIND_SERVICE",
    )


def test_a_proxy_pointed_at_itself_is_78() -> None:
    port = free_ports()
    flags = ["--listen", f"0.0.0.0:{port}", "--upstream", f"127.0.0.1:{port}"]
    code, message = fault("proxy", *flags)
    assert code == 78
    assert message.startswith(f"proxy-1: its upstreams lead back to 0.0.0.0:{port}, where it listens itself")


def test_an_unknown_host_is_69() -> None:
    for arguments in (
        ["echo", "--listen", "no-such-host.invalid:0"],
        ["proxy", "--listen", "127.0.0.1:0", "--upstream", "no-such-host.invalid:7"],
    ):
        code, message = fault(*arguments)
        assert code == 69
        assert "unknown host" in message


def test_a_log_that_cannot_be_opened_is_71(tmp_path: Path) -> None:
    assert fault("echo", "--listen", "127.0.0.1:0", "--log", tmp_path / "none" / "log") == (
        71,
        f"{tmp_path}/none/log: No such file or directory",
    )


# Output and interruption -------------------------------------------------------------------------


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", ["compare", "logs"])
def test_a_command_whose_extra_is_not_installed_is_69(command: str) -> None:
    done = run_python(f"""
import sys
from services import cli

class NotInstalled:
    def find_spec(self, name, path, target=None):
        if name == "comparisons":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, NotInstalled())
sys.exit(cli.main(["{command}", "--help"]))
""")
    assert done.returncode == 69
    assert done.stderr == f"triptych: {command} needs the extra: pip install 'triptych[compare]'\n"


def test_a_package_that_is_missed_only_while_a_command_runs_is_69_too() -> None:
    done = run_python("""
import sys, types
import click
from services import cli
module = types.ModuleType("comparisons.compare")
exec("import click\\n@click.command()\\ndef command():\\n    import not_installed", module.__dict__)
sys.modules["comparisons.compare"] = module
sys.exit(cli.main(["compare"]))
""")
    assert done.returncode == 69
    assert done.stderr == "triptych: compare needs the extra: pip install 'triptych[compare]'\n"


def test_a_missing_module_of_our_own_is_a_bug_and_not_hidden() -> None:
    done = run_python("""
import sys
from services import cli
sys.modules["comparisons.compare"] = None
sys.exit(cli.main(["compare"]))
""")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_output_that_nobody_reads_any_more_is_no_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert done.returncode != 0
    assert done.stderr == b""


def test_ctrl_c_is_130_without_a_traceback() -> None:
    done = run_python("""
import sys
from services import cli
def load(path):
    raise KeyboardInterrupt
cli.load = load
sys.exit(cli.main(["check", "--config", "x"]))
""")
    assert done.returncode == 130
    assert done.stderr.strip() == ""


# Running -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["blocking", "nonblocking"])
def test_a_daemon_with_sockets_of_its_own_loads_neither_twisted_nor_comparisons(engine: str) -> None:
    source = """
import atexit, sys
from services.cli import main
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
sys.exit(main(["echo", "--engine", sys.argv[1], "--listen", "127.0.0.1:0"]))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", source, engine], stdout=pipe, stderr=pipe, text=True
    ) as process:
        daemon = Running(process)
        daemon.read_until("service_ready")
        process.terminate()
        _, told = process.communicate(timeout=30)
    loaded = set(told.split())
    assert {"structlog", "msgspec"} <= loaded
    assert not {"twisted", "comparisons", "rich", "duckdb"} & loaded


@pytest.mark.parametrize("engine", ENGINES)
def test_ready_names_what_was_bound_in_the_order_of_the_flags(engine: str, tmp_path: Path) -> None:
    listen = ["127.0.0.1:0", f"unix:{tmp_path}/s", "[::1]:0"]
    flags = [part for address in listen for part in ("--listen", address)]
    with running("echo", "--engine", engine, *flags) as daemon:
        (ready,) = daemon.of("service_ready")
        assert [address.rpartition(":")[0] for address in ready["addresses"]] == [
            "127.0.0.1",
            "unix",
            "[::1]",
        ]
        assert [line["address"] for line in daemon.of("listener_opened")] == ready["addresses"]
        assert echoes(ready["addresses"][0])
        assert echoes(ready["addresses"][2])
        assert daemon.stop() == 0
    assert daemon.lines[-1]["event"] == "service_stopped"
    assert not (tmp_path / "s").exists()


def test_serve_does_what_the_file_says_and_flags_override_it(tmp_path: Path) -> None:
    path, log = tmp_path / "triptych.toml", tmp_path / "log"
    path.write_text(f'{ECHO}[log]\nlevel = "error"\npath = "/none/log"\n')
    flags = ["--engine", "blocking", "--log", str(log), "--log-level", "debug"]
    with subprocess.Popen([*COMMAND, "serve", "--config", str(path), *flags]) as process:
        deadline = time.monotonic() + 30
        while not (log.exists() and "service_ready" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        ready = json.loads(log.read_text().splitlines()[-1])
        assert ready["engine"] == "blocking"
        assert echoes(ready["addresses"][0])
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert "session_opened" in log.read_text()


# All three at once -------------------------------------------------------------------------------


def free_ports() -> int:
    """The first of three ports in a row that are free."""
    for first in range(20_000, 30_000, 3):
        try:
            for port in range(first, first + 3):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError("no three ports in a row")


def test_all_engines_get_a_port_each_and_stop_together() -> None:
    port = free_ports()
    with running("echo", "--engine", "all", "--listen", f"127.0.0.1:{port}", ready=3) as daemon:
        by_engine = {line["engine"]: line["addresses"] for line in daemon.of("service_ready")}
        assert by_engine == {engine: [f"127.0.0.1:{port + number}"] for number, engine in enumerate(ENGINES)}
        assert all(echoes(address) for (address,) in by_engine.values())
        assert daemon.process.stderr is not None
        told = [daemon.process.stderr.readline() for _ in ENGINES]
        assert told == [
            f"triptych: {engine} on 127.0.0.1:{port + number}\n" for number, engine in enumerate(ENGINES)
        ]
        assert daemon.stop() == 0
    assert {line["engine"] for line in daemon.of("service_stopped")} == set(ENGINES)


def test_all_engines_take_free_ports_and_paths_of_their_own(tmp_path: Path) -> None:
    flags = ["--listen", "127.0.0.1:0", "--listen", f"unix:{tmp_path}/e.sock"]
    with running("echo", "--engine", "all", *flags, ready=3) as daemon:
        by_engine = {line["engine"]: line["addresses"] for line in daemon.of("service_ready")}
        assert len({addresses[0] for addresses in by_engine.values()}) == 3
        assert {engine: addresses[1] for engine, addresses in by_engine.items()} == {
            engine: f"unix:{tmp_path}/e.{engine}.sock" for engine in ENGINES
        }
        # of all that is interrupted, each child is interrupted once
        assert daemon.stop(signal.SIGINT) == 0
    assert len(daemon.of("service_draining")) == 3
    assert len(daemon.of("service_stopped")) == 3


def test_an_engine_that_cannot_start_stops_the_others() -> None:
    port = free_ports()
    with socket.create_server(("127.0.0.1", port + 1)):
        done = triptych("echo", "--engine", "all", "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 69
    assert f"triptych: 127.0.0.1:{port + 1}: already in use" in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    opened = {line["engine"] for line in events if line["event"] == "service_ready"}
    assert {line["engine"] for line in events if line["event"] == "service_stopped"} == opened


def test_ctrl_c_on_a_terminal_interrupts_each_engine_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(  # noqa: S606  the child of a terminal, which subprocess cannot make
            sys.executable,
            [*COMMAND, "echo", "--engine", "all", "--listen", "127.0.0.1:0", "--log", str(log)],
        )
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().count("service_ready") == 3):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)
    text = log.read_text()
    assert (text.count('"service_draining"'), text.count('"service_stopped"')) == (3, 3)


def test_a_folder_named_services_where_the_user_stands_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise AssertionError('not ours')")
    # as an installed `triptych` starts: the current folder is not on the path
    source = "import sys; from services.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", source, "echo", "--engine", "all", "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        daemon = Running(process)
        daemon.read_until("service_ready", 3)
        assert daemon.stop() == 0
