"""`triptych split`: how the kernel deals, and the command on real clients, servers and daemons."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pytest
from daemons import PATIENCE
from rich.console import Console
from scipy import stats

from comparisons.effects import METRICS, SESSION_METRICS, Effect, Finding, Sample, compare
from comparisons.scenarios.network import Namespace
from comparisons.sidebyside import tables
from comparisons.sidebyside.arms import Account
from comparisons.sidebyside.dealing import Group
from services.cli import main
from services.core.addresses import Address

SPLIT = (sys.executable, "-m", "services.cli", "split")
# an echo of one engine and its control: less to start
ALONE = ("--service", "echo", "--weight", "blocking=0", "--weight", "twisted=0")
# one in a million runs of a fair dealer looks worse
FAIR = 1e-6
# without any of root's powers: what an ordinary user has
ORDINARY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


def deal(
    address: str, weights: Sequence[int], how: Literal["random", "sticky"], clients: Sequence[str | None]
) -> list[int]:
    """Which process each of these clients was dealt to, one connection each; None is any address."""
    group = Group(Address.parse(address), weights, how)
    try:
        [target] = group.addresses
        listeners = [mine[0] for mine in group.sockets]
        for listener in listeners:
            listener.setblocking(False)
        return [_dealt(target, listeners, client) for client in clients]
    finally:
        group.close()


def _dealt(target: Address, listeners: Sequence[socket.socket], client: str | None) -> int:
    source = (client, 0) if client else None
    with socket.create_connection((target.host, target.port), PATIENCE, source):
        for number, listener in enumerate(listeners):
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                continue
            return number
    raise AssertionError("nobody got the connection")


def fairness(dealt: Sequence[int], weights: Sequence[int]) -> float:
    """The probability of a deal at least so uneven, if it is by these weights (chi-square)."""
    found = Counter(dealt)
    expected = [len(dealt) * weight / sum(weights) for weight in weights]
    return float(stats.chisquare([found[number] for number in range(len(weights))], expected).pvalue)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (3, 1, 2)], ids=["evenly", "by weight"])
@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"], ids=["IPv4", "IPv6"])
def test_three_thousand_connections_are_dealt_as_they_should(address: str, weights: Sequence[int]) -> None:
    assert fairness(deal(address, weights, "random", [None] * 3000), weights) > FAIR


def test_sticky_sends_a_client_always_to_the_same_process_and_clients_evenly() -> None:
    weights = (2, 1, 1)
    clients = [f"127.0.{net}.{host}" for net in range(4) for host in range(1, 200)]
    dealt = deal("127.0.0.1:0", weights, "sticky", [*clients, *reversed(clients)])
    first = dealt[: len(clients)]
    assert dealt[len(clients) :] == first[::-1]
    assert fairness(first, weights) > FAIR


def test_sticky_knows_a_client_by_its_whole_ipv6_address() -> None:
    weights = (1, 1, 1, 1)
    # alike in all words but one of the address, in turn
    clients = [
        ":".join(["fd00", *("0" if word != at else f"{host:x}" for at in range(1, 8))])
        for word in (1, 3, 5, 7)
        for host in range(1, 200)
    ]
    with Namespace() as space:
        for command in (
            ("ip", "-6", "route", "add", "local", "fd00::/16", "dev", "lo"),
            ("sysctl", "-q", "net.ipv6.ip_nonlocal_bind=1"),
        ):
            subprocess.run([*space.command, *command], check=True, timeout=PATIENCE)
        dealt = space.call(deal, "[::1]:0", weights, "sticky", [*clients, *clients])
    for word in range(4):
        assert fairness(dealt[word * 199 : (word + 1) * 199], weights) > FAIR
    assert dealt[len(clients) :] == dealt[: len(clients)]


class Running:
    """`triptych split`, dealing when this is entered. Its output goes to files: nobody reads a pipe meanwhile."""

    def __init__(self, directory: Path, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self._said, self._told = directory / "stderr", directory / "stdout"
        with self._said.open("wb") as said, self._told.open("wb") as told:
            self.process = subprocess.Popen(
                [*prefix, *SPLIT, "--listen", "127.0.0.1:0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=said,
            )

    def __enter__(self) -> Self:
        self.wait_for("is dealt")
        found = re.search(r"127\.0\.0\.1:(\d+) is dealt", self.said())
        assert found
        self.port = int(found[1])
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in self.said(), lambda: f"no {text!r} in {self.said()!r}")

    def said(self) -> str:
        return self._said.read_text()

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(3 * PATIENCE)

    def told(self) -> str:
        return self._told.read_text()

    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads(self.told())
        assert results["version"] == 1
        return results

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def converse(self, sessions: int) -> None:
        """So many sessions of an echo, one after the other."""
        for _ in range(sessions):
            with self.open() as client:
                client.sendall(b"abc")
                client.shutdown(socket.SHUT_WR)
                while client.recv(100):
                    pass


def wait_for(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + 3 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(*command: str, port: int) -> Iterator[None]:
    """A real server, from when it accepts."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:

        def accepts() -> bool:
            assert process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(accepts, lambda: f"{command[0]} does not accept")
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


