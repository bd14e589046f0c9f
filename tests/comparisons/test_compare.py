"""`triptych compare` from end to end, with real daemons, and with subjects that are broken on purpose."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from comparisons.results import Cell, Results, machine
from comparisons.runner import Bench, Cores, run_round
from comparisons.subjects import DaemonRunning, Direct, Running
from comparisons.workloads.table import WORKLOADS

COMPARE = (sys.executable, "-m", "services.cli", "compare")
BY_NAME = {workload.name: workload for workload in WORKLOADS}


def compare(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMPARE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def results_of(out: Path) -> Results:
    return msgspec.json.decode((out / "results.json").read_bytes(), type=Results)


def test_a_quick_comparison_measures_checks_and_writes_both_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compare(
        *("--quick", "--engine", "nonblocking", "--seed", "7", "--out", str(out)),
        *("--workload", "echo-64-64", "--workload", "bulk", "--workload", "burst", "--workload", "stalled"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "Echo, 64 connections, 64 B" in done.stdout
    results = results_of(out)
    assert (results.version, results.seed, results.rounds, results.complete) == (1, 7, 1, True)
    cells = {(cell.workload, cell.subject): cell for cell in results.cells}
    # an echo has no floor
    assert set(cells) == {
        ("echo-64-64", "nonblocking"),
        ("burst", "nonblocking"),
        *((name, subject) for name in ("bulk", "stalled") for subject in ("direct", "nonblocking")),
    }
    for (workload, subject), cell in cells.items():
        assert cell.broken is None
        assert cell.throughput
        assert (cell.log is None) == (subject == "direct")
        if cell.log is not None:
            assert cell.log.closed == cell.sessions
            assert cell.log.total_bytes_s2c == cell.bytes_received
            assert cell.cpu_s_per_gb
            assert cell.pss_bytes
        if workload != "bulk":
            assert cell.p50_us is not None
            assert cell.p99_us is not None
            assert 0 < cell.p50_us <= cell.p99_us
    assert cells["echo-64-64", "nonblocking"].sessions == 64
    assert cells["bulk", "direct"].ratio == 1
    text = (out / "results.json").read_text()
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text.replace("localhost", "")
    assert (out / "report.html").stat().st_size > 1_000_000


def test_json_goes_to_standard_output(tmp_path: Path) -> None:
    done = compare(
        "--quick", "--engine", "blocking", "--workload", "replay-http", "--json", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["cells"][0]["workload"] == "replay-http"


def test_idle_sessions_have_a_price_in_memory(tmp_path: Path) -> None:
    done = compare("--quick", "--engine", "twisted", "--workload", "idle", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    cell = next(cell for cell in results_of(tmp_path).cells if cell.subject == "twisted")
    assert cell.sessions == 500
    assert cell.pss_bytes_per_session is not None
    assert 100 < cell.pss_bytes_per_session < 1_000_000


# A subject that starts a script of ours as its daemon: an echo that does as `flaw` says, with a log that is
# right otherwise.
SCRIPT = """
import json, os, select, signal, socket, sys
flaw, log = sys.argv[1], open(sys.argv[sys.argv.index("--log") + 1], "a", buffering=1)
if flaw == "start":
    sys.exit("no luck today")
listener = socket.create_server(("127.0.0.1", 0))
say = lambda event, **fields: print(json.dumps({"event": event, **fields}), file=log)
say("service_ready", addresses=["127.0.0.1:%d" % listener.getsockname()[1]])
closed, bytes_in, bytes_out, lines = 0, 0, 0, []
def stop(*_):
    say("service_stopped", closed=closed, bytes_c2s=bytes_in, bytes_s2c=bytes_out + (flaw == "total"))
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
while True:
    sock, _ = listener.accept()
    moved = 0
    while data := sock.recv(65536):
        moved += len(data)
        if flaw == "die" and moved > 1000:
            sys.exit("killed by itself")
        if flaw == "corrupt" and moved > 1000:
            data = bytes([data[0] ^ 1]) + data[1:]
        if flaw == "silent" and moved > 1000:
            continue
        sock.sendall(data)
    closed, bytes_in, bytes_out = closed + 1, bytes_in + moved, bytes_out + moved
    if flaw != "line":
        say("session_closed", bytes_c2s=moved, bytes_s2c=moved, termination="--")
    sock.close()
