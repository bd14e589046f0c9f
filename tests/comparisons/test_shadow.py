"""`triptych shadow` as its user runs it: real engines behind it, real servers and scripted ones behind them.

One shadow stays up for the scripted conversations, with four listening sockets of the test as upstreams.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil
import pytest
from daemons import PATIENCE

from comparisons.scenarios.wire import End, Subject, listen, payload, transfer
from comparisons.sidebyside import shadow_settings
from comparisons.sidebyside.shadow_report import ShadowCompared, ShadowStopped
from comparisons.sidebyside.shadow_settings import SettingsError
from comparisons.sidebyside.streams import Comparison
from comparisons.sidebyside.tee import PACE, Answer, Target
from services.core.addresses import Address
from services.vocabulary import Envelope

COMMAND = (sys.executable, "-m", "services.cli", "shadow")
ANSWER, CONTROL, BLOCKING, TWISTED = range(4)
NAMES = ("nonblocking", "control", "blocking", "twisted")
ANYWHERE = Address("tcp", "127.0.0.1", 0)
Line = dict[str, Any]


class Shadow:
    """A shadow that is up, with an upstream for each of NAMES."""

    def __init__(self, directory: Path, upstreams: Sequence[Address], *flags: str) -> None:
        self.log = directory / "shadow.jsonl"
        self._stderr = directory / "stderr"
        arguments = ["--listen", "127.0.0.1:0", "--upstream", str(upstreams[ANSWER]), "--log", str(self.log)]
        for name, upstream in zip(NAMES[1:], upstreams[1:], strict=True):
            arguments += ["--shadow-upstream", f"{name}={upstream}"]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments, "--json", *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        until = time.monotonic() + 2 * PATIENCE
        while "answers;" not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)
        where = self.said().partition("on ")[2].partition(" ")[0]
        self.address = Address.parse(where)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # a failed test's: its daemons end with it
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def said(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    def compared(self, count: int, skip: int = 0) -> list[Line]:
        """The lines of so many sessions after the first ones, as soon as they are there."""
        until = time.monotonic() + PATIENCE
        while len(found := self.lines("shadow_compared")) < skip + count:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, found
            time.sleep(0.01)
        return found[skip:]

    def lines(self, event: str) -> list[Line]:
        text = self.log.read_bytes() if self.log.exists() else b""
        lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        return [line for line in lines if line["event"] == event]

    def end(self, *signals: signal.Signals) -> Line:
        """Ends it, and what it printed."""
        for number in signals:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=2 * PATIENCE)
        assert self.process.returncode == 0, self.said()
        results: Line = json.loads(output)
        assert "Traceback" not in self.said()
        return results

    def child(self, name: str) -> psutil.Process:
        """The daemon that runs as `name`, which is its instance."""
        for child in psutil.Process(self.process.pid).children():
            if child.cmdline()[-1] == name:
                return child
        raise LookupError(name)


class Stage:
    """A running shadow, and the sockets that its engines dial."""

    def __init__(self, shadow: Shadow, sockets: Sequence[socket.socket]) -> None:
        self.shadow = shadow
        self.subject = Subject(shadow.address, tuple(sockets))
        self._before = 0

    @contextmanager
    def session(self) -> Iterator[tuple[End, list[End]]]:
        self._before = len(self.shadow.lines("shadow_compared"))
        with ExitStack() as stack:
            client = stack.enter_context(self.subject.connect())
            yield client, [stack.enter_context(self.subject.accept(number)) for number in range(4)]

    def told(self) -> Line:
        """What was said of the last session."""
        [line] = self.shadow.compared(1, skip=self._before)
        return line


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(listen(ANYWHERE)) for _ in NAMES]
        addresses = [Address("tcp", *each.getsockname()) for each in sockets]
        flags = "--buffer", "1MiB", "--patience", "700ms", "--normalise", "token=[0-9]+"
        shadow = stack.enter_context(Shadow(tmp_path_factory.mktemp("stage"), addresses, *flags))
        yield Stage(shadow, sockets)
        results = shadow.end(signal.SIGTERM)
        [stopped] = shadow.lines("shadow_stopped")
        assert stopped["sessions"] == results["sessions"] == len(shadow.lines("shadow_compared"))
        for line in [*shadow.lines("shadow_compared"), stopped]:
            fields = {key: value for key, value in line.items() if key != "event"}
            envelope = {key: fields.pop(key) for key in Envelope.__struct_fields__}
            msgspec.convert(envelope, Envelope)
            kind = ShadowStopped if line is stopped else ShadowCompared
            assert set(fields) == set(kind.__struct_fields__)
            msgspec.convert(fields, kind)


def exchange(client: End, upstreams: Sequence[End], request: bytes, replies: Sequence[bytes]) -> None:
    """The request to all, a reply from each, the answering one's at the client."""
    client.push(request)
    for upstream, reply in zip(upstreams, replies, strict=True):
        upstream.hear(len(request))
        upstream.push(reply)
    client.hear(len(replies[ANSWER]))


