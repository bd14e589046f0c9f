"""A PROXY header is read however it arrives, and believed only if it is exactly right."""

import struct
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import CLIENT_ADDRESS, LOCAL_ADDRESS, Play, Stage

from services.core.addresses import Address
from services.core.admission import Limits
from services.core.preface import (
    CRC32C,
    LONGEST_V1,
    LONGEST_V2,
    PAIR,
    SIGNATURE,
    Introduction,
    Preface,
    PrefaceError,
    crc32c,
    each_tlv,
    header,
)
from services.core.record import CLIENT, UPSTREAM
from services.core.session import Abort, BeginRelay, Dial, Dialled, ReadPreface, Received, Send
from services.vocabulary import IntroductionRefused

HERE = Address("tcp", "192.0.2.2", 443)
ADDRESSES = st.one_of(
    st.builds(Address, st.just("tcp"), st.ip_addresses(v=4).map(str), st.integers(0, 65535)),
    st.builds(Address, st.just("tcp"), st.ip_addresses(v=6).map(str), st.integers(0, 65535)),
)
TLVS = st.lists(st.tuples(st.integers(0x20, 0xDF), st.binary(max_size=40)), max_size=4)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def v2(command: int, family: int, body: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


FOUR = bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack("!HH", 5000, 443)


def read(data: bytes, *cuts: int) -> Introduction | None:
    """What comes of `data`, cut at these places."""
    preface = Preface()
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    found = None
    for start, end in pairwise(edges):
        if found is not None:
            found = found._replace(rest=found.rest + data[start:end])
        else:
            found = preface.feed(data[start:end])
    return found


@given(ADDRESSES, ADDRESSES, TLVS, st.binary(max_size=20), st.lists(st.integers(0, 400), max_size=6))
def test_what_one_proxy_writes_the_next_one_reads_however_it_is_split(
    client: Address, local: Address, tlvs: list[tuple[int, bytes]], rest: bytes, cuts: list[int]
) -> None:
    kept = b"".join(tlv(kind, value) for kind, value in tlvs)

    def same(told: Address | None, meant: Address) -> bool:
        assert told is not None
        mixed = (":" in client.host) != (":" in local.host)
        host = told.host.removeprefix("::ffff:") if mixed and ":" not in meant.host else told.host
        # how an IPv4 address in IPv6 is written differs between versions of Python
        return told.port == meant.port and (host == meant.host or mixed)

    for version in ("v1", "v2"):
        told = read(header(version, client, local, kept) + rest, *cuts)
        assert told is not None
        assert same(told.client, client)
        assert same(told.local, local)
        assert told.rest == rest
        assert told.tlvs == (kept if version == "v2" else b"")


@given(st.binary(max_size=300))
def test_whatever_comes_is_read_or_refused(data: bytes) -> None:
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11\0\x0c"):
        preface = Preface()
        with suppress(PrefaceError):
            for at in range(0, len(start + data), 7):
                if preface.feed((start + data)[at : at + 7]) is not None:
                    break


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "it does not begin as a PROXY header does"),
        (b"PROXY\r\n", "it does not begin as a PROXY header does"),
        (b"\r\n\r\nX", "it does not begin as a PROXY header does"),
        (b"PROXY " + b"x" * 101, "no line end within 107 bytes"),
        (b"PROXY TCP4 192.0.2.1\r\n", "the line is not PROXY TCP4 or TCP6 with two addresses and two ports"),
        (
            b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n",
            "the line is not PROXY TCP4 or TCP6 with two addresses and two ports",
        ),
        (b"PROXY TCP4 ::1 ::1 1 2\r\n", "an address is none of TCP4"),
        (b"PROXY TCP6 1.2.3.4 ::1 1 2\r\n", "an address is none of TCP6"),
        (b"PROXY TCP4 1.2.3.\xff 1.2.3.4 1 2\r\n", "an address is none of TCP4"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", "a port is no number from 0 to 65535"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 01 2\r\n", "a port is no number from 0 to 65535"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 2\r\n", "a port is no number from 0 to 65535"),
        (v2(0x31, 0x11, FOUR), "version 3 is not known"),
        (v2(0x22, 0x11, FOUR), "command 2 is not known"),
        (v2(0x21, 0x11, b"", LONGEST_V2 + 1), f"it announces {LONGEST_V2 + 1} bytes, more than {LONGEST_V2}"),
        (v2(0x21, 0x21, FOUR), "it is shorter than its addresses"),
        (v2(0x21, 0x11, FOUR + b"\x20\0\x05ab"), "a TLV goes beyond its end"),
        (v2(0x21, 0x11, FOUR + b"\x20\0"), "a TLV goes beyond its end"),
        (v2(0x21, 0x11, FOUR + tlv(CRC32C, b"\0\0\0\1")), "its checksum is wrong"),
    ],
)
def test_a_header_that_is_not_exactly_right_is_refused_and_named(data: bytes, reason: str) -> None:
    with pytest.raises(PrefaceError) as caught:
        read(data)
    assert str(caught.value) == reason
    assert len(data) > 0