"""


class Flawed:
    def __init__(self, flaw: str) -> None:
        self.name = flaw

    def start(self, service: str, upstream: str | None, directory: Path, core: int | None) -> Running:  # noqa: ARG002  the contract of every subject
        return DaemonRunning([sys.executable, "-c", SCRIPT, self.name], directory, core)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(Cores.choose(), 7, 0.05) as bench:
        yield bench


def cell_of(bench: Bench, flaw: str) -> Cell:
    workload = BY_NAME["echo-1-64"]
    order = random.Random(7)  # noqa: S311  there is only one order
    (cell,) = run_round(bench, 1, [workload], [Flawed(flaw)], Direct(), quick=True, order=order)
    return cell


def test_the_script_without_a_flaw_is_not_broken(bench: Bench) -> None:
    cell = cell_of(bench, "none")
    assert cell.broken is None
    assert cell.ratio == 1


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("start", "the daemon did not come up: status 1, no luck today"),
        ("die", "the daemon died: status 1, killed by itself"),
        ("corrupt", "an answer has other bytes than were sent"),
        ("silent", "no answer for 5 s"),
        ("total", "bytes to clients"),
        ("line", "session_closed lines 0 in the log, 1 in the load"),
    ],
)
def test_a_flaw_breaks_the_cell_and_is_named(bench: Bench, flaw: str, reason: str) -> None:
    cell = cell_of(bench, flaw)
    assert cell.broken is not None
    assert reason in cell.broken
    assert cell.ratio is None


def test_a_broken_cell_is_in_no_median() -> None:
    facts = machine(pinned=False, pinning="")
    results = Results(
        created="", command=[], seed=1, quick=True, rounds=2, machine=facts, subjects=["blocking"]
    )
    good = Cell(workload="bulk", subject="blocking", round=1, place=1, throughput=10.0)
    bad = Cell(workload="bulk", subject="blocking", round=2, place=1, throughput=99.0, broken="wrong bytes")
    results.cells += [good, bad]
    spread = results.spread("bulk", "blocking", "throughput")
    assert spread is not None
    assert (spread.median, spread.max) == (10.0, 10.0)
    assert results.broken() == [bad]


def test_an_interrupted_run_writes_what_it_has_and_leaves_nothing_running(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMPARE, "--rounds", "50", "--workload", "echo-1-64", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        # the folder of the bench names the daemons' logs, so their command lines can be told from all others
        wait_for(lambda: len(list(tmp_path.glob("triptych-*/*/log.jsonl"))) > 3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr == "triptych: interrupted, what was measured so far is written\n"
    results = results_of(tmp_path)
    assert not results.complete
    assert results.cells
    assert not list(tmp_path.glob("triptych-*"))
    assert not processes_naming(str(tmp_path))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if text in command:
            found.append(command)
    return found


@pytest.fixture
def echo_server() -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            with sock:
                while data := sock.recv(65536):
                    sock.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


CLIENT = (
    f"{sys.executable} -c 'import socket, sys\n"
    's = socket.create_connection((sys.argv[1].removeprefix("to="), int(sys.argv[2]))); s.sendall(b"x" * 1000)\n'
    's.shutdown(1); n = sum(map(len, iter(lambda: s.recv(999), b"")))\n'
    'print("got", n); sys.exit(STATUS)\' to={host} {port}'
)


def test_the_users_own_client_goes_through_every_engine_and_directly(
    tmp_path: Path, echo_server: str
) -> None:
    client = CLIENT.replace("STATUS", "n != 1000")
    done = compare("--upstream", echo_server, "--client", client, "--rounds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(tmp_path)
    assert sorted((run.round, run.subject) for run in results.runs) == [
        (number, subject) for number in (1, 2) for subject in ("blocking", "direct", "nonblocking", "twisted")
    ]
    for run in results.runs:
        assert run.status == 0
        assert run.wall_s
        if run.log is not None:
            assert (run.log.closed, run.log.total_bytes_c2s, run.log.total_bytes_s2c) == (1, 1000, 1000)
    assert (tmp_path / "report.html").exists()


def test_what_a_failing_client_said_is_shown(tmp_path: Path, echo_server: str) -> None:
    client = CLIENT.replace("STATUS", "3")
    options = ("--engine", "nonblocking", "--rounds", "1", "--out", str(tmp_path))
    done = compare("--upstream", echo_server, "--client", client, *options)
    # it fails directly too, which is no fault of an engine
    assert done.returncode == 0, done.stdout + done.stderr
    assert "got 1000" in done.stdout
    assert [run.status for run in results_of(tmp_path).runs] == [3, 3]


def test_a_client_that_fails_only_behind_an_engine_breaks_the_run(tmp_path: Path, echo_server: str) -> None:
    port = echo_server.rpartition(":")[2]
    client = CLIENT.replace("STATUS", f'sys.argv[2] != "{port}"')
    options = ("--engine", "nonblocking", "--rounds", "1", "--out", str(tmp_path))
    done = compare("--upstream", echo_server, "--client", client, *options)
    assert done.returncode == 99
    assert [run.broken for run in results_of(tmp_path).broken()] == ["exit 1, direct exit 0"]


def test_a_client_that_does_not_end_is_ended(tmp_path: Path, echo_server: str) -> None:
    options = ("--engine", "nonblocking", "--rounds", "1", "--timeout", "0.3", "--out", str(tmp_path))
    done = compare("--upstream", echo_server, "--client", "sleep 60.{port}", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [run.status for run in results_of(tmp_path).runs] == [None, None]


def test_a_client_that_is_not_there_is_told_in_one_line(tmp_path: Path, echo_server: str) -> None:
    done = compare("--upstream", echo_server, "--client", "no-such-program {port}", "--out", str(tmp_path))
    assert done.returncode == 69
    assert done.stderr == (
        "triptych: --client: no-such-program cannot be started: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--upstream", "127.0.0.1:1"], 64, "--upstream and --client belong together"),
        (["--client", "true {port}"], 64, "--upstream and --client belong together"),
        (["--upstream", "nowhere", "--client", "true {port}"], 64, "expected HOST:PORT"),
        (["--upstream", "127.0.0.1:1", "--client", "true"], 64, "without {port}"),
        (["--upstream", "127.0.0.1:1", "--client", "true '{port}"], 64, "No closing quotation"),
        (["--upstream", "127.0.0.1:1", "--client", "true {port}"], 69, "127.0.0.1:1 cannot be reached"),
        (["--engine", "asyncio"], 64, "asyncio"),
        (["--workload", "all"], 64, "all"),
    ],
)
def test_a_fault_of_the_command_line_is_one_line(
    tmp_path: Path, arguments: list[str], status: int, told: str
) -> None:
    done = compare(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == status
    assert done.stderr.startswith("triptych: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