def finish(client: End, upstreams: Sequence[End]) -> None:
    """In order: the client's FIN, then each upstream's."""
    client.finish()
    for upstream in upstreams:
        assert upstream.hear_out().ended == "eof"
        upstream.finish()
    assert client.hear_out().ended == "eof"


def test_all_get_the_clients_bytes_and_the_client_the_one_answer(stage: Stage) -> None:
    request, answer = payload(300_000, seed=1), payload(500_000, seed=2)
    with stage.session() as (client, upstreams):
        assert transfer(
            *[(client, request, upstreams[ANSWER])], *[(up, answer, client) for up in upstreams[:1]]
        )
        for upstream in upstreams[1:]:
            upstream.hear(len(request))
            assert upstream.told_what(client)
            upstream.push(answer)
        assert client.told_what(upstreams[ANSWER])
        finish(client, upstreams)
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES] == ["answer", "same", "same", "same"]
    assert [line[f"{name}_bytes"] for name in NAMES] == [len(answer)] * 4
    assert {(line[f"{name}_ended"], line[f"{name}_closing"]) for name in NAMES} == {("fin", "Ff")}
    assert line["bytes_c2s"] == len(request)
    assert all(line[f"{name}_first_byte_us"] > 0 for name in NAMES)
    assert line["client_port"]


def test_one_flipped_byte_is_told_with_its_offset_and_the_bytes_around_it(stage: Stage) -> None:
    answer = payload(100_000, seed=3)
    flipped = bytearray(answer)
    flipped[76_543] ^= 0x20
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", [answer, answer, answer, bytes(flipped)])
        finish(client, upstreams)
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same", "same", "different"]
    assert (line["twisted_difference"], line["twisted_offset"]) == ("bytes", 76_543)
    assert line["twisted_differences"] == 1
    assert f"[{answer[76_543]:02x}] {answer[76_544]:02x}" in line["twisted_expected"]
    assert f"[{flipped[76_543]:02x}]" in line["twisted_actual"]


def test_what_the_control_differs_in_too_is_noise_and_a_normaliser_hides_it(stage: Stage) -> None:
    replies = [b"id=%d\ntoken=%d\nbody\n" % (number, 10**number) for number in range(4)]
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", replies)
        finish(client, upstreams)
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["noise"] * 3
    # the line of the token is none
    assert [line[f"{name}_differences"] for name in NAMES[1:]] == [1] * 3
    with stage.session() as (client, upstreams):
        replies[BLOCKING] = replies[BLOCKING].replace(b"body", b"Body")
        exchange(client, upstreams, b"go\n", replies)
        finish(client, upstreams)
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["noise", "different", "noise"]
    assert line["blocking_offset"] == replies[ANSWER].index(b"body")