def test_a_header_that_ends_too_early_is_refused() -> None:
    preface = Preface()
    assert preface.feed(b"PROXY TC") is None
    with pytest.raises(PrefaceError, match="it ended before it was whole"):
        preface.feed(b"")


def test_the_longest_line_of_version_1_is_read() -> None:
    line = b"PROXY UNKNOWN " + b"f" * (LONGEST_V1 - 16) + b"\r\n"
    assert len(line) == LONGEST_V1
    assert read(line + b"rest") == Introduction(None, None, b"", b"rest")


def test_a_proxy_s_own_connection_and_unknown_families_introduce_nobody() -> None:
    for data in (v2(0x20, 0x00, b""), v2(0x20, 0x11, FOUR), v2(0x21, 0x12, FOUR), v2(0x21, 0x00, b"x")):
        told = read(data + b"rest")
        assert told is not None
        assert (told.client, told.local, told.rest) == (None, None, b"rest")


def test_a_client_of_a_unix_socket_is_its_path() -> None:
    body = b"/run/client".ljust(108, b"\0") + b"/run/here".ljust(108, b"\0")
    told = read(v2(0x21, 0x31, body))
    assert told is not None
    assert (told.client, told.local) == (Address("unix", "/run/client"), Address("unix", "/run/here"))


def test_a_right_checksum_is_believed() -> None:
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    blank = v2(0x21, 0x11, FOUR + tlv(0x20, b"x") + tlv(CRC32C, bytes(4)))
    whole = blank[:-4] + crc32c(blank).to_bytes(4)
    told = read(whole, 3, 20, len(whole) - 1)
    assert told is not None
    # the next header has other bytes: the sum does not hold for it
    passed = read(header("v2", told.client, HERE, told.tlvs))
    assert passed is not None
    assert [kind for kind, _ in each_tlv(passed.tlvs)] == [0x20]


def test_a_pair_s_id_is_passed_on_once() -> None:
    pair = "0" * 26
    told = read(header("v2", CLIENT_ADDRESS, HERE, pair=pair))
    assert told is not None
    assert told.pair == pair
    again = read(header("v2", told.client, HERE, told.tlvs, told.pair))
    assert again is not None
    assert again.tlvs == told.tlvs
    for odd in (tlv(PAIR, b"short"), tlv(PAIR, b"\xff" * 26), tlv(0x20, b"0" * 26)):
        assert Introduction(None, None, odd, b"").pair is None


def test_whoever_has_no_name_is_told_as_one() -> None:
    assert header("v1", None, HERE) == b"PROXY UNKNOWN\r\n"
    told = read(header("v2", None, Address("unix", "/run/x")))
    assert told == Introduction(None, None, b"", b"")
    paired = read(header("v2", None, Address("unix", "/run/x"), pair="2" * 26))
    assert paired is not None
    assert (paired.client, paired.pair) == (None, "2" * 26)


