"""`triptych record` and `triptych replay`, as their users run them: real clients, real servers, real files."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import StartDaemon
from hypothesis import given, settings
from hypothesis import strategies as st

from comparisons.recordings.clients import Clients, Report
from comparisons.recordings.format import (
    VERSION,
    Conversation,
    End,
    Header,
    Recording,
    Side,
    Step,
    decode,
    encode,
    load,
    pack,
)
from comparisons.recordings.keeper import Keeper
from comparisons.recordings.redaction import Redactor
from comparisons.recordings.served import Served, Servers
from services.cli import main
from services.core.addresses import Address

PATIENCE = 20.0
HEADER = Header(VERSION, "made up")


class Command:
    """`triptych ...` as a process; what it says on stderr is read as it comes."""

    def __init__(self, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "services.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def says(self, words: str) -> str:
        """The first line of stderr with these words, once it is there."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}: {self.lines}")

    def front(self, words: str) -> int:
        """The port in that line."""
        found = re.search(r"127\.0\.0\.1:(\d+)", self.says(words))
        assert found
        return int(found[1])

    def ends(self) -> str:
        """What it printed, once it has ended by itself, in order."""
        output, rest = self.process.communicate(timeout=PATIENCE)
        self.lines += rest.splitlines()
        assert self.process.returncode == 0, self.lines
        return output


@contextmanager
def running(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[Command]:
    command = Command(*arguments, prefix=prefix)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.communicate()


@contextmanager
def recording(
    output: Path, upstream: int, *more: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[Command, int]]:
    """`triptych record` before a port, and where it listens."""
    flags = [
        "record",
        "--listen",
        "127.0.0.1:0",
        "--upstream",
        f"127.0.0.1:{upstream}",
        "--output",
        str(output),
    ]
    with running(*flags, *more, prefix=prefix) as command:
        yield command, command.front("recording")


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    settings = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *settings], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert any("Ready to accept" in line for line in process.stdout)
        yield port
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what comes, on each connection until its end."""

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sockets.append(listener.accept()[0])
                threads.append(threading.Thread(target=serve, args=(sockets[-1],)))
                threads[-1].start()

    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for sock in sockets:
                # a reset may be lost where a machine is busy, and nobody says it again
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def refused(port: int) -> None:
    """Return once nobody listens there any more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connected(port).close()
        except OSError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def exchange(sock: socket.socket, data: bytes) -> None:
    """Say it to an echo and hear it."""
    sock.sendall(data)
    heard = b""
    while len(heard) < len(data):
        more = sock.recv(len(data) - len(heard))
        assert more, "the echo has ended"
        heard += more
    assert heard == data


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout


def content(path: Path) -> bytes:
    return b"".join(step.data for each in load(path).conversations for step in each.steps)


# Recording


def test_real_redis_clients_are_recorded_and_replayed_at_every_speed_with_the_recorded_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.recording"
    with redis(tmp_path) as server:
        with recording(own, server) as (command, front):
            run("redis-cli", "-p", str(front), "SET", "greeting", "hello")
            run("redis-cli", "-p", str(front), "-r", "5", "-i", "0.05", "APPEND", "greeting", "!")
            run("redis-benchmark", "-p", str(front), "-q", "-n", "200", "-c", "5", "-t", "set,get")
            command.process.send_signal(signal.SIGTERM)
            said = command.ends()
        kept = load(own)
        assert kept.damaged == []
        assert all(each.over for each in kept.conversations)
        assert len(kept.conversations) == int(said.split()[1]) >= 10
        assert kept.conversations[0].server == f"127.0.0.1:{server}"
        assert abs(kept.header.began_us / 1e6 - time.time()) < 60
        for how in (["--speed", "1"], ["--speed", "10", "--loops", "2"], ["--speed", "max", "--loops", "3"]):
            run("redis-cli", "-p", str(server), "FLUSHALL")
            # the keys are gone once, so what is appended to is as long as it was in the first round only
            limit = ["--concurrency", "3", "--json"]
            assert main(["replay", str(own), "--upstream", f"127.0.0.1:{server}", *how, *limit]) == 0
            played = json.loads(capsys.readouterr().out)["report"]
            assert all(each["reply"] == "as recorded" for each in played["conversations"]), played
            loops = int(how[-1]) if "--loops" in how else 1
            assert len(played["conversations"]) == loops * len(kept.conversations)
            assert played["exchanges"] == loops * 407
            assert played["untimed"] == 0
            assert (played["lag"] is None) == ("max" in how)