def test_an_answer_after_the_clients_fin_arrives_and_is_compared(stage: Stage) -> None:
    with stage.session() as (client, upstreams):
        client.push(b"question")
        client.finish()
        for upstream in upstreams:
            assert upstream.hear_out().ended == "eof"
            upstream.push(b"the answer")
            upstream.finish()
        assert client.hear_out().received == len(b"the answer")
        assert client.ended == "eof"
    assert [stage.told()[f"{name}_verdict"] for name in NAMES[1:]] == ["same"] * 3


def test_an_upstream_that_ends_first_leaves_the_client_free_to_go_on(stage: Stage) -> None:
    with stage.session() as (client, upstreams):
        for upstream in upstreams:
            upstream.push(b"bye")
            upstream.finish()
        assert client.hear_out().ended == "eof"
        client.push(b"last words")
        client.finish()
        assert [upstream.hear_out().received for upstream in upstreams] == [10] * 4
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same"] * 3
    assert line["nonblocking_closing"] == "fF"


def test_the_clients_reset_reaches_all(stage: Stage) -> None:
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", [b"answer"] * 4)
        client.reset()
        assert [upstream.hear_out().ended for upstream in upstreams] == ["reset"] * 4
    line = stage.told()
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["cut"] * 3


def test_an_upstream_that_dies_is_a_reset_for_the_client_and_a_difference_for_those_that_live(
    stage: Stage,
) -> None:
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", [b"answer"] * 4)
        for upstream in upstreams[:BLOCKING]:
            upstream.reset()
        assert client.hear_out().ended == "reset"
        line = stage.told()
    assert [line[f"{name}_ended"] for name in NAMES] == ["rst", "rst", "timeout", "timeout"]
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same", "different", "different"]
    assert (line["twisted_difference"], line["twisted_expected"]) == ("ending", "rst")


def test_a_shadow_whose_upstream_dies_is_no_matter_for_the_client(stage: Stage) -> None:
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", [b"answer"] * 4)
        upstreams[TWISTED].reset()
        client.push(b"more")
        upstreams[ANSWER].hear(4)
        upstreams[ANSWER].push(b"again")
        client.hear(5)
        for each in (CONTROL, BLOCKING):
            upstreams[each].push(b"again")
        finish(client, upstreams[:TWISTED])
    line = stage.told()
    assert client.received == len(b"answeragain")
    assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same", "same", "different"]
    assert line["twisted_ended"] == "rst"


def upload(stage: Stage, size: int, stalled: Sequence[int]) -> None:
    """A client's bytes, read by all that are not stalled."""
    data = payload(size, seed=4)
    with stage.session() as (client, upstreams):
        # all that read do so side by side, as servers would
        readers = [
            threading.Thread(target=upstreams[each].hear, args=(size,), kwargs={"within": 3 * PATIENCE})
            for each in range(4)
            if each not in stalled
        ]
        for reader in readers:
            reader.start()
        client.push(data, within=3 * PATIENCE)
        for reader in readers:
            reader.join()
        assert upstreams[ANSWER].told_what(client)
        for each in range(4):
            upstreams[each].finish()
        assert client.hear_out().ended == "eof"
        client.finish()


def test_a_shadow_that_does_not_read_is_detached_and_does_not_slow_the_client(stage: Stage) -> None:
    # more than the kernel's buffers on its way hold: a client that waited for a shadow would wait for ever
    size = 48 << 20
    began = time.monotonic()
    upload(stage, size, stalled=[])
    without = time.monotonic() - began
    began = time.monotonic()
    upload(stage, size, stalled=[CONTROL, BLOCKING])
    assert time.monotonic() - began < 5 * without + 2
    line = stage.told()
    assert [line[f"{name}_ended"] for name in ("control", "blocking")] == ["behind"] * 2
    assert [line[f"{name}_verdict"] for name in ("control", "blocking")] == ["detached"] * 2
    assert line["bytes_c2s"] == size