# In a session ------------------------------------------------------------------------------------


def introduced(stage: Stage, service: str = "proxy") -> Play:
    return Play(stage, service, proxy_protocol=True)


def test_a_session_begins_with_the_header_and_what_came_behind_it_is_the_first_it_relays() -> None:
    stage = Stage()
    stage.pool.upstreams[0].proxy_protocol = "v1"
    play = introduced(stage)
    assert play.actions == [ReadPreface()]
    data = header("v2", Address("tcp", "203.0.113.9", 999), HERE, pair="1" * 26)
    assert play.tell(Received(data[:20])) == []
    assert play.session.reads_preface
    assert isinstance(play.tell(Received(data[20:] + b"hello"))[0], Dial)
    assert not play.session.reads_preface
    assert play.tell(Received(b"late")) == []
    assert play.tell(Dialled(1)) == [
        Send(UPSTREAM, b"PROXY TCP4 203.0.113.9 192.0.2.2 999 443\r\n"),
        BeginRelay(b"hello"),
    ]
    play.end(CLIENT)
    play.end(UPSTREAM)
    line = play.line()
    assert (line.client_ip, line.client_port, line.local_ip, line.pair) == (
        "203.0.113.9",
        999,
        "192.0.2.2",
        "1" * 26,
    )
    assert (line.via_ip, line.via_port) == (CLIENT_ADDRESS.host, CLIENT_ADDRESS.port)


def test_a_header_that_names_nobody_leaves_the_connection_as_it_is() -> None:
    stage = Stage()
    play = introduced(stage, "echo")
    assert play.tell(Received(b"PROXY UNKNOWN\r\n")) == [BeginRelay()]
    play.end(CLIENT)
    line = play.line()
    assert (line.client_ip, line.local_ip, line.via_ip) == (CLIENT_ADDRESS.host, LOCAL_ADDRESS.host, None)


def test_a_wrong_header_is_reset_and_told() -> None:
    stage = Stage()
    play = introduced(stage)
    assert play.tell(Received(b"GET / HTTP/1.1\r\n")) == [Abort(CLIENT)]
    assert play.ended() == ("RSTR", "ShDr", "PQ", "service", "EPROTO")
    [told] = stage.logged(IntroductionRefused)
    assert told.reason == "PROXY header: it does not begin as a PROXY header does"
    assert told.session == play.session.record.id


def test_a_header_that_does_not_come_in_time_is_reset_and_told() -> None:
    stage = Stage(header=2.0)
    play = introduced(stage)
    assert play.session.deadline() <= stage.now + 2.0
    assert play.wait(2.1) == [Abort(CLIENT)]
    assert play.ended() == ("RSTR", "Shr", "cQ", "service", "ETIMEDOUT")
    assert stage.logged(IntroductionRefused)[0].reason == "PROXY header: it was not whole within 2 s"


def test_the_limit_for_each_client_is_for_the_one_that_the_header_names() -> None:
    stage = Stage(limits=Limits(sessions_per_client=1))
    names = [Address("tcp", f"203.0.113.{number}", 999) for number in (1, 2, 1)]
    plays = []
    for name in names:
        play = introduced(stage, "echo")
        plays.append(play)
        play.tell(Received(header("v1", name, HERE)))
    assert [play.session.over for play in plays] == [False, False, True]
    plays[2].line()
    assert stage.logged(IntroductionRefused)[0].reason == "1 sessions of 203.0.113.1 are open"
    unix = introduced(stage, "echo")
    body = b"/run/client".ljust(108, b"\0") + b"/run/here".ljust(108, b"\0")
    unix.tell(Received(v2(0x21, 0x31, body)))
    assert not unix.session.over