def test_a_session_goes_on_after_the_cap_on_bytes_and_the_file_ends_there(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    with echo() as server, recording(own, server, "--most-bytes", "4KiB") as (command, front):
        with connected(front) as client:
            for _ in range(30):
                exchange(client, b"x" * 500)
            command.says("recording has stopped: --most-bytes")
            kept = load(own)
            exchange(client, b"still there")
            refused(front)
        assert "1 conversations" in command.ends()
    assert kept.damaged == []
    assert load(own) == kept
    assert 1000 < len(content(own)) <= 4096


def test_a_session_goes_on_after_the_cap_on_time(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    with echo() as server, recording(own, server, "--most-time", "500ms") as (command, front):
        with connected(front) as client:
            exchange(client, b"before")
            command.says("recording has stopped: --most-time")
            exchange(client, b"after")
        command.ends()
    assert content(own) == b"before" * 2


def test_recording_ends_after_so_many_sessions_once_they_have_ended(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    with echo() as server, recording(own, server, "--sessions", "2") as (command, front):
        with connected(front) as one, connected(front) as two:
            exchange(one, b"one")
            exchange(two, b"two")
            refused(front)
            exchange(one, b"one still")
        assert "2 conversations" in command.ends()
    assert all(each.over for each in load(own).conversations)


def test_a_signal_lets_open_sessions_end_and_a_second_one_cuts_them(tmp_path: Path) -> None:
    own, other = tmp_path / "own.recording", tmp_path / "other.recording"
    with echo() as server:
        with recording(own, server) as (command, front), connected(front) as client:
            exchange(client, b"before")
            command.process.send_signal(signal.SIGINT)
            refused(front)
            exchange(client, b"during")
            client.close()
            command.ends()
        with recording(other, server) as (command, front), connected(front) as client:
            exchange(client, b"x")
            command.process.send_signal(signal.SIGTERM)
            refused(front)
            command.process.send_signal(signal.SIGTERM)
            assert " sessions cut" in command.ends()
    assert b"during" in content(own)
    assert content(other) == b"xx"


def test_of_a_killed_recorder_everything_but_the_last_second_can_be_read_by_its_owner_only(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.recording"
    with echo() as server, recording(own, server) as (command, front), connected(front) as client:
        deadline = time.monotonic() + PATIENCE
        exchange(client, b"long ago")
        while b"long ago" not in (content(own) if own.stat().st_size else b""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command.process.kill()
        command.process.wait()
    kept = load(own)
    assert [each.reason for each in kept.damaged] == ["cut short: the end is missing"]
    assert own.stat().st_mode & 0o777 == 0o600


def test_an_upstream_that_dies_in_the_middle_is_recorded_so(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        recording(own, listener.getsockname()[1]) as (command, front),
        connected(front) as client,
    ):
        server, _ = listener.accept()
        client.sendall(b"question")
        server.recv(100)
        server.sendall(b"half an ans")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.close()
        assert client.recv(100) == b"half an ans"
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        command.process.send_signal(signal.SIGTERM)
        command.ends()
    (conversation,) = load(own).conversations
    assert conversation.endings == {"client": "open", "server": "reset"}
    assert conversation.bytes_of("server") == 11


def test_a_server_that_does_not_read_stops_its_client_as_it_would_directly(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        recording(own, listener.getsockname()[1]) as (_, front),
        connected(front) as client,
    ):
        server, _ = listener.accept()
        client.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                sent += client.send(bytes(1 << 16))
        server.settimeout(PATIENCE)
        client.shutdown(socket.SHUT_WR)
        heard = 0
        while data := server.recv(1 << 20):
            heard += len(data)
        server.close()
    assert heard == sent < 32 << 20


def test_a_full_disk_costs_the_recording_and_no_session(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    small = ["prlimit", "--fsize=2000", "--"]
    with echo() as server, recording(own, server, prefix=small) as (command, front):
        with connected(front) as client:
            exchange(client, os.urandom(100_000))
            command.says("recording has stopped: File too large")
            exchange(client, b"still there")
        command.process.wait(PATIENCE)
        assert command.process.returncode == 71
        assert command.says("can be read").startswith(f"triptych: {own}: File too large")
    assert load(own).damaged


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        ({"--upstream": "127.0.0.1:{port}"}, 78, "where it listens itself"),
        ({"--output": "{folder}"}, 64, "exists; remove it or name another"),
        ({"--output": "{folder}/none/x"}, 71, "No such file or directory"),
        ({"--upstream": "nobody.invalid:1"}, 69, "unknown host"),
        ({"--upstream": "udp:127.0.0.1:1"}, 64, "conversations are on HOST:PORT or unix:/PATH"),
        ({"--upstream": "127.0.0.1:0"}, 64, "needs a port"),
        ({"--redact": "("}, 64, "no regular expression"),
        ({"--redact": "x*"}, 64, "matches nothing at all"),
        ({"--most-bytes": "64"}, 64, "no size up to 1GiB"),
        ({"--most-time": "10"}, 64, "no duration"),
    ],
)
def test_what_cannot_be_recorded_is_one_line_with_its_code(
    flags: dict[str, str], code: int, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    usual = {
        "--listen": f"127.0.0.1:{port}",
        "--upstream": "127.0.0.1:1",
        "--output": str(tmp_path / "own.recording"),
    }
    given = {**usual, **{flag: text.format(port=port, folder=tmp_path) for flag, text in flags.items()}}
    assert main(["record", *(part for pair in given.items() for part in pair)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "own.recording").exists()


# Redaction


def redacted(data: bytes, patterns: Sequence[bytes], cuts: Sequence[int], size: int) -> bytes:
    redactor = Redactor([re.compile(each) for each in patterns], block=size, reach=size)
    ends = [*sorted(min(cut, len(data)) for cut in cuts), len(data)]
    out, begin = b"", 0
    for end in ends:
        out += redactor.feed(data[begin:end])
        assert len(out) <= end
        begin = end
    return out + redactor.end()


texts = st.lists(
    st.sampled_from([b"a", b"ab", b"secret", b"\r\n", b"pass=", b"0123456789"]), max_size=40
).map(b"".join)
expressions = st.lists(
    st.sampled_from(
        [b"secret", rb"(?<=pass=)\w{1,6}", b"a+b", rb"\d{3}(?=\r)", b"b(?!a)", rb"(?m)^a", b"ab|abab"]
    ),
    min_size=1,
    max_size=3,
)
cuttings = st.lists(st.integers(0, 250), max_size=12)


@settings(deadline=None)
@given(texts, expressions, cuttings, st.sampled_from([1, 4, 32]))
def test_how_a_stream_was_cut_never_changes_what_is_redacted(
    data: bytes, patterns: list[bytes], cuts: list[int], size: int
) -> None:
    out = redacted(data, patterns, cuts, size)
    assert out == redacted(data, patterns, [], size)
    assert len(out) == len(data)


@settings(deadline=None)
@given(texts, expressions, cuttings)
def test_matches_within_reach_are_those_of_the_whole_stream(
    data: bytes, patterns: list[bytes], cuts: list[int]
) -> None:
    # no match is longer than 32 bytes, unless so many letters a come in a row
    if b"a" * 16 in data:
        return
    wanted = bytearray(data)
    for pattern in patterns:
        for match in re.finditer(pattern, data):
            wanted[match.start() : match.end()] = b"x" * len(match[0])
    assert redacted(data, patterns, cuts, 32) == bytes(wanted)


def test_nothing_that_is_to_be_redacted_reaches_the_disk_even_in_pieces(tmp_path: Path) -> None:
    own = tmp_path / "own.recording"
    patterns = ["--redact", r"(?<=AUTH )\S+", "--redact", "never there"]
    with echo() as server, recording(own, server, *patterns) as (command, front):
        with connected(front) as client:
            for piece in (b"AUTH hun", b"ter", b"2\r\n", b"GET a\r\n"):
                exchange(client, piece)
        command.process.send_signal(signal.SIGTERM)
        said = command.ends()
    (conversation,) = load(own).conversations
    both = {
        side: b"".join(step.data for step in conversation.steps if step.who == side)
        for side in ("client", "server")
    }
    assert both == dict.fromkeys(both, b"AUTH xxxxxxx\r\nGET a\r\n")
    assert next(step.data for step in conversation.steps if step.who == "client") == b"AUTH xxx"
    assert "2 matches of (?<=AUTH )\\S+ overwritten" in said
    assert "0 matches of never there overwritten" in said


def test_steps_keep_their_order_while_some_of_them_wait_to_be_redacted(tmp_path: Path) -> None:
    path = tmp_path / "own.recording"
    with path.open("wb", buffering=0) as file, Keeper(file, HEADER, [re.compile(b"secret")]) as keeper:
        keeper.begin(0, 0, "", "")
        steps = [
            Step(1, "client", "data", b"sec"),
            Step(2, "server", "data", bytes(20_000)),
            Step(3, "client", "data", b"ret!"),
        ]
        for step in [*steps, Step(4, "client", "end"), Step(5, "server", "end")]:
            keeper.add(0, [step])
        keeper.end(0)
    (conversation,) = load(path).conversations
    assert [(step.when_us, step.data[:5]) for step in conversation.steps] == [
        (1, b"xxx"), (2, bytes(5)), (3, b"xxx!"), (4, b""), (5, b""),
    ]  # fmt: skip


# Replaying


def said(*steps: tuple[int, Side, bytes | str], start: int = 0) -> Conversation:
    return Conversation(
        start,
        [
            Step(when, who, "data", what) if isinstance(what, bytes) else Step(when, who, what)  # type: ignore[arg-type]  # "end" or "reset"
            for when, who, what in steps
        ],
    )


def whole(question: bytes, answer: bytes, start: int = 0) -> Conversation:
    return said(
        (0, "client", question),
        (1000, "server", answer),
        (2000, "client", "end"),
        (3000, "server", "end"),
        start=start,
    )


@contextmanager
def served(
    conversations: Sequence[Conversation], speed: float = 0.0
) -> Iterator[tuple[Address, list[Served]]]:
    """A recorded server; what came of it is in the list once the block has ended."""
    came: list[Served] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.setblocking(False)
        servers = Servers(Recording(HEADER, list(conversations)), [listener], speed=speed)
        thread = threading.Thread(target=lambda: came.append(servers.run()))
        thread.start()
        try:
            yield Address("tcp", *listener.getsockname()), came
        finally:
            servers.stop()
            thread.join()


def played(
    recorded: Sequence[Conversation], real: Sequence[Conversation], *, thinks: float = 0.0, **how: Any
) -> tuple[Report, Served]:
    """The clients of one recording against the servers of another."""
    with served(real, thinks) as (address, came):
        report = Clients(Recording(HEADER, list(recorded)), [address], **how).run()
    return report, came[0]


@pytest.mark.parametrize("speed", [0.0, 1.0])
@pytest.mark.parametrize("name", ["http", "redis"])
def test_both_ends_of_a_recording_played_by_two_programs_say_what_was_recorded(
    name: str, speed: float
) -> None:
    conversations = load(name).conversations
    report, came = played(conversations, conversations, thinks=speed, speed=speed)
    odd = [each for each in report.conversations if each.reply != "as recorded"]
    # clients of a benchmark begin alike, and with several at once nobody can tell which of them is which
    assert len(odd) <= (0 if name == "http" else 12), odd
    assert came.connections == len(conversations)


kinds = [
    whole(b"question", b"answer" * 50_000),
    said((0, "server", b"220 hello"), (1, "client", b"QUIT"), (2, "server", b"221"), (3, "server", "end"), (4, "client", "end")),
    said((0, "client", b"x" * 200_000), (1, "server", b"ok"), (2, "client", "reset")),
    said((0, "client", b"y"), (1, "server", b"z" * 200_000), (2, "server", "reset")),
    said((0, "client", b"half"), (1, "client", "end"), (2, "server", b"late"), (3, "server", "end")),
    said((0, "client", b"never over"), (1, "server", b"so far")),
]  # fmt: skip


@pytest.mark.parametrize("conversation", kinds)
def test_every_kind_of_conversation_is_played_by_both_sides_to_its_end(conversation: Conversation) -> None:
    report, came = played([conversation], [conversation], speed=0.0, loops=3)
    assert [each.reply for each in report.conversations] == ["as recorded"] * 3
    assert [each.ended for each in report.conversations] in (
        [conversation.endings["server"]] * 3,
        ["end"] * 3,  # the recorder stopped before it, and the player ends what the client ended
    )
    assert (came.played, came.left, came.unknown) == (3, 0, 0)


def test_a_changed_byte_is_found_at_its_offset_with_what_was_and_is_there() -> None:
    good, bad = b"0123456789" * 10_000, b"0123456789" * 7_000 + b"012X456789" * 3_000
    report, _ = played([whole(b"?", good)], [whole(b"?", bad)])
    (came,) = report.conversations
    assert (came.reply, came.offset, came.bytes, came.differing) == ("different", 70_003, 100_000, 3_000)
    assert bytes.fromhex(came.was).startswith(b"3456")
    assert bytes.fromhex(came.now).startswith(b"X456")
    # the stream is as long as it was, so nothing is doubtful about its times
    assert (report.exchanges, report.untimed) == (1, 0)


@pytest.mark.parametrize(("now", "offset"), [(b"ok!", 2), (b"o", 1), (b"", 0)])
def test_an_answer_of_another_length_is_different_and_does_not_stop_the_conversation(
    now: bytes, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comparisons.recordings.clients.SILENCE", 0.5)
    twice = [
        (0, "client", b"a"),
        (1, "server", b"ok"),
        (2, "client", b"b"),
        (3, "server", b"ok"),
        (4, "client", "end"),
    ]
    other = [each for each in twice if each[2] != b"ok"] if not now else [
        (when, who, now if what == b"ok" and when == 1 else what) for when, who, what in twice
    ]  # fmt: skip
    report, _ = played([said(*twice)], [said(*other)])  # type: ignore[arg-type]  # the sides are sides
    (came,) = report.conversations
    assert (came.reply, came.offset, came.differing) == ("different", offset, None)
    assert report.exchanges + report.untimed == 2


def test_how_late_a_slow_server_makes_the_steps_is_told_and_is_not_called_our_own() -> None:
    quick = said(*((n * 10_000, "client" if n % 2 else "server", b"x") for n in range(1, 7)))
    slow = said(*((n * 100_000, "client" if n % 2 else "server", b"x") for n in range(1, 7)))
    report, _ = played([quick], [slow], thinks=1.0)
    assert report.lag
    assert report.own_lag
    assert report.lag.max > 150_000
    assert report.own_lag.p50 < report.lag.max / 2
    assert report.latency
    assert report.latency_recorded
    assert (report.latency.p50 > 90_000, report.latency_recorded.p50) == (True, 10_000)


def test_conversations_that_wait_for_a_place_are_late_and_the_schedule_is_not_slowed() -> None:
    long = [
        said(
            (0, "client", b"x"),
            (100_000, "server", b"y"),
            (100_001, "client", "end"),
            (100_002, "server", "end"),
        )
    ] * 4
    crowded, _ = played(long, long, thinks=1.0, concurrency=1)
    free, _ = played(long, long, thinks=1.0)
    assert crowded.lag
    assert free.lag
    assert crowded.lag.max >= 290_000
    assert crowded.seconds >= 0.39
    assert free.lag.max < crowded.lag.max


def test_a_replay_twice_as_fast_takes_half_the_time_and_loops_follow_each_other() -> None:
    two = [whole(b"a", b"b"), whole(b"c", b"d", start=200_000)]
    usual, _ = played(two, two, loops=2)
    quick, _ = played(two, two, loops=2, speed=2.0)
    assert usual.seconds >= 0.4
    assert 0.2 <= quick.seconds < usual.seconds
    assert [(each.conversation, each.loop) for each in quick.conversations] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]


def test_a_recorded_server_knows_a_conversation_by_what_its_client_says_and_plays_equals_in_their_order() -> (
    None
):
    kept = [whole(b"GET a", b"first"), whole(b"GET b", b"other"), whole(b"GET a", b"second")]
    heard = []
    with served(kept) as (address, came):
        for question in (b"GET a", b"GET a", b"GET b", b"GET a"):
            with connected(address.port) as client:
                client.sendall(question)
                client.shutdown(socket.SHUT_WR)
                answer = b""
                while data := client.recv(100):
                    answer += data
                heard.append(answer)
        with connected(address.port) as stranger:
            stranger.sendall(b"GET z")
            with pytest.raises(ConnectionResetError):
                stranger.recv(100)
            port = stranger.getsockname()[1]
    assert heard == [b"first", b"second", b"other", b"first"]
    assert (came[0].played, came[0].unknown) == (4, 1)
    assert [(each.client, each.offset) for each in came[0].strangers] == [(f"127.0.0.1:{port}", 4)]


def test_a_client_that_waits_is_in_a_conversation_in_which_it_is_answered_there() -> None:
    greeted = said((0, "server", b"hello"), (1, "client", b"bye"), (2, "client", "end"), (3, "server", "end"))
    with served([whole(b"GET ab", b"long"), whole(b"GET a", b"short"), greeted]) as (address, came):
        for say, hear in ((b"GET a", b"short"), (b"", b"hello")):
            with connected(address.port) as client:
                client.sendall(say)
                assert client.recv(100) == hear
    assert came[0].unknown == 0


def test_a_replay_against_a_played_server_as_commands_tells_the_ports_of_its_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.recording"
    path.write_bytes(encode(HEADER, [whole(b"a", b"b"), whole(b"c", b"d")]))
    with running("replay", str(path), "--serve", "127.0.0.1:0") as server:
        where = f"127.0.0.1:{server.front('serving on')}"
        assert main(["replay", str(path), "--upstream", where, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert main(["replay", str(path), "--upstream", where, "--speed", "max", "--loops", "2"]) == 0
        table = capsys.readouterr().out
        server.process.send_signal(signal.SIGTERM)
        assert "6 connections: 6 to the end, 0 left before it, 0 said what nobody had said" in server.ends()
    assert (told["version"], told["recording"], told["speed"], told["loops"]) == (1, "two.recording", 1.0, 1)
    assert len({each["client"] for each in told["report"]["conversations"]}) == 2
    assert "4 conversations" in table
    assert "4 as recorded" in table
    assert "at full speed there is no schedule" in table


def test_an_engine_logs_which_conversation_of_the_recording_a_session_was(
    daemon: StartDaemon, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.recording"
    path.write_bytes(encode(HEADER, [whole(b"a", b"a"), whole(b"c", b"c")]))
    listener = {"name": "echo", "address": "127.0.0.1:0", "service": "echo", "proxy_protocol": True}
    running = daemon(engine, [listener])
    where = str(running.addresses[0])
    arguments = ["replay", str(path), "--upstream", where, "--loops", "2", "--proxy-protocol", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)["report"]["conversations"]
    assert {each["reply"] for each in told} == {"as recorded"}
    closed = running.wait_for("session_closed", 4)
    logged = {line["pair"]: f"{line['client_ip']}:{line['client_port']}" for line in closed}
    assert logged == {each["pair"]: each["client"] for each in told}
    assert len(logged) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["{whole}"], 64, "give --upstream ADDR to play the clients, or --serve ADDR"),
        (["{whole}", "--serve", "127.0.0.1:0", "--loops", "2"], 64, "--serve serves whoever comes"),
        (["{whole}", "--upstream", "127.0.0.1:1", "--speed", "0"], 64, "neither max nor a number"),
        (["{whole}", "--upstream", "127.0.0.1:{closed}"], 69, "cannot be reached: Connection refused"),
        (["{whole}", "--serve", "127.0.0.1:{taken}"], 69, "already in use"),
        (["{none}", "--upstream", "127.0.0.1:1"], 66, "No such file or directory; name a recording"),
        (["{text}", "--upstream", "127.0.0.1:1"], 65, "not a recording"),
        (["{empty}", "--upstream", "127.0.0.1:1"], 65, "there is no conversation in it"),
    ],
)
def test_what_cannot_be_replayed_is_one_line_with_its_code(
    arguments: list[str], code: int, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").write_bytes(encode(HEADER, [whole(b"a", b"b")]))
    (tmp_path / "empty").write_bytes(encode(HEADER, []))
    (tmp_path / "text").write_bytes(b"GET / HTTP/1.1\r\n")
    files = {name: str(tmp_path / name) for name in ("whole", "empty", "text", "none")}
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as free:
            closed = free.getsockname()[1]
        assert (
            main(["replay", *(each.format(**files, taken=taken, closed=closed) for each in arguments)])
            == code
        )
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_of_a_recording_that_is_cut_or_spoilt_the_whole_is_played_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [whole(b"a" * number, b"b") for number in range(1, 6)]
    data = encode(HEADER, kept)
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 1
    path = tmp_path / "spoilt.recording"
    path.write_bytes(spoilt)
    with served(kept) as (address, _):
        assert main(["replay", str(path), "--upstream", str(address)]) == 0
    told = capsys.readouterr()
    assert "4 conversations" in told.out
    first, second = told.err.splitlines()
    assert re.search(r"spoilt\.recording: byte \d+: ", first)
    assert "the 4 conversations that can be read are used" in second
    path.write_bytes(data[:-30])
    assert main(["recording", "show", str(path)]) == 0
    assert "cut short" in capsys.readouterr().err


def test_a_file_cut_at_any_byte_is_read_or_refused_and_never_more() -> None:
    data = encode(HEADER, [whole(b"a", b"b"), whole(b"c", b"d")])
    header = len(encode(HEADER, [])) - len(pack(End(0)))
    for cut in range(header):
        with pytest.raises(ValueError, match="not a recording"):
            decode(data[:cut])
    found = [len(decode(data[:cut]).conversations) for cut in range(header, len(data))]
    assert sorted(found) == found
    assert set(found) == {0, 1, 2}


# Together


def test_a_recording_is_a_workload_of_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.recording"
    path.write_bytes(encode(HEADER, [whole(b"question", b"answer" * 100)] * 20))
    out = ["--out", str(tmp_path / "out")]
    assert main(["compare", "--quick", "--engine", "nonblocking", "--recording", str(path), *out]) == 0
    assert "Proxy, replay of mine" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {cell["workload"] for cell in results["cells"]} == {"mine"}
    assert all(cell["exchanges"] % 20 == 0 for cell in results["cells"])
    assert str(tmp_path) not in (tmp_path / "out/results.json").read_text()
    assert main(["compare", "--recording", str(tmp_path / "none"), *out]) == 66
    assert main(["compare", "--recording", str(path), "--workload", "bulk", *out]) == 64


def test_what_is_in_a_recording_is_shown_a_line_a_conversation_up_to_a_hundred(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "many.recording"
    path.write_bytes(encode(HEADER, [whole(b"ask \x1b[31m\n", b"tell")] * 250))
    assert main(["recording", "show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made up"
    assert lines[1].startswith("250 conversations in ")
    assert len(lines) == 104
    assert lines[-1] == "and 150 more"
    # what others said must not reach a terminal as they said it
    assert lines[3].endswith(r"FIN/FIN  ask \x1b[31m\n")