def test_a_shadow_that_answers_endlessly_is_detached_while_the_session_goes_on(stage: Stage) -> None:
    with stage.session() as (client, upstreams):
        exchange(client, upstreams, b"go\n", [b"answer"] * 4)
        until = time.monotonic() + PATIENCE
        # its connection is reset, and the client's goes on
        while upstreams[TWISTED].may_send:
            upstreams[TWISTED].push(bytes(1 << 16), within=0.1)
            assert time.monotonic() < until
        exchange(client, upstreams[:TWISTED], b"go\n", [b"answer"] * 3)
        finish(client, upstreams[:TWISTED])
    line = stage.told()
    assert line["twisted_ended"] == "ahead"
    assert (line["twisted_verdict"], line["twisted_offset"]) == ("different", 6)
    assert 1 << 20 <= line["twisted_bytes"] < 2 << 20
    assert client.received == 12


def test_a_shadow_is_not_called_endless_while_the_client_does_not_read(stage: Stage) -> None:
    answer = payload(24 << 20, seed=5)
    with stage.session() as (client, upstreams):
        writers = [threading.Thread(target=upstream.push, args=(answer,)) for upstream in upstreams]
        for writer in writers:
            writer.start()
        client.hear(1 << 20)
        # longer than the shadows' patience
        assert not upstreams[ANSWER]._wait(0, 1.0)  # noqa: SLF001  a wait for nothing to happen
        client.hear(len(answer) - (1 << 20))
        for writer in writers:
            writer.join()
        assert client.told_what(upstreams[ANSWER])
        for upstream in upstreams:
            upstream.finish()
        client.finish()
        assert client.hear_out().ended == "eof"
    line = stage.told()
    # one may fall behind once the client reads again, on a machine that is short of cores
    assert {line[f"{name}_ended"] for name in NAMES} <= {"fin", "behind"}
    assert {line[f"{name}_verdict"] for name in NAMES[1:]} <= {"same", "detached"}


def test_a_shadow_hears_the_next_request_once_it_has_answered_as_much_as_the_client_had_heard() -> None:
    ours, _theirs = pair = socket.socketpair()
    with ExitStack() as stack:
        for each in pair:
            stack.enter_context(each)
        shadow = Answer(ours, Target("twisted", "twisted", ANYWHERE), Comparison())
        shadow.hold(b"second", after=10, age=0)
        shadow.tell_on(age=PACE - 1)
        assert not shadow.queue
        shadow.received = 10
        shadow.tell_on(age=PACE - 1)
        assert list(shadow.queue) == [b"second"]
        # nor is its FIN told before the rest
        shadow.hold(b"third", after=20, age=PACE)
        shadow.hold(b"", after=20, age=PACE)
        shadow.tell_on(age=2 * PACE - 1)
        assert not shadow.finishing
        # an answer that stays shorter holds it up once
        shadow.tell_on(age=2 * PACE)
        assert shadow.finishing
        assert list(shadow.queue) == [b"second", b"third"]
        shadow.received = 19
        shadow.hold(b"fourth", after=29, age=3 * PACE)
        shadow.tell_on(age=3 * PACE)
        assert list(shadow.queue)[-1] == b"fourth"


# Real servers -----------------------------------------------------------------------------------


