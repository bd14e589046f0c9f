"""Recordings: the file, the recorder and the player, each against what it must not get wrong."""

import contextlib
import io
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemons import Daemon
from hypothesis import given, settings
from hypothesis import strategies as st

from comparisons.recordings.format import (
    MEMBER,
    SHIPPED,
    SUFFIX,
    VERSION,
    Begun,
    Conversation,
    End,
    Header,
    More,
    Recording,
    Side,
    Step,
    decode,
    encode,
    load,
    pack,
    shipped,
)
from comparisons.recordings.keeper import Keeper
from comparisons.recordings.player import Played, play
from comparisons.recordings.recorder import Recorder
from services.core.addresses import Address

HEADER = Header(VERSION, "made up", "nobody 1.0", "nothing 2.0")
RESET = struct.pack("ii", 1, 0)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Anything that can happen on a connection."""
    steps: list[Step] = []
    when, over = 0, set[Side]()
    for _ in range(draw(st.integers(0, 12))):
        when += draw(st.integers(0, 2000))
        who: Side = draw(st.sampled_from(["client", "server"]))
        if draw(st.integers(0, 9)) == 0:
            steps.append(Step(when, who, "reset"))
            break
        if who in over:
            continue
        if draw(st.integers(0, 4)) == 0:
            over.add(who)
            steps.append(Step(when, who, "end"))
        else:
            size = draw(st.sampled_from([1, 3, 1000, 300_000]))
            steps.append(Step(when, who, "data", draw(st.binary(min_size=1, max_size=3)) * size))
    return Conversation(draw(st.integers(0, 5000)), steps)


many = st.lists(conversations(), max_size=6)


def said(*steps: tuple[Side, bytes | str]) -> Conversation:
    """A conversation from the short form that these tests are written in."""
    return Conversation(
        0,
        [
            Step(index, who, "data", what) if isinstance(what, bytes) else Step(index, who, what)  # type: ignore[arg-type]  # "end" or "reset"
            for index, (who, what) in enumerate(steps)
        ],
    )


def steps_of(recording: Recording) -> list[list[tuple[Side, bytes | str]]]:
    """The steps without their times, bytes of one side in a row put together."""
    found = []
    for conversation in recording.conversations:
        steps: list[tuple[Side, bytes | str]] = []
        for step in conversation.steps:
            last = steps[-1] if steps else None
            if step.data and last and last[0] == step.who and isinstance(last[1], bytes):
                steps[-1] = (step.who, last[1] + step.data)
            else:
                steps.append((step.who, step.data or step.what))
        found.append(steps)
    return found


# The file


@settings(deadline=None)  # a shared machine: it decides how long megabytes take
@given(many)
def test_what_is_written_is_read_back_and_equal_recordings_are_equal_bytes(given: list[Conversation]) -> None:
    data = encode(HEADER, given)
    recording = decode(data)
    assert recording.header == HEADER
    assert recording.conversations == sorted(given, key=lambda each: each.start_us)
    assert recording.damaged == []
    assert encode(HEADER, given) == data


@settings(deadline=None)  # as above
@given(many, st.data())
def test_of_a_file_cut_anywhere_the_whole_conversations_are_used_and_the_cut_is_named(
    given: list[Conversation], data: st.DataObject
) -> None:
    whole = encode(HEADER, given)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    ends = [each.start() for each in re.finditer(re.escape(MEMBER), whole)][1:]
    whole_members = sum(each <= len(cut) for each in ends)
    if not whole_members:
        with pytest.raises(ValueError, match="not a recording"):
            decode(cut)
        return
    recording = decode(cut)
    assert recording.conversations == sorted(given[: whole_members - 1], key=lambda each: each.start_us)
    assert recording.damaged
    assert recording.damaged[-1].reason == "cut short: the end is missing"


@settings(deadline=None)  # as above
@given(st.lists(conversations(), min_size=1, max_size=6), st.data())
def test_a_spoilt_byte_costs_the_conversation_it_is_in_and_no_other(
    given: list[Conversation], data: st.DataObject
) -> None:
    spoilt = bytearray(encode(HEADER, given))
    at = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[at] ^= data.draw(st.integers(1, 255))
    recording = decode(bytes(spoilt))
    left = list(recording.conversations)
    lost = []
    for each in given:
        if each in left:
            left.remove(each)
        else:
            lost.append(each)
    assert left == []
    assert len(lost) <= 1
    # the time and the system in a member's head mean nothing, so spoiling those loses nothing
    assert recording.damaged or (not lost and recording.header == HEADER)
    assert all(each.offset <= at for each in recording.damaged[:1])


def test_damage_is_named_with_its_place_and_reading_goes_on_after_it() -> None:
    one, two, three = (said(("client", word * 100)) for word in (b"one", b"two", b"three"))
    data = bytearray(encode(HEADER, [one, two, three]))
    second = data.find(MEMBER, data.find(MEMBER, data.find(MEMBER, 1) + 1))
    data[second + 15] ^= 0xFF
    recording = decode(bytes(data))
    assert recording.conversations == [one, three]
    assert [each.offset for each in recording.damaged] == [second]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        pytest.param(b"", "not a recording", id="empty"),
        pytest.param(b"GET / HTTP/1.1\r\n" * 100, "not a recording", id="another kind of file"),
        pytest.param(
            encode(Header(9, "", "", ""), []), "version 9; this program reads version 2", id="newer"
        ),
    ],
)
def test_what_is_no_recording_is_refused_with_its_name(data: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "some.recording"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as refusal:
        load(path)
    assert str(refusal.value).startswith(str(path))


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([Step(5, "client", "data", b"x"), Step(4, "client", "end")], "goes back in time"),
        ([Step(0, "client", "end"), Step(1, "client", "data", b"x")], "comes after the client's end"),
        ([Step(0, "server", "reset"), Step(1, "client", "data", b"x")], "comes after a reset"),
        ([Step(0, "client", "data")], "bytes"),
        ([Step(0, "client", "end", b"x")], "bytes"),
    ],
)
def test_a_conversation_that_cannot_have_happened_is_refused(steps: list[Step], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Conversation(0, steps)


FORMAT = (SHIPPED / "FORMAT.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_on_the_format_is_read_as_it_says() -> None:
    names: dict[str, Any] = {}
    exec(FORMAT.partition("```python\n")[2].partition("```")[0], names)  # noqa: S102  our own page
    recording = decode(names["recording"])
    assert recording.damaged == []
    assert recording.header == Header(VERSION, "an example", "nobody 1.0", "nothing 2.0")
    (conversation,) = recording.conversations
    assert (conversation.start_us, conversation.client, conversation.server) == (
        1500,
        "127.0.0.1:50000",
        "127.0.0.1:7",
    )
    assert [list(msgspec.structs.astuple(step)) for step in conversation.steps] == (
        names["members"][1][5] + names["members"][2][3]
    )


def test_what_is_written_is_what_the_page_on_the_format_says() -> None:
    said = [Step(0, "client", "data", b"ping"), Step(7, "server", "reset")]
    data = encode(Header(VERSION, "t", "c", "s", 5), [Conversation(3, said, "127.0.0.1:1", "unix:/x")])
    members = []
    while data:
        assert data.startswith(bytes.fromhex(FORMAT.partition("bytes `")[2].partition("`")[0]))
        packed = zlib.decompressobj(wbits=31)
        members.append(msgspec.msgpack.decode(packed.decompress(data)))
        data = packed.unused_data
    assert members == [
        ["header", VERSION, "t", "c", "s", 5],
        [
            "conversation",
            0,
            3,
            "127.0.0.1:1",
            "unix:/x",
            [[0, "client", "data", b"ping"], [7, "server", "reset", b""]],
        ],
        ["end", 1],
    ]
    assert f"Version {VERSION}." in FORMAT


def written(*parts: Header | Begun | More | End) -> Recording:
    return decode(b"".join(pack(each) for each in parts))


ONE, TWO, THREE = (Step(when, "client", "data", b"x" * when) for when in (1, 2, 3))


def test_a_conversation_is_put_together_from_parts_that_others_lie_between() -> None:
    recording = written(
        HEADER,
        Begun(0, 10, "", "", [ONE]),
        Begun(1, 5, "", "", [THREE]),
        More(0, 1, [TWO]),
        More(0, 2, [THREE]),
        End(2),
    )
    assert recording.damaged == []
    assert [each.steps for each in recording.conversations] == [[THREE], [ONE, TWO, THREE]]
    assert (recording.first_us, recording.duration_us) == (5, 8)


@pytest.mark.parametrize(
    ("parts", "kept", "complaint"),
    [
        (
            [Begun(0, 0, "", "", [ONE]), More(0, 2, [THREE]), More(0, 3, [THREE])],
            [[ONE]],
            "part 1 is missing",
        ),
        ([More(0, 1, [ONE]), More(0, 2, [TWO]), Begun(1, 0, "", "", [])], [[]], "its beginning is missing"),
        ([Begun(0, 0, "", "", [TWO]), More(0, 1, [ONE])], [[TWO]], "goes back in time"),
        ([Begun(0, 0, "", "", [ONE]), Begun(0, 0, "", "", [TWO])], [[ONE]], "it begins twice"),
    ],
)
def test_a_conversation_is_used_up_to_the_first_part_that_does_not_fit(
    parts: list[Begun | More], kept: list[list[Step]], complaint: str
) -> None:
    recording = written(HEADER, *parts, End(len(kept)))
    assert [each.steps for each in recording.conversations] == kept
    (damage,) = recording.damaged
    assert complaint in damage.reason


# What is shipped


def test_the_shipped_recordings_are_small_whole_and_hold_redis_and_http() -> None:
    assert shipped() == ["http", "redis"]
    assert max((SHIPPED / f"{name}{SUFFIX}").stat().st_size for name in shipped()) < 160 * 1024
    redis, http = load("redis"), load("http")
    assert not redis.damaged
    assert not http.damaged
    assert len(redis.conversations) > 50
    assert any(
        step.data.startswith(b"*3\r\n$3\r\nSET\r\n") for each in redis.conversations for step in each.steps
    )
    assert any(b"$9\r\nsubscribe\r\n" in step.data for each in redis.conversations for step in each.steps)
    assert any(each.bytes_of("server") > 200 << 10 for each in http.conversations)
    # kept alive: more than one request on a connection
    assert any(sum(step.data.startswith(b"GET /") for step in each.steps) > 1 for each in http.conversations)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recording_tells_nothing_of_the_machine_that_made_it(name: str) -> None:
    recording = load(name)
    header = recording.header
    content = b"".join(step.data for each in recording.conversations for step in each.steps)
    content += f"{header.title} {header.client} {header.server}".encode()
    for path in (b"/tmp", b"/home/", b"/root/", b"/usr/", b"/var/", b"/etc/"):
        assert path not in content
    for host in (socket.gethostname(), socket.getfqdn()):
        assert host == "localhost" or host.encode() not in content


# The recorder


@contextmanager
def recorder(upstream: Address, **bounds: float) -> Iterator[tuple[Recorder, Address, io.BytesIO]]:
    """A recorder that serves until the block ends, where it listens, and what it writes, whole after it."""
    file = io.BytesIO()
    with socket.create_server(("127.0.0.1", 0)) as listener, Keeper(file, HEADER) as keeper:
        listener.setblocking(False)
        made = Recorder([listener], [upstream], keeper, **bounds)  # type: ignore[arg-type]  # whole where it has to be
        thread = threading.Thread(target=made.serve)
        thread.start()
        try:
            yield made, Address("tcp", *listener.getsockname()), file
        finally:
            made.stop()
            thread.join()


@contextmanager
def through_recorder() -> Iterator[tuple[io.BytesIO, Callable[[], tuple[socket.socket, socket.socket]]]]:
    """What a recorder writes, and what opens a connection through it: the client's socket and the server's."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        _, front, file = stack.enter_context(recorder(Address("tcp", *server.getsockname())))

        def connect() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection((front.host, front.port), 5))
            accepted, _ = server.accept()
            accepted.settimeout(5)
            return client, stack.enter_context(accepted)

        yield file, connect


