"""One direction of byte movement, with its flow control, by counters.

The engine moves the bytes and says how many; the relay says whether there is room to read and
whether something waits to be written. A relay belongs to the thread that pumps it: nothing here
takes a lock, and nothing is computed on the path of a message that its counters do not need.

A relay that suffers faults carries a `line`. Only then do bytes pass through the core: the engine
hands over what it read (`carry`) and writes what comes out (`deliver`) when it is due.
"""

from collections.abc import Sequence

from services.core.faults import AnyFault, Line
from services.core.record import Record, Side


class Relay:
    """From `source` to `sink`, holding at most `limit` bytes in user space.

    Args:
        record: stamped with every moved byte (idle time, longest silence).
        source, sink: the legs; the same one for echo.
        limit: bytes, at least 1.

    `room` is how many more bytes may be read now; it never exceeds `limit`.

    """

    __slots__ = (
        "bytes_in",
        "bytes_out",
        "discarding",
        "ended_at",
        "finished_at",
        "first_in",
        "first_out",
        "held",
        "last_in",
        "limit",
        "line",
        "longest_pause",
        "partial_writes",
        "paused_at",
        "paused_time",
        "pauses",
        "peak",
        "peer_ended",
        "reads",
        "record",
        "resumes",
        "room",
        "sink",
        "source",
        "spliced",
        "would_block",
        "writes",
    )

    def __init__(self, record: Record, source: Side, sink: Side, limit: int) -> None:
        self.record = record
        self.source = source
        self.sink = sink
        self.limit = self.room = limit
        self.bytes_in = self.bytes_out = self.spliced = 0
        self.reads = self.writes = self.partial_writes = self.would_block = 0
        self.pauses = self.resumes = self.peak = 0
        self.paused_time = self.longest_pause = 0.0
        self.paused_at: float | None = None
        self.first_in: float | None = None
        self.first_out: float | None = None
        self.last_in = record.opened_at
        self.ended_at: float | None = None
        self.finished_at: float | None = None
        # the source has ended, says a failed write to it; its end may not have been read yet
        self.peer_ended = False
        self.discarding = False
        self.line: Line | None = None
        self.held = 0  # bytes inside the line

    @property
    def pending(self) -> int:
        """Bytes read and not yet written."""
        return self.limit - self.room

    @property
    def waiting(self) -> int:
        """Those of them that the sink could have at once."""
        return self.limit - self.room - self.held

    @property
    def wants_read(self) -> bool:
        return self.room > 0 and self.ended_at is None and (self.line is None or not self.line.exhausted)

    @property
    def wants_write(self) -> bool:
        return self.room + self.held < self.limit

    @property
    def finished(self) -> bool:
        """The source has ended and every byte of it was written."""
        if self.room < self.limit:
            return False
        if self.line is None or self.discarding:
            return self.ended_at is not None
        return self.line.over

    def received(self, n: int, now: float) -> None:
        """`n` bytes (at least 1, at most `room`) were read from the source."""
        if self.first_in is None:
            self.first_in = now
        self.last_in = now
        self.bytes_in += n
        self.reads += 1
        if self.discarding:
            return  # no room is taken, and a silence that only we hear goes on
        self.room -= n
        record = self.record
        gap = now - record.moved_at
        record.max_gap = max(record.max_gap, gap)
        record.moved_at = now
        pending = self.limit - self.room
        self.peak = max(self.peak, pending)

    def sent(self, n: int, now: float) -> None:
        """`n` pending bytes (at least 1) were taken by the sink in one write."""
        if self.first_out is None:
            self.first_out = now
            if self.sink is Side.CLIENT:
                self.record.first_byte_at = now
        self.bytes_out += n
        self.writes += 1
        self.room += n
        record = self.record
        gap = now - record.moved_at
        record.max_gap = max(record.max_gap, gap)
        record.moved_at = now
        if self.room + self.held < self.limit:
            self.partial_writes += 1
        if self.paused_at is not None:
            self.resumes += 1
            pause = now - self.paused_at
            self.paused_time += pause
            self.longest_pause = max(self.longest_pause, pause)
            self.paused_at = None

    def blocked(self) -> None:
        """A read or a write found that it would have to wait: an ordinary answer."""
        self.would_block += 1

    def pause(self, now: float) -> None:
        """The source is no longer read, because the sink does not take what was; `sent` resumes."""
        if self.paused_at is None:
            self.pauses += 1
            self.paused_at = now

    def ended(self, now: float) -> None:
        """The source's end (its FIN) was read."""
        if self.ended_at is None:
            self.ended_at = now
            if self.line is not None:
                self.line.end(now)

    def discard(self) -> None:
        """The sink is gone: what waits for it and what still comes is read and dropped."""
        self.discarding = True
        self.room = self.limit
        self.held = 0
        self.paused_at = None

    def suffer(self, faults: Sequence[AnyFault], number: int, now: float) -> None:
        """These faults from now on, and no others. From any thread."""
        if self.line is not None:
            self.line.change(faults)
        elif faults and self.finished_at is None:
            line = Line(faults, number)
            if self.ended_at is not None:
                line.end(now)
            self.line = line

    def carry(self, data: bytes, now: float) -> None:
        """`data`, which was `received`, goes into the line."""
        assert self.line is not None
        kept = self.line.feed(data, now)
        self.held += kept
        self.room += len(data) - kept

    def deliver(self, now: float) -> bytes:
        """What comes out of the line now, to be written at once; empty where nothing does."""
        assert self.line is not None
        if self.discarding:
            return b""
        piece = self.line.take(now)
        self.held -= len(piece)
        return piece

    def due(self) -> float:
        """When `deliver` has something to give, or the line's end comes out."""
        if self.line is None or self.discarding:
            return float("inf")
        return self.line.due()