@contextmanager
def served(arguments: Sequence[str], address: Address) -> Iterator[Address]:
    """A server while it runs; it accepts when this yields."""
    process = subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if not probe.connect_ex(address.host):
                    break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for the path of a UNIX socket."""
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        yield Path(folder)


def redis(folder: Path) -> "AbstractContextManager[Address]":
    folder.mkdir()
    path = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", ""]
    return served(command, Address("unix", str(path)))


def nginx(folder: Path, modified: int) -> "AbstractContextManager[Address]":
    """One that has the same page as any other, of another date."""
    folder.mkdir()
    page = folder / "page.html"
    page.write_text("<!doctype html><title>hello</title>\n" * 100)
    os.utime(page, (modified, modified))
    path = folder / "nginx.sock"
    temporary = "".join(
        f"{each}_temp_path {folder}/{each};\n"
        for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid;\nevents {{}}\n"
        f"http {{\n{temporary}access_log off;\nserver {{ listen unix:{path}; root {folder}; }}\n}}\n"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    return served(command, Address("unix", str(path)))


def client(shadow: Shadow, command: str) -> str:
    """What a client program prints; {host} and {port} are the shadow's."""
    arguments = [part.format(host=shadow.address.host, port=shadow.address.port) for part in command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_redis_and_its_clients_do_not_notice_and_all_logs_have_the_same_sessions_by_their_pair(
    tmp_path: Path, short: Path
) -> None:
    kept = tmp_path / "kept"
    with ExitStack() as stack:
        replicas = [stack.enter_context(redis(short / name)) for name in NAMES]
        shadow = stack.enter_context(Shadow(tmp_path, replicas, "--keep", str(kept), "--sessions", "14"))
        assert client(shadow, "redis-cli -h {host} -p {port} set key value") == "OK\n"
        assert client(shadow, "redis-cli -h {host} -p {port} incr count") == "1\n"
        benchmark = client(shadow, "redis-benchmark -h {host} -p {port} -n 1000 -c 5 -P 4 -t set,get -q")
        assert benchmark.count("requests per second") == 2
        # it used five connections twice, and one to ask for the server's settings
        assert client(shadow, "redis-cli -h {host} -p {port} get key") == "value\n"
        results = shadow.end()
    assert results["sessions"] == 14
    assert results["cut"] == 0
    assert results["differences"] == []
    for told in results["engines"][1:]:
        assert told["verdicts"] == {**dict.fromkeys(told["verdicts"], 0), "same": 14}
        assert told["bytes"] == results["engines"][0]["bytes"]
    # each engine's own log has the same sessions by their pair, with the real client's address
    compared = {
        line["session"]: (line["client_ip"], line["client_port"], line["bytes_c2s"])
        for line in shadow.lines("shadow_compared")
    }
    for name in NAMES:
        logged = [json.loads(line) for line in (kept / name / "log.jsonl").read_text().splitlines()]
        closed = [line for line in logged if line["event"] == "session_closed"]
        assert {line["instance"] for line in closed} == {name}
        assert compared == {
            line["pair"]: (line["client_ip"], line["client_port"], line["bytes_c2s"]) for line in closed
        }
        # which came by the tee
        assert all(line["local_port"] == shadow.address.port != line["via_port"] for line in closed)


def test_dates_of_two_web_servers_differ_unless_they_are_normalised(tmp_path: Path, short: Path) -> None:
    hidden = ("--normalise", "(?i)(date|last-modified): .*", "--normalise", "ETag: .*=>ETag")
    plain, normalised = tmp_path / "plain", tmp_path / "normalised"
    plain.mkdir()
    normalised.mkdir()
    with ExitStack() as stack:
        one = stack.enter_context(nginx(short / "one", 1_000_000_000))
        other = stack.enter_context(nginx(short / "other", 1_234_567_890))
        servers = [one, one, one, other]
        with Shadow(plain, servers) as shadow:
            client(shadow, "curl -s http://{host}:{port}/page.html")
            [line] = shadow.compared(1)
            assert line["twisted_verdict"] == "different"
            # Last-Modified and ETag; the second may have changed as well
            assert 2 <= line["twisted_differences"] <= 3
        # wrk goes as fast as the answering engine: the others may fall far behind meanwhile
        with Shadow(normalised, servers, "--buffer", "128MiB", *hidden) as shadow:
            page = client(shadow, "curl -s http://{host}:{port}/page.html")
            assert page == (short / "one/page.html").read_text()
            [line] = shadow.compared(1)
            assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same"] * 3
            wrk = client(shadow, "wrk -t 1 -c 3 -d 1s http://{host}:{port}/page.html")
            assert "Socket errors" not in wrk
            assert "Non-2xx" not in wrk
            shadow.end(signal.SIGTERM)
            # it ends in the middle of requests, which a server may or may not answer then
            lines = shadow.lines("shadow_compared")
            assert not [line for line in lines if "bytes" in {line[f"{name}_difference"] for name in NAMES}]


# Its own life -----------------------------------------------------------------------------------


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(listen(ANYWHERE)) for _ in NAMES]


