"""Faults on purpose: latency, bandwidth, slices, holes, resets, limits; for UDP loss, duplicates, reordering.

A `Fault` says what to do, in which direction, and how often. The policy is the same in every engine
because it is here: which sessions are hit is drawn from the fault's seed and the session's number at
its listener, never from a clock, so that the n-th session meets the same faults whoever serves it.

What acts on bytes becomes a `Line`, which a relay carries: bytes go in as they are read, and come out
when they are due, in order, and cut as the faults want it. It says when, and never waits. What acts on
the session (a reset, a hole that ends) is a deadline of the session. Datagrams get a `Fate` each.

Several faults of one kind add up where that means something (latency) and else the strictest counts.
Latency delays the end of the stream too, since a FIN travels behind its bytes. What a line holds counts
against the relay's limit, so it also bounds how fast a delayed stream can be: limit / latency.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

# Bandwidth is given out in as much as passes in this time, so that a slow link is not a stuttering one.
QUANTUM = 0.02
SMALLEST_QUANTUM = 64
# Datagrams that wait to be sent late; a further one is lost. With 64 KiB each, 64 MiB at most.
MOST_LATE = 1024
# How long a datagram that is to be overtaken is kept back: longer than a burst, shorter than a retry.
OVERTAKEN = 0.01

NEVER = float("inf")
Direction = Literal["upstream", "downstream"]


class Fault(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Args:
    direction: of the bytes: `upstream` is what the client sends. An echo has one direction, which
        is both.
    probability: that it hits a session; of a fault for datagrams, a datagram.
    seed: of those draws, and of sizes and delays that vary.
    name: how the control interface and the log call it; TYPE_DIRECTION where there is none.

    """

    direction: Direction = "downstream"
    probability: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0)] = 0
    name: str = ""

    @property
    def type(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def label(self) -> str:
        return self.name or f"{self.type}_{self.direction}"

    def draw(self, *what: object) -> random.Random:
        """A source of numbers that depends on the seed, the fault and `what`, and on nothing else."""
        return random.Random(":".join(map(str, (self.seed, self.type, self.direction, *what))))  # noqa: S311


class Latency(Fault, frozen=True, kw_only=True, tag="latency"):
    """Seconds; what is read at once gets one delay, evenly from `delay` - `jitter` to `delay` + `jitter`."""

    delay: float
    jitter: float = 0.0

    def seconds(self, source: random.Random) -> float:
        return max(0.0, self.delay + (source.uniform(-self.jitter, self.jitter) if self.jitter else 0.0))


class Bandwidth(Fault, frozen=True, kw_only=True, tag="bandwidth"):
    """`rate`: bytes a second; with 0 everything waits for other faults."""

    rate: int


class Slicer(Fault, frozen=True, kw_only=True, tag="slicer"):
    """The stream in pieces of `size` bytes, give or take `variation`, `delay` seconds apart."""

    size: int
    variation: int = 0
    delay: float = 0.0


class Blackhole(Fault, frozen=True, kw_only=True, tag="blackhole"):
    """What comes is lost, the end too; `after` seconds the session is closed, if that is given."""

    after: float | None = None


class Reset(Fault, frozen=True, kw_only=True, tag="reset"):
    """Both legs are reset `after` seconds."""

    after: float = 0.0


class Limit(Fault, frozen=True, kw_only=True, tag="limit"):
    """The session is closed once `bytes` have passed."""

    bytes: int


class SlowClose(Fault, frozen=True, kw_only=True, tag="slow_close"):
    """The end of the stream is passed on `delay` seconds late."""

    delay: float


class Drop(Fault, frozen=True, kw_only=True, tag="loss"):
    """The datagram is lost."""


class Duplicate(Fault, frozen=True, kw_only=True, tag="duplicate"):
    """The datagram is sent twice."""


class Reorder(Fault, frozen=True, kw_only=True, tag="reorder"):
    """The datagram is kept back `delay` seconds, so that those behind it overtake."""

    delay: float = OVERTAKEN


StreamFault = Latency | Bandwidth | Slicer | Blackhole | Reset | Limit | SlowClose
AnyFault = Latency | Bandwidth | Slicer | Blackhole | Reset | Limit | SlowClose | Drop | Duplicate | Reorder

# what a listener of each kind can suffer
FOR_STREAMS = (Latency, Bandwidth, Slicer, Blackhole, Reset, Limit, SlowClose)
FOR_DATAGRAMS = (Latency, Drop, Duplicate, Reorder)


def hitting(faults: Sequence[AnyFault], number: int) -> tuple[AnyFault, ...]:
    """Those of `faults` that the listener's session `number` meets."""
    return tuple(
        fault for fault in faults if fault.probability >= 1 or fault.draw(number).random() < fault.probability
    )


class Line:
    """One direction's bytes on their way. It belongs to the thread that pumps its relay, but for `change`.

    Args:
        faults: of this direction, that hit this session.
        number: of the session, at its listener.

    `held` is how many bytes are inside; `lossy` whether any were lost on purpose.

    """

    def __init__(self, faults: Sequence[AnyFault], number: int) -> None:
        self.held = 0
        self.lossy = False
        # the end has come out, or nothing more may pass
        self.over = False
        self.exhausted = False
        self._number = number
        self._changed: Sequence[AnyFault] | None = None
        # what came in, and not before when it may leave
        self._chunks: deque[tuple[float, memoryview]] = deque()
        self._head: tuple[float, memoryview] | None = None
        # when the last piece left, at the earliest, and when the link is free again
        self._left_at = self._free_at = 0.0
        self._end_at: float | None = None
        self._passed = 0
        self._use(faults)

    def _use(self, faults: Sequence[AnyFault]) -> None:
        number = self._number
        self._latencies = [(each, each.draw(number, "delay")) for each in faults if isinstance(each, Latency)]
        slicers = [each for each in faults if isinstance(each, Slicer)]
        self._slicer = min(slicers, key=lambda each: each.size, default=None)
        self._sizes = self._slicer.draw(number, "size") if self._slicer else None
        self._rate = min((each.rate for each in faults if isinstance(each, Bandwidth)), default=None)
        self._limit = min((each.bytes for each in faults if isinstance(each, Limit)), default=None)
        self._hole = any(isinstance(each, Blackhole) for each in faults)
        self._linger = sum(each.delay for each in faults if isinstance(each, SlowClose))

    def change(self, faults: Sequence[AnyFault]) -> None:
        """Other faults from now on; what the old ones held back is due at once. From any thread."""
        self._changed = faults

    def _settle(self) -> None:
        if self._changed is None:
            return
        faults, self._changed = self._changed, None
        if self._head is not None:
            self._chunks.appendleft(self._head)
            self._head = None
        self._chunks = deque((0.0, data) for _, data in self._chunks)
        self._left_at = self._free_at = 0.0
        if self._end_at is not None:
            self._end_at = 0.0
        self._use(faults)

    def feed(self, data: bytes, now: float) -> int:
        """`data` was read. How many bytes of it will come out; the others are lost."""
        self._settle()
        if self._hole:
            self.lossy = True
            return 0
        kept = len(data)
        if self._limit is not None:
            kept = min(kept, max(0, self._limit - self._passed))
        self._passed += kept
        self.exhausted = self._limit is not None and self._passed >= self._limit
        if kept:
            self._chunks.append((now + self._delay(), memoryview(data)[:kept]))
        self.held += kept
        return kept

    def end(self, now: float) -> None:
        """The source has ended."""
        self._settle()
        if self._end_at is None:
            self._end_at = now + self._delay() + self._linger

    def take(self, now: float) -> bytes:
        """The next piece that is due, to be written by itself; empty where none is."""
        self._settle()
        head = self._peek()
        if head is None:
            self.over = self.exhausted or now >= self._end_due()
            return b""
        due, piece = head
        if due > now:
            return b""
        self._head = None
        self._left_at = max(due, self._left_at)
        self.held -= len(piece)
        return bytes(piece)

    def due(self) -> float:
        """When `take` has something to give, or to say."""
        head = self._peek()
        if head is not None:
            return head[0]
        return NEVER if self.over else self._end_due()

    def _delay(self) -> float:
        return sum(each.seconds(source) for each, source in self._latencies)

    def _end_due(self) -> float:
        if self._end_at is None or self._hole:
            return NEVER
        return max(self._end_at, self._left_at + self._linger)

    def _peek(self) -> tuple[float, memoryview] | None:
        """The next piece and when it may leave, cut from the oldest chunk."""
        if self._head is None and self._chunks:
            at, chunk = self._chunks.popleft()
            size = self._size(len(chunk))
            piece, rest = chunk[:size], chunk[size:]
            due = max(at, self._left_at)
            if self._rate is not None:
                takes = size / self._rate if self._rate else NEVER
                due = self._free_at = max(due, self._free_at) + takes
            if len(rest):
                # the next slice keeps its distance from this one
                pause = self._slicer.delay if self._slicer else 0.0
                self._chunks.appendleft((due + pause, rest))
            self._head = (due, piece)
        return self._head

    def _size(self, most: int) -> int:
        size = most
        if self._rate is not None:
            size = min(size, max(SMALLEST_QUANTUM, int(self._rate * QUANTUM)))
        if self._slicer is not None and self._sizes is not None:
            vary = min(self._slicer.variation, self._slicer.size - 1)
            size = min(size, self._slicer.size + self._sizes.randint(-vary, vary))
        return size


class Fates:
    """What becomes of each datagram of one listener: the n-th one meets the same fate in every engine."""

    def __init__(self, faults: Sequence[AnyFault], origin: Sequence[AnyFault] = ()) -> None:
        # the list that these were taken from: another one means other fates
        self.origin = origin
        self._sources = [(fault, fault.draw(number)) for number, fault in enumerate(faults)]
        self._late: deque[float] = deque()

    def of_next(self, now: float) -> Iterator[float]:
        """When to send it: not at all, once or more often; a moment that has come means at once."""
        copies, due = 1, now
        for fault, source in self._sources:
            hit = source.random() < fault.probability
            late = fault.seconds(source) if isinstance(fault, Latency) else 0.0
            if not hit:
                continue
            match fault:
                case Drop():
                    copies = 0
                case Duplicate():
                    copies *= 2
                case Reorder(delay=delay):
                    due += delay
                case _:  # latency
                    due += late
        while self._late and self._late[0] <= now:
            self._late.popleft()
        for _ in range(copies):
            if due > now:
                if len(self._late) >= MOST_LATE:
                    return
                self._late.append(due)
            yield due
