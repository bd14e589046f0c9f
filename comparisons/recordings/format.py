"""The file that keeps real conversations with their timing. Version 2; FORMAT.md beside this module
describes it for those who read it with other programs.

A file is a sequence of gzip members, each holding one MessagePack array. Members are compressed alone,
which costs a few percent and buys this: a file can be written while its conversations go on, and of one
that was cut short or damaged everything whole is used and the rest named. A reader that meets a
member it cannot read goes on at the next eight bytes that begin one.

This module reads and writes bytes; what to record and what to do with it is decided elsewhere.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

VERSION = 2
SUFFIX = ".recording"
SHIPPED = Path(__file__).parent

# gzip with neither flags nor a time: how every member begins
MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"
# a small file may unpack to a thousand times its size: more than this is refused, not tried
UNPACKED_LIMIT = 1 << 30
_CHUNK = 1 << 16

Side = Literal["client", "server"]
# up to 285 years: what every program that reads numbers as doubles holds exactly
Microseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One thing that one side did. `when_us` counts from the conversation's start."""

    when_us: Microseconds
    who: Side
    what: Literal["data", "end", "reset"]
    data: bytes = b""


class Course:
    """What may still come of a conversation, step by step."""

    def __init__(self) -> None:
        self._count = self._before = 0
        self._over: set[Side] = set()
        self._reset = False

    def follow(self, steps: Iterable[Step]) -> None:
        """ValueError if one of them cannot have happened after those before it."""
        for step in steps:
            if step.when_us < self._before:
                raise ValueError(f"step {self._count} goes back in time")
            if (step.what == "data") != bool(step.data):
                raise ValueError(f"step {self._count} has bytes and is none, or the reverse")
            if step.who in self._over and step.what != "reset":
                raise ValueError(f"step {self._count} comes after the {step.who}'s end")
            if self._reset:
                raise ValueError(f"step {self._count} comes after a reset")
            if step.what == "end":
                self._over.add(step.who)
            self._reset = step.what == "reset"
            self._before = step.when_us
            self._count += 1


class Conversation(msgspec.Struct, frozen=True):
    """One connection, from its start to its end. `client` and `server` are addresses as `Address` writes
    them, empty if nobody kept them. ValueError if the steps cannot have happened.
    """

    start_us: int
    steps: list[Step]
    client: str = ""
    server: str = ""

    def __post_init__(self) -> None:
        Course().follow(self.steps)

    def bytes_of(self, who: Side) -> int:
        return sum(len(each.data) for each in self.steps if each.who == who)

    @property
    def endings(self) -> dict[Side, str]:
        """How each side ended: "end", "reset", or "open" if the recording does not tell."""
        found: dict[Side, str] = {"client": "open", "server": "open"}
        for step in self.steps:
            if step.what != "data":
                found[step.who] = step.what
        return found

    @property
    def over(self) -> bool:
        """Whether it was recorded to its end."""
        endings = self.endings.values()
        return "reset" in endings or "open" not in endings


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """What was recorded: a title, the software of both sides with its version, and when the recording began
    (microseconds since 1970, UTC; 0: not kept).
    """

    version: int
    title: str = ""
    client: str = ""
    server: str = ""
    began_us: Microseconds = 0


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="conversation"):
    """A conversation as it begins in the file; further steps may follow under the same number."""

    number: int
    start_us: Microseconds
    client: str
    server: str
    steps: list[Step]


class More(msgspec.Struct, frozen=True, array_like=True, tag="more"):
    """Steps that follow those of the parts before; `part` counts from 1."""

    number: int
    part: int
    steps: list[Step]


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    count: int


Part = Header | Begun | More | End


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
    def first_us(self) -> int:
        """When the first conversation began, which is when a replay begins."""
        return min((each.start_us for each in self.conversations), default=0)

    @property
    def duration_us(self) -> int:
        """From the first start to the last step."""
        ends = (each.start_us + (each.steps[-1].when_us if each.steps else 0) for each in self.conversations)
        return max(ends, default=0) - self.first_us


def pack(part: Part) -> bytes:
    """One member of the file."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)  # 16: as a gzip member
    return packer.compress(msgspec.msgpack.encode(part)) + packer.flush()


def encode(header: Header, conversations: Sequence[Conversation]) -> bytes:
    """The file that holds them."""
    parts: list[Part] = [header]
    parts += [
        Begun(number, each.start_us, each.client, each.server, each.steps)
        for number, each in enumerate(conversations)
    ]
    return b"".join(pack(each) for each in [*parts, End(len(conversations))])


def decode(data: bytes) -> Recording:
    """What is whole of a file's bytes. ValueError, one line, if that is nothing, or another version."""
    header: Header | None = None
    end: End | None = None
    growing: dict[int, _Growing] = {}
    damaged: list[Damaged] = []
    for offset, part in _members(data):
        if isinstance(part, Damaged):
            damaged.append(part)
        elif isinstance(part, Header) and header is None and not growing:
            header = part
            if header.version != VERSION:
                raise ValueError(
                    f"a recording of version {header.version}; this program reads version {VERSION}"
                )
        elif isinstance(part, End) and end is None:
            end = part
        elif isinstance(part, Begun | More) and end is None:
            if fault := growing.setdefault(part.number, _Growing()).add(part):
                damaged.append(Damaged(offset, f"conversation {part.number}: {fault}"))
        else:
            damaged.append(Damaged(offset, "out of place"))
    conversations = [each.conversation() for each in growing.values() if each.begun]
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
    return Recording(header or Header(VERSION), conversations, damaged)


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


class _Growing:
    """A conversation that is put together from its parts. After a part that is missing or cannot follow,
    nothing more is taken.
    """

    def __init__(self) -> None:
        self.begun: Begun | None = None
        self._steps: list[Step] = []
        self._course = Course()
        self._parts = 0
        self._whole = True

    def add(self, part: Begun | More) -> str | None:
        """Why it could not be used, told once."""
        if not self._whole:
            return None
        fault = self._fault(part)
        self._whole = fault is None
        if self._whole:
            self.begun = self.begun or part  # type: ignore[assignment]  # the first is one
            self._steps += part.steps
            self._parts += 1
        return fault

    def _fault(self, part: Begun | More) -> str | None:
        if isinstance(part, Begun) and self.begun:
            return "it begins twice"
        if isinstance(part, More) and not self.begun:
            return "its beginning is missing"
        if isinstance(part, More) and part.part != self._parts:
            return f"part {self._parts} is missing, what follows is not used"
        try:
            self._course.follow(part.steps)
        except ValueError as error:
            return str(error)
        return None

    def conversation(self) -> Conversation:
        assert self.begun
        return Conversation(self.begun.start_us, self._steps, self.begun.client, self.begun.server)


def _members(data: bytes) -> Iterator[tuple[int, Part | Damaged]]:
    """Every member with its offset; what cannot be read as one is Damaged, up to the next that can."""
    decoder = msgspec.msgpack.Decoder(Part)
    offset, room = 0, UNPACKED_LIMIT
    lost = False
    while offset < len(data):
        try:
            plain, after = _unpack(data, offset, room)
            part = decoder.decode(plain)
        except (zlib.error, msgspec.DecodeError, EOFError, RecursionError) as error:
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