def addresses(sockets: Sequence[socket.socket]) -> list[Address]:
    return [Address("tcp", *each.getsockname()) for each in sockets]


def test_it_says_when_it_is_ready_reopens_its_log_and_lets_open_sessions_end(
    tmp_path: Path, short: Path, sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short / "notify"))
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short / "notify"))
        with Shadow(tmp_path, addresses(sockets)) as shadow:
            stage = Stage(shadow, sockets)
            # the daemons are children of ours, and tell the same socket
            while f"STATUS=on {shadow.address}" not in (ready := manager.recv(4096).decode()):
                pass
            assert "READY=1" in ready
            with stage.session() as (client, upstreams):
                exchange(client, upstreams, b"go\n", [b"answer"] * 4)
                shadow.log.rename(tmp_path / "rotated")
                shadow.process.send_signal(signal.SIGHUP)
                until = time.monotonic() + PATIENCE
                while not shadow.log.exists():
                    assert time.monotonic() < until
                    time.sleep(0.01)
                shadow.process.send_signal(signal.SIGTERM)
                while "waiting for 1 open sessions" not in shadow.said():
                    assert time.monotonic() < until
                    time.sleep(0.01)
                with pytest.raises(ConnectionRefusedError):
                    stage.subject.connect()
                exchange(client, upstreams, b"go\n", [b"answer"] * 4)
                finish(client, upstreams)
            results = shadow.end()
    assert (results["sessions"], results["cut"]) == (1, 0)
    assert [line[f"{name}_verdict"] for line in shadow.lines("shadow_compared") for name in NAMES[1:]] == [
        "same"
    ] * 3


def test_a_second_signal_cuts_what_is_open_and_says_so(tmp_path: Path, sockets: list[socket.socket]) -> None:
    with (
        Shadow(tmp_path, addresses(sockets)) as shadow,
        Stage(shadow, sockets).session() as (client, upstreams),
    ):
        exchange(client, upstreams, b"go\n", [b"answer"] * 4)
        shadow.process.send_signal(signal.SIGINT)
        until = time.monotonic() + PATIENCE
        while "Ctrl-C cuts them" not in shadow.said():
            assert time.monotonic() < until
            time.sleep(0.01)
        results = shadow.end(signal.SIGINT)
        assert client.hear_out().ended == "reset"
    assert (results["sessions"], results["cut"]) == (1, 1)
    assert results["engines"][1]["verdicts"]["cut"] == 1


def test_a_daemon_that_dies_is_told_and_the_death_of_the_answering_one_is_the_end(
    tmp_path: Path, sockets: list[socket.socket]
) -> None:
    with Shadow(tmp_path, addresses(sockets)) as shadow:
        shadow.child("twisted").kill()
        until = time.monotonic() + PATIENCE
        while "told as refused" not in shadow.said():
            assert time.monotonic() < until
            time.sleep(0.01)
        stage = Stage(shadow, sockets)
        with stage.subject.connect() as end, ExitStack() as stack:
            upstreams = [stack.enter_context(stage.subject.accept(number)) for number in range(TWISTED)]
            exchange(end, upstreams, b"go\n", [b"answer"] * 3)
            finish(end, upstreams)
        [line] = shadow.compared(1)
        assert [line[f"{name}_verdict"] for name in NAMES[1:]] == ["same", "same", "refused"]
        shadow.child("nonblocking").kill()
        shadow.process.wait(PATIENCE)
        assert shadow.process.returncode == 69
        last = shadow.said().splitlines()[-1]
        assert last.startswith("triptych: the daemon of nonblocking ended with signal SIGKILL")
        assert last.endswith("it was the one that answers")


