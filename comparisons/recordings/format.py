"""The file that keeps real conversations with their timing. Version 1.

A file is a sequence of gzip members (RFC 1952), each holding one MessagePack array, so `zcat FILE` is
a plain MessagePack stream and every member carries its own length and CRC-32:

    ["header", version, title, client, server]      the first: what was recorded, with which software
    ["conversation", start, [step, ...]]            any number, in any order
    ["end", count]                                  the last: how many conversations there are

`start` is in microseconds since the recording began; a step is `[when, who, what, bytes]`: microseconds
since the conversation began (never falling); "client" or "server"; "data", "end" (FIN) or "reset"; and what
was said, which is empty if and only if it was not data. Steps are
in the order in which the recorder saw them, and that order is what a replay keeps: a step was said by
someone who may have heard every step before it. After its end a side says no more, except that it may
still reset; after a reset nobody says anything. A conversation may stop without an end: the recorder did.

Members are compressed alone, which costs a few percent and buys this: of a damaged file everything
whole is used and the rest named. A reader that meets a member it cannot read goes on at the next eight
bytes that begin one. Members carry no time and no file name, so equal recordings are equal bytes.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

VERSION = 1
SUFFIX = ".recording"
SHIPPED = Path(__file__).parent

# gzip with neither flags nor a time: how every member begins
MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"
# a small file may unpack to a thousand times its size: more than this is refused, not tried
UNPACKED_LIMIT = 1 << 30
_CHUNK = 1 << 16

Side = Literal["client", "server"]


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One thing that one side did. `when_us` counts from the conversation's start."""

    when_us: int
    who: Side
    what: Literal["data", "end", "reset"]
    data: bytes = b""


class Conversation(msgspec.Struct, frozen=True, array_like=True, tag="conversation"):
    """One connection, from its start to its end. ValueError if the steps cannot have happened."""

    start_us: int
    steps: list[Step]

    def __post_init__(self) -> None:
        before, over = 0, set[Side]()
        if self.start_us < 0:
            raise ValueError("it starts before the recording")
        for number, step in enumerate(self.steps):
            if step.when_us < before:
                raise ValueError(f"step {number} goes back in time")
            if (step.what == "data") != bool(step.data):
                raise ValueError(f"step {number} has bytes and is none, or the reverse")
            if step.who in over and step.what != "reset":
                raise ValueError(f"step {number} comes after the {step.who}'s end")
            if step.what == "reset" and number != len(self.steps) - 1:
                raise ValueError(f"step {number + 1} comes after a reset")
            if step.what == "end":
                over.add(step.who)
            before = step.when_us

    def bytes_of(self, who: Side) -> int:
        return sum(len(each.data) for each in self.steps if each.who == who)


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """What was recorded: a title, and the software of both sides with its version. Never a host or a path."""

    version: int
    title: str
    client: str
    server: str


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    count: int


class Damaged(msgspec.Struct, frozen=True):
    """A part that could not be used: from which byte of the file on, and why."""

    offset: int
    reason: str


class Recording(msgspec.Struct, frozen=True):
    """Conversations sorted by start. `damaged` names what the file held beside them."""

    header: Header
    conversations: list[Conversation]
    damaged: list[Damaged] = []

    @property
    def bytes_c2s(self) -> int:
        return sum(each.bytes_of("client") for each in self.conversations)

    @property
    def bytes_s2c(self) -> int:
        return sum(each.bytes_of("server") for each in self.conversations)

    @property
    def duration_us(self) -> int:
        """From the first start, which may not be 0, to the last step; counted from 0."""
        return max(
            (each.start_us + (each.steps[-1].when_us if each.steps else 0) for each in self.conversations),
            default=0,
        )


def encode(header: Header, conversations: Sequence[Conversation]) -> bytes:
    """The file that holds them."""
    parts: list[Header | Conversation | End] = [header, *conversations, End(len(conversations))]
    return b"".join(_pack(each) for each in parts)


def decode(data: bytes) -> Recording:
    """What is whole of a file's bytes. ValueError, one line, if that is nothing, or another version."""
    header: Header | None = None
    end: End | None = None
    conversations: list[Conversation] = []
    damaged: list[Damaged] = []
    for offset, part in _members(data):
        if isinstance(part, Damaged):
            damaged.append(part)
        elif isinstance(part, Conversation) and end is None:
            conversations.append(part)
        elif isinstance(part, Header) and header is None and not conversations:
            header = part
            if header.version != VERSION:
                raise ValueError(
                    f"a recording of version {header.version}; this program reads version {VERSION}"
                )
        elif isinstance(part, End) and end is None:
            end = part
        else:
            damaged.append(Damaged(offset, "out of place"))
    if header is None and not conversations:
        raise ValueError("not a recording: nothing in it could be read")
    if header is None and not damaged:
        damaged.append(Damaged(0, "no header"))
    if end is None:
        damaged.append(Damaged(len(data), "cut short: the end is missing"))
    elif end.count != len(conversations) and not damaged:
        damaged.append(
            Damaged(len(data), f"{end.count} conversations were written, {len(conversations)} are here")
        )
    conversations.sort(key=lambda each: each.start_us)
    return Recording(header or Header(VERSION, "", "", ""), conversations, damaged)


def load(name_or_path: str | Path) -> Recording:
    """A shipped recording by its name, or any by its path. OSError; ValueError as `decode`, with the path."""
    path = SHIPPED / f"{name_or_path}{SUFFIX}" if name_or_path in shipped() else Path(name_or_path)
    data = path.read_bytes()
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from error


def shipped() -> list[str]:
    """The names of the recordings that come with the package."""
    return sorted(each.stem for each in SHIPPED.glob(f"*{SUFFIX}"))


def _pack(part: Header | Conversation | End) -> bytes:
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)  # 16: as a gzip member
    return packer.compress(msgspec.msgpack.encode(part)) + packer.flush()


def _members(data: bytes) -> Iterator[tuple[int, Header | Conversation | End | Damaged]]:
    """Every member with its offset; what cannot be read as one is Damaged, up to the next that can."""
    decoder = msgspec.msgpack.Decoder(Header | Conversation | End)
    offset, room = 0, UNPACKED_LIMIT
    lost = False
    while offset < len(data):
        try:
            plain, after = _unpack(data, offset, room)
            part = decoder.decode(plain)
        except (zlib.error, msgspec.DecodeError, EOFError) as error:
            # one stretch of damage is told once, however often something in it looks like a beginning
            if not lost:
                yield offset, Damaged(offset, str(error))
            lost = True
            offset = data.find(MEMBER, offset + 1)
            if offset < 0:
                return
        else:
            yield offset, part
            lost = False
            offset, room = after, room - len(plain)


def _unpack(data: bytes, offset: int, room: int) -> tuple[bytes, int]:
    """One member's content, and where the next begins."""
    packed, plain = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), bytearray()
    view = memoryview(data)
    while not packed.eof and offset < len(data):
        # in chunks, because what follows the member is handed back as a copy
        chunk = view[offset : offset + _CHUNK]
        plain += packed.decompress(chunk)
        offset += len(chunk)
        if len(plain) > room:
            raise ValueError(f"unpacks to more than {UNPACKED_LIMIT >> 20} MiB")
    if not packed.eof:
        raise EOFError("cut short")
    return bytes(plain), offset - len(packed.unused_data)