def test_redis_benchmark_runs_through_a_split_of_an_ordinary_user_without_noticing(tmp_path: Path) -> None:
    port = free_port()
    with (
        server("redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path), port=port),
        Running(tmp_path, "--upstream", f"localhost:{port}", "--json", prefix=ORDINARY) as split,
    ):
        benchmark = ["redis-benchmark", "-p", str(split.port), "-q", "-c", "10", "-t", "set,get"]
        for kept in (["-k", "1", "-n", "4000"], ["-k", "0", "-n", "1000"]):
            done = subprocess.run(
                [*benchmark, *kept], capture_output=True, text=True, timeout=3 * PATIENCE, check=True
            )
            assert "rror" not in done.stdout + done.stderr
            assert set(re.findall("[SG]ET: [0-9.]+ requests per second", done.stdout))
        assert split.end() == 0
        # where it is dealt; and, if some sessions were just about to end, that it waited for them
        dealt, *waited = split.said().splitlines()
        assert "is dealt at random to" in dealt
        assert all("waiting for" in line for line in waited)
    results = split.results()
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert set(arms) == {"blocking", "nonblocking", "twisted", "control"}
    # a connection for every request, and those that were kept
    assert 2000 <= sum(arm["sessions"] for arm in arms.values()) <= 2100
    assert (
        fairness([at for at, arm in enumerate(arms.values()) for _ in range(arm["sessions"])], [1] * 4) > FAIR
    )
    assert all(arm["cut"] == arm["missing"] == arm["resets"] == 0 for arm in arms.values())
    assert [finding["other"] for finding in results["findings"]][:1] == ["control"]
    assert {finding["other"] for finding in results["findings"]} == set(arms) - {"nonblocking"}


def test_wrk_runs_through_a_split_without_noticing(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error;\n"
        "events {}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{port}; return 200 hello; }} }}\n"
    )
    with (
        server("nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), port=port),
        Running(tmp_path, "--upstream", f"127.0.0.1:{port}", "--control", "twisted", "--json") as split,
    ):
        done = subprocess.run(
            ["wrk", "-t", "1", "-c", "20", "-d", "1", f"http://127.0.0.1:{split.port}/"],
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE,
            check=True,
        )
        assert split.end() == 0
    assert "requests in" in done.stdout
    assert "Socket errors" not in done.stdout
    assert "Non-2xx" not in done.stdout
    results = split.results()
    assert results["base"] == "twisted"
    assert sum(arm["sessions"] for arm in results["arms"]) == 20 + 1  # wrk looks whether somebody is there


def test_an_engine_slowed_by_two_milliseconds_is_worse_by_about_that_and_with_itself_no_different(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "kept"
    slow = ("--fault", "control:latency:delay=2ms", "--sessions", "1200", "--keep", str(kept), "--json")
    with Running(tmp_path, *ALONE, *slow) as split:
        split.converse(1200)
        assert split.process.wait(3 * PATIENCE) == 0
    [found] = [
        finding
        for finding in split.results()["findings"]
        if (finding["metric"], finding["statistic"]) == ("first_byte_us", "typical")
    ]
    assert found["verdict"] == "worse"
    # a loop's timer is up to a millisecond late, and a busy machine's later
    assert 1800 < found["effect"]["low"] < found["effect"]["high"] < 5000

    # what was recorded of one engine, dealt to two hands again and again
    account = Account(kept / "nonblocking.jsonl")
    account.read_on()
    recorded = account.sample()
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(20):
        hand = rng.random(account.sessions) < 0.5
        one, other = (part(recorded, mask) for mask in (hand, ~hand))
        alarms += any(finding.verdict in {"better", "worse"} for finding in compare(one, {"other": other}))
    assert alarms <= 1


def part(sample: Sample, mask: Any) -> Sample:
    """Those sessions; an echo connects to nobody."""
    return Sample(
        values={
            metric.name: values[mask] if len(values := sample.values[metric.name]) else values
            for metric in SESSION_METRICS
        },
        resets=sample.resets[mask],
        cpu=sample.cpu,
    )


def test_the_end_waits_for_open_sessions_and_refuses_new_ones(tmp_path: Path) -> None:
    with Running(tmp_path, *ALONE, "--json") as split, split.open() as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        split.process.send_signal(signal.SIGINT)
        split.wait_for("waiting for 1 open sessions")
        with pytest.raises(ConnectionRefusedError):
            split.open()
        client.sendall(b"after")
        assert client.recv(100) == b"after"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
        assert split.process.wait(PATIENCE) == 0
    assert [sum(arm[what] for arm in split.results()["arms"]) for what in ("sessions", "cut")] == [1, 0]


def test_a_second_interrupt_cuts_what_is_open_and_says_so(tmp_path: Path) -> None:
    with Running(tmp_path, *ALONE) as split, split.open() as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        split.process.send_signal(signal.SIGINT)
        split.wait_for("Ctrl-C cuts them")
        assert split.end() == 0
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    assert re.search(r"\w+: 1 session was cut and is not compared", split.told())


def test_time_ends_a_split_and_the_tables_say_what_came_of_it(tmp_path: Path) -> None:
    with Running(tmp_path, "--service", "echo", "--time", "1s", "--deal", "sticky") as split:
        split.converse(60)
        assert split.process.wait(3 * PATIENCE) == 0
    told = split.told()
    assert "60 sessions in" in told
    assert "twisted against nonblocking" in told
    assert "not enough data" in told
    assert "by the client's address" in split.said()


def test_a_terminal_shows_the_sessions_while_they_run(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        # a terminal whose other side is gone ends with an error
        try:
            while text := os.read(ours, 4096):
                shown.append(text)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    with (tmp_path / "stdout").open("wb") as told:
        process = subprocess.Popen(
            [*SPLIT, "--listen", "127.0.0.1:0", *ALONE, "--time", "1s"],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
        )
    os.close(theirs)
    reader.start()
    assert process.wait(3 * PATIENCE) == 0
    reader.join()
    os.close(ours)
    text = b"".join(shown).decode()
    assert all(word in text for word in ("first byte", "nonblocking", "control", "a second", "resets"))


def test_eighty_columns_show_every_difference_and_verdict_whole() -> None:
    effect = Effect(base=12345, other=23456, difference=11111, low=-10234, high=12345, p=0.001)
    found = [
        Finding(
            other="blocking",
            metric=metric.name,
            statistic=statistic,
            verdict="not enough data",
            effect=effect,
            margin=100,
            p_holm=0.01,
        )
        for metric in METRICS
        if metric.unit != "share"
        for statistic in ("typical", "p99")
    ]
    for width in (80, 120):
        text = io.StringIO()
        Console(file=text, width=width).print(tables.findings("nonblocking", found))
        assert "…" not in text.getvalue()
        # an interval may go on in the next line
        assert len(re.findall(r"\+.* \(-.* to \+[^ ]+.* not enough data", text.getvalue())) == len(found)
        assert ("23.5 ms" in text.getvalue()) == (width == 120)


def test_a_daemon_that_dies_ends_the_split_with_one_line_and_what_is_known(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with Running(tmp_path, "--service", "echo", "--keep", str(kept)) as split:
        split.converse(20)
        # what a daemon has not yet written when it is killed is lost
        wait_for(lambda: closed(kept) == 20, lambda: f"{closed(kept)} of 20 sessions in the logs")
        first = json.loads((kept / "twisted.jsonl").read_text().splitlines()[0])
        os.kill(first["pid"], signal.SIGKILL)
        assert split.process.wait(3 * PATIENCE) == 69
    assert "triptych: the daemon of twisted ended with signal SIGKILL: nothing on stderr\n" in split.said()
    assert "20 sessions in" in split.told()


def closed(kept: Path) -> int:
    return sum(log.read_text().count('"session_closed"') for log in kept.glob("*.jsonl"))


def test_the_port_of_another_split_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Running(tmp_path, *ALONE) as split:
        listen = f"127.0.0.1:{split.port}"
        done = refused(capsys, "--listen", listen, "--service", "echo")
        assert done == (69, f"triptych: {listen}: already in use; stop what uses it or choose another port\n")


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0", "localhost"])
@pytest.mark.parametrize("upstream", ["127.0.0.1", "localhost"])
def test_a_split_that_is_its_own_upstream_is_refused(
    listen: str, upstream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    code, said = refused(capsys, "--listen", f"{listen}:{port}", "--upstream", f"{upstream}:{port}")
    assert code == 78
    assert "where it listens itself" in said
    assert said.count("\n") == 1


GOOD = ("--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--listen", "127.0.0.1:0"), "--upstream: a proxy needs one"),
        ((*GOOD, "--service", "echo"), "--upstream: an echo has no upstreams"),
        (("--listen", "udp:127.0.0.1:0", "--service", "echo"), "--listen: udp:127.0.0.1:0: only connections"),
        (("--listen", "nowhere", "--service", "echo"), "--listen: 'nowhere': expected HOST:PORT"),
        ((*GOOD, "--weight", "gevent=2"), "--weight: gevent=2: 'gevent' is none of blocking, nonblocking"),
        ((*GOOD, "--weight", "twisted=many"), "--weight: twisted=many: expected twisted=N, N from 0 to 1000"),
        ((*GOOD, "--weight", "control=0"), "--weight: all is compared with nonblocking and its control"),
        ((*GOOD, "--fault", "twisted:gravity:g=9"), "--fault"),
        ((*GOOD, "--fault", "latency:delay=2ms"), "--fault: latency:delay=2ms: 'latency' is none of"),
        (
            (*GOOD, "--weight", "twisted=0", "--fault", "twisted:latency:delay=2ms"),
            "--fault: twisted:latency:delay=2ms: twisted is left out",
        ),
        ((*GOOD, "--time", "soon"), "'soon' is no duration up to 596h, as in 10m"),
        ((*GOOD, "--time", "0s"), "'0s' is no duration"),
        ((*GOOD, "--keep", "/"), "--keep: / exists already; name a new folder"),
    ],
)
def test_bad_input_costs_one_line(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused(capsys, *arguments)
    assert code == 64
    assert complaint in said
    assert said.count("\n") == 1


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of a split that does not begin, and what it said: so it can run in here."""
    code = main(["split", *arguments])
    output = capsys.readouterr()
    assert output.out == ""
    return code, output.err