def test_an_upstream_that_refuses_is_the_engines_affair_and_not_the_shadows(
    tmp_path: Path, sockets: list[socket.socket]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gone = Address("tcp", *nobody.getsockname())
        where = [gone, gone, *addresses(sockets)[BLOCKING:]]
        with Shadow(tmp_path, where, "--patience", "500ms", "--sessions", "1") as shadow:
            stage = Stage(shadow, sockets)
            with stage.subject.connect() as end:
                # an engine gives up as it does without a tee
                assert end.hear_out().ended in {"eof", "reset"}
            results = shadow.end()
    assert results["engines"][0]["bytes"] == 0
    assert results["engines"][1]["verdicts"]["same"] == 1


# What it is told --------------------------------------------------------------------------------


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_an_upstream_that_is_its_own_address_is_refused_in_one_line() -> None:
    done = run("--listen", "127.0.0.1:29399", "--upstream", "localhost:29399")
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "where it listens itself" in done.stderr


def test_every_fault_of_flags_and_file_is_told_with_where_it_is(tmp_path: Path) -> None:
    done = run("--listen", "udp:127.0.0.1:1", "--normalise", "(", "--patience", "10")
    assert done.returncode == 64
    told = done.stderr.splitlines()
    assert [line.split(":")[1] for line in told] == [
        " --upstream",
        " --patience",
        " --listen",
        " --normalise",
    ]
    path = tmp_path / "shadow.toml"
    path.write_text('listen = "127.0.0.1:0"\nupstraem = "127.0.0.1:1"\nbuffer = "1KiB"\n')
    done = run("--config", str(path), "--upstream", "127.0.0.1:0")
    assert done.returncode == 78
    assert done.stdout == ""
    assert all(line.startswith("triptych: ") for line in done.stderr.splitlines())
    assert f'{path}: upstraem: unknown key (did you mean "upstream"?)' in done.stderr
    assert f"{path}: buffer: must be at least 128KiB" in done.stderr
    assert "--upstream: 127.0.0.1:0: an upstream is HOST:PORT" in done.stderr


def test_a_file_says_the_same_as_the_flags_and_flags_come_first(tmp_path: Path) -> None:
    path = tmp_path / "shadow.toml"
    path.write_text(
        """
        listen = "127.0.0.1:6380"
        upstream = "127.0.0.1:6379"
        answer = "twisted"
        normalise = ["Date: .*", "id=[0-9]+=>id"]
        buffer = "2MiB"
        [shadow-upstream]
        control = "unix:/run/control.sock"
        """
    )
    flags = {
        "listen": "127.0.0.1:6380",
        "upstream": "127.0.0.1:6379",
        "answer": "twisted",
        "normalise": ["Date: .*", "id=[0-9]+=>id"],
        "buffer": "2MiB",
        "shadow-upstream": {"control": "unix:/run/control.sock"},
    }
    read = shadow_settings.read(path, {})
    assert read == shadow_settings.read(None, flags)
    assert list(read.names()) == ["twisted", "control", "blocking", "nonblocking"]
    assert read.names()["control"] == ("twisted", Address("unix", "/run/control.sock"))
    assert read.names()["blocking"] == ("blocking", Address("tcp", "127.0.0.1", 6379))
    assert shadow_settings.read(path, {"answer": "blocking"}).answer == "blocking"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listen = [", "not TOML"),
        (
            'listen = "a:1"\nupstream = "b:1"\n[shadow-upstream]\nnonblocking = "c:1"\n',
            "answers, from upstream",
        ),
        ('listen = "a:1"\nupstream = "b:1"\n[shadow-upstream]\nother = "c:1"\n', "is none of control"),
        ('listen = "a:1"\nupstream = "systemd:b"\n', "an upstream is HOST:PORT"),
    ],
)
def test_a_file_with_a_fault_is_refused_with_its_name(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "shadow.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=fault) as caught:
        shadow_settings.read(path, {})
    assert caught.value.of_file
    assert caught.value.faults[0].startswith(f"{path}: ")