def hear(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def vanish(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def recorded(file: io.BytesIO) -> list[list[tuple[Side, bytes | str]]]:
    return steps_of(decode(file.getvalue()))


def test_the_recorder_keeps_a_question_an_end_and_an_answer_after_it_with_their_timing() -> None:
    with through_recorder() as (file, connect):
        client, server = connect()
        client.sendall(b"question")
        assert hear(server, 8) == b"question"
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        time.sleep(0.05)
        server.sendall(b"answer")
        assert hear(client, 6) == b"answer"
        server.close()
        assert client.recv(1) == b""
    assert recorded(file) == [
        [("client", b"question"), ("client", "end"), ("server", b"answer"), ("server", "end")]
    ]
    whens = [step.when_us for step in decode(file.getvalue()).conversations[0].steps]
    assert whens[2] - whens[1] >= 50_000


def test_the_recorder_keeps_a_server_that_speaks_first_and_conversations_side_by_side() -> None:
    with through_recorder() as (file, connect):
        pairs = [connect() for _ in range(8)]
        for number, (client, server) in reversed(list(enumerate(pairs))):
            server.sendall(b"welcome %d" % number)
            assert hear(client, 9) == b"welcome %d" % number
        for number, (client, server) in enumerate(pairs):
            client.sendall(b"bye %d" % number)
            assert hear(server, 5) == b"bye %d" % number
    # what follows is a race between our closing and the recorder's stop
    steps = [each[:2] for each in recorded(file)]
    assert steps == [[("server", b"welcome %d" % n), ("client", b"bye %d" % n)] for n in range(8)]


@pytest.mark.parametrize("who", ["client", "server"])
def test_the_recorder_keeps_a_reset_and_passes_it_on(who: Side) -> None:
    with through_recorder() as (file, connect):
        client, server = connect()
        client.sendall(b"hello")
        assert hear(server, 5) == b"hello"
        first, other = (client, server) if who == "client" else (server, client)
        vanish(first)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
    assert recorded(file) == [[("client", b"hello"), (who, "reset")]]


def test_the_recorder_loses_nothing_that_was_said_before_a_reset_it_hears_of_while_sending() -> None:
    with through_recorder() as (file, connect):
        client, server = connect()
        # the client has sent a last word and closed: what the server sends to it is answered with a reset
        client.sendall(b"last word")
        client.close()
        assert hear(server, 9) == b"last word"
        assert server.recv(1) == b""
        with contextlib.suppress(OSError):
            while True:
                server.sendall(b"too late" * 1000)
    (steps,) = recorded(file)
    assert steps[:2] == [("client", b"last word"), ("client", "end")]
    assert steps[-1] == ("client", "reset")


def test_a_client_is_turned_away_when_the_upstream_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = Address("tcp", *server.getsockname())
    with (
        recorder(nobody) as (made, front, file),
        socket.create_connection((front.host, front.port), 5) as client,
    ):
        assert client.recv(1) == b""
    assert made.unreachable == 1
    assert decode(file.getvalue()).conversations == []


# The player


@contextmanager
def listening(kind: str = "ipv4", folder: Path = Path()) -> Iterator[tuple[socket.socket, Address]]:
    """A listener, and its address."""
    if kind == "unix":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            yield listener, Address("unix", str(folder / "socket"))
    else:
        family, host = (socket.AF_INET6, "::1") if kind == "ipv6" else (socket.AF_INET, "127.0.0.1")
        with socket.create_server((host, 0), family=family) as listener:
            yield listener, Address("tcp", *listener.getsockname()[:2])


def played_directly(recording: Recording, **how: float) -> Played:
    with listening() as (listener, address):
        return play(recording, address, listener, **how)  # type: ignore[arg-type]  # whole where it is given


LARGE = bytes(range(256)) * 8000

AT_ONCE = said(("server", "reset"))

EVERYTHING = [
    said(
        ("server", b"220 hello"),
        ("client", b"HELO"),
        ("server", b"250"),
        ("client", b"QUIT"),
        ("server", b"221"),
    ),
    said(("client", b"question"), ("client", "end"), ("server", LARGE), ("server", "end")),
    said(("server", b"bye"), ("server", "end"), ("client", LARGE), ("client", "end")),
    said(("client", LARGE), ("server", LARGE), ("client", LARGE), ("server", LARGE)),
    said(("client", LARGE), ("client", "reset")),
    said(("client", b"x"), ("server", LARGE), ("server", "reset")),
    said(("client", b"x"), ("client", "end"), ("server", b"y"), ("client", "reset")),
    AT_ONCE,
    said(("client", "end"), ("server", b"not asked for"), ("server", "end")),
    said(),
]


@pytest.mark.parametrize("kind", ["ipv4", "ipv6", "unix"])
def test_played_directly_every_kind_of_conversation_goes_as_recorded(kind: str, tmp_path: Path) -> None:
    recording = Recording(HEADER, EVERYTHING)
    with listening(kind, tmp_path) as (listener, address):
        played = play(recording, address, listener, repeat=3)
    assert played.faults == []
    count = 3 * len(EVERYTHING)
    assert (played.opened, played.finished, played.failed) == (count, count, 0)
    assert played.bytes_c2s == 3 * recording.bytes_c2s
    assert played.bytes_s2c == 3 * recording.bytes_s2c
    assert max(played.latencies_us) < played.seconds * 1e6


@settings(max_examples=40, deadline=None)  # sockets: the machine decides how long it takes
@given(st.lists(conversations(), min_size=1, max_size=6), st.sampled_from([0.0, 50.0]), st.integers(1, 3))
def test_whatever_was_recorded_can_be_played(
    given: list[Conversation], speed: float, concurrency: int
) -> None:
    recording = Recording(HEADER, given)
    played = played_directly(recording, speed=speed, concurrency=concurrency)
    assert played.faults == []
    assert played.finished == len(given)
    assert (played.bytes_c2s, played.bytes_s2c) == (recording.bytes_c2s, recording.bytes_s2c)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recording_plays_without_a_fault_and_with_a_latency_an_answer(name: str) -> None:
    recording = load(name)
    played = played_directly(recording)
    assert played.faults == []
    assert played.finished == len(recording.conversations)
    assert (played.bytes_c2s, played.bytes_s2c) == (recording.bytes_c2s, recording.bytes_s2c)
    assert len(played.latencies_us) >= len(recording.conversations)


def test_further_passes_begin_until_the_time_is_up_and_are_finished() -> None:
    recording = Recording(HEADER, [said(("client", b"ask"), ("server", b"tell"))] * 7)
    played = played_directly(recording, seconds=0.1)
    assert played.faults == []
    assert played.finished % 7 == 0
    assert played.finished > 7
    assert played.seconds >= 0.1


def test_the_recorded_timing_is_kept_and_waiting_for_it_is_no_latency() -> None:
    asked = Conversation(
        0,
        [
            Step(0, "client", "data", b"ask"),
            Step(150_000, "server", "data", b"tell"),
            Step(200_000, "client", "end"),
        ],
    )
    # however long the recorder had waited for the first
    recording = Recording(
        HEADER, [msgspec.structs.replace(asked, start_us=start) for start in (9_000_000, 9_050_000)]
    )
    for speed, least in [(1.0, 0.25), (2.0, 0.125)]:
        played = played_directly(recording, speed=speed)
        assert played.faults == []
        assert least <= played.seconds < least + 1
        assert len(played.latencies_us) == 2
        assert max(played.latencies_us) < 70_000
        assert 0 <= played.lag_p99_us <= played.lag_max_us


def test_a_step_waits_for_what_the_other_side_said_before_it() -> None:
    # in no time at all, by the recording; so only the order holds the steps apart
    turns = [Step(0, "client" if n % 2 else "server", "data", b"%d" % (n % 10)) for n in range(1000)]
    played = played_directly(Recording(HEADER, [Conversation(0, turns)]), speed=1.0)
    assert played.faults == []
    assert len(played.latencies_us) == 499


Spoil = Callable[[int, Side, int, bytes], bytes | None]


@contextmanager
def stand_in(upstream: Address, spoil: Spoil) -> Iterator[Address]:
    """A proxy that gives what passes to `spoil` (connection, who said it, from which byte on, what) and
    passes on what comes back; None: it sends an end in its place. It knows half-closes but no resets.
    """
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def relay(number: int, who: Side, source: socket.socket, target: socket.socket) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed = spoil(number, who, offset, data)
                if passed is None:
                    break
                target.sendall(passed)
                offset += len(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        number = 0
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((upstream.host, upstream.port))
                sockets.extend((client, server))
                threads.append(threading.Thread(target=relay, args=(number, "client", client, server)))
                threads.append(threading.Thread(target=relay, args=(number, "server", server, client)))
                for thread in threads[-2:]:
                    thread.start()
                number += 1

    with listening() as (listener, address):
        accepting = threading.Thread(target=serve, args=(listener,))
        accepting.start()
        try:
            yield address
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for each in sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in sockets:
                each.close()


def played_through(spoil: Spoil, conversations: list[Conversation], **how: float) -> Played:
    with listening() as (listener, upstream), stand_in(upstream, spoil) as front:
        return play(Recording(HEADER, conversations), front, listener, **how)  # type: ignore[arg-type]  # as above


ASKED = said(("client", b"?" * 3000), ("server", LARGE), ("client", "end"), ("server", "end"))


def test_through_an_honest_proxy_nothing_is_found() -> None:
    gentle = [each for each in EVERYTHING if "reset" not in [step.what for step in each.steps]]
    played = played_through(lambda _number, _who, _offset, data: data, gentle, repeat=2)
    assert played.faults == []
    assert played.finished == 2 * len(gentle)


@pytest.mark.parametrize(
    ("who", "hearer", "place"), [("server", "client", 100_000), ("client", "server", 1234)]
)
def test_a_changed_byte_is_found_with_its_conversation_and_offset(
    who: Side, hearer: Side, place: int
) -> None:
    def spoil(number: int, side: Side, offset: int, data: bytes) -> bytes:
        if (number, side) == (2, who) and offset <= place < offset + len(data):
            at = place - offset
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return data

    played = played_through(spoil, [ASKED] * 4)
    (fault,) = played.faults
    assert (fault.conversation, fault.end, fault.what, fault.offset) == (2, hearer, "mismatch", place)
    assert (played.finished, played.failed) == (3, 1)


def test_a_stream_that_is_cut_short_is_found_with_the_place() -> None:
    def spoil(number: int, side: Side, offset: int, data: bytes) -> bytes | None:
        if (number, side) == (1, "server") and offset + len(data) > 70_000:
            return data[: 70_000 - offset] if offset < 70_000 else None
        return data

    played = played_through(spoil, [ASKED] * 3, concurrency=1)
    (fault,) = played.faults
    assert (fault.conversation, fault.end, fault.offset) == (1, "client", 70_000)
    assert fault.what in {"ended early", "reset"}
    assert played.finished == 2


def test_bytes_that_nobody_sent_are_found_even_if_they_would_be_right_later() -> None:
    twice = said(("client", b"a"), ("server", b"OK"), ("client", b"b"), ("server", b"OK"))
    played = played_through(lambda _n, who, _o, data: data * 2 if who == "server" else data, [twice])
    (fault,) = played.faults
    assert (fault.what, fault.end, fault.offset) == ("mismatch", "client", 2)


def test_a_proxy_that_makes_an_end_of_a_reset_is_told_from_one_that_passes_it_on() -> None:
    played = played_through(lambda _n, _w, _o, data: data, [said(("client", b"x"), ("client", "reset"))])
    (fault,) = played.faults
    assert (fault.what, fault.end) == ("end instead of reset", "server")


def test_a_proxy_that_swallows_an_answer_meets_the_deadline() -> None:
    played = played_through(
        lambda _n, who, _o, data: data if who == "client" else b"",
        [said(("client", b"x"), ("server", b"y"))],
        deadline=0.3,
    )
    (fault,) = played.faults
    assert (fault.what, fault.end, fault.offset) == ("deadline", "client", 0)
    assert played.failed == 1


def test_a_proxy_that_cannot_be_reached_fails_every_conversation() -> None:
    with listening() as (listener, _), listening() as (closed, nobody):
        closed.close()
        played = play(Recording(HEADER, [ASKED] * 3), nobody, listener)
    assert [each.what for each in played.faults] == ["not opened"] * 3
    assert (played.opened, played.failed) == (0, 3)


def test_a_proxy_that_never_dials_ends_the_play_because_nothing_could_be_told_apart_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("comparisons.recordings.player.OPENING_LIMIT", 0.2)
    with listening() as (listener, _), listening() as (_silent, front):
        played = play(Recording(HEADER, [ASKED] * 3), front, listener)
    assert [each.what for each in played.faults] == ["not opened"]
    assert (played.opened, played.failed) == (0, 3)


def test_a_proxy_that_closes_before_it_dials_costs_that_conversation() -> None:
    with listening() as (listener, upstream), ExitStack() as stack:
        front = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            front.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join)
        played = play(Recording(HEADER, [ASKED]), Address("tcp", *front.getsockname()), listener)
        assert upstream.port
    assert [each.what for each in played.faults] == ["not opened"]


def test_a_connection_that_nobody_opened_is_a_fault_of_its_own() -> None:
    slow = Conversation(0, [Step(0, "client", "data", b"x"), Step(300_000, "server", "data", b"y")])
    with listening() as (listener, address):
        stranger = threading.Timer(
            0.1, lambda: socket.create_connection((address.host, address.port)).close()
        )
        stranger.start()
        played = play(Recording(HEADER, [slow]), address, listener, speed=1.0)
        stranger.join()
    assert [(each.what, each.conversation) for each in played.faults] == [("stranger", None)]
    assert played.finished == 1


# Through the engines


def played_through_engine(
    start: Callable[..., Daemon], engine: str, recording: Recording, **how: float
) -> Played:
    """Play through a daemon's proxy; its own log must agree on sessions and bytes."""
    front = {"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "ends"}
    with listening() as (listener, upstream):
        proxy = start(engine, [front], {"ends": [upstream]})
        played = play(recording, proxy.addresses[0], listener, **how)  # type: ignore[arg-type]  # whole where it is given
        last = proxy.stop()
    assert last["closed"] == played.opened
    assert (last["bytes_c2s"], last["bytes_s2c"]) == (played.bytes_c2s, played.bytes_s2c)
    return played


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("speed", [0.0, 4.0])
def test_a_shipped_recording_passes_every_engine_unchanged(
    daemon: Callable[..., Daemon], engine: str, name: str, speed: float
) -> None:
    recording = load(name)
    played = played_through_engine(daemon, engine, recording, speed=speed)
    assert played.faults == []
    assert played.finished == len(recording.conversations)


def test_every_kind_of_conversation_passes_every_engine_with_its_ends_and_resets(
    daemon: Callable[..., Daemon], engine: str
) -> None:
    # a reset in the instant of the accept is, to an engine that dials without blocking, a failed dial,
    # after which rule 11 asks for an end
    recording = Recording(HEADER, [each for each in EVERYTHING if each != AT_ONCE])
    assert played_through_engine(daemon, engine, recording, repeat=3).faults == []
