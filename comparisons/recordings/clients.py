"""Plays the clients of a recording against a real server, and compares what it answers.

A client's step is due at its recorded time, divided by the speed, and is sent once everything has been
heard that the server had said before it. So a slower server makes the steps late, never the schedule slow:
how late each was is the lag, and every step counts, also the opening of a conversation that had to wait
for a free place. What of the lag was this program's own is told apart.

Answers are compared as one stream of bytes a conversation, whatever pieces it comes in. An answer that is
shorter than the recorded one is waited for as long as the recorded one took, and `SILENCE` longer, after
which the conversation goes on; half a second longer once an answer was another than recorded. Time is counted only for answers that are certain to be the recorded ones:
all of a conversation whose stream has the recorded length, else those before the first difference.
"""

import itertools
import socket
from array import array
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Literal

import msgspec

from comparisons.recordings.format import Recording
from comparisons.recordings.loop import Loop, Stream, name_of
from comparisons.recordings.script import CLIENT, DATA, END, RESET, SERVER, Script, alike
from services.core.addresses import Address
from services.core.preface import header
from services.engines.sockets import client_address

SILENCE = 5.0  # seconds
SILENCE_AFTER_DIFFERENCE = 0.5  # seconds; a length that has changed is more likely than a server that sleeps
LOOK = 0.001  # seconds between two looks at what the other side has not acknowledged yet
NAMELESS = Address("unix", "")  # a header has no name for the ends of a UNIX socket
CONTEXT = 16  # bytes from the first difference on that are shown

Reply = Literal["as recorded", "different", "not opened", "not finished"]


class Times(msgspec.Struct, frozen=True):
    """Microseconds: nearest ranks of all values, none of them rounded or left out."""

    count: int
    p50: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, values: "array[int]") -> "Times | None":
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (ordered[max(-(-len(ordered) * percent // 100) - 1, 0)] for percent in (50, 90, 99))
        return cls(len(ordered), p50, p90, p99, ordered[-1])


class Came(msgspec.Struct, frozen=True):
    """What came of one conversation. `pair` is the same whenever it is played from this file: when the recording
    began (seconds since 1970), the conversation and the loop; an upstream that reads the PROXY protocol logs it.
    `client` is our end of the connection, which the logs of what it went through have as client_ip and client_port. `offset` is the
    first byte of the answers that is another, missing or too many, `was` and `now` what is there, in hexadecimal.
    `differing` counts the bytes that are others, if there are as many as there were; else it is null.
    """

    pair: str
    conversation: int
    loop: int
    client: str
    reply: Reply
    bytes_recorded: int
    bytes: int
    ended_recorded: str
    ended: str
    offset: int | None = None
    differing: int | None = None
    was: str = ""
    now: str = ""
    detail: str = ""


class Report(msgspec.Struct, frozen=True):
    """`exchanges` counts the recorded answers that could be timed, `untimed` the others. `lag` is how late steps were against
    the schedule (null at full speed, which has none), `own_lag` the part after all that a step waited for was there.
    """

    seconds: float
    concurrency: int | None
    exchanges: int
    untimed: int
    latency: Times | None
    latency_recorded: Times | None
    lag: Times | None
    own_lag: Times | None
    complete: bool
    conversations: list[Came]


class Clients:
    """`speed` 0 is as fast as it goes. With `introduced` each conversation begins with a PROXY header (version 2)
    that has its pair. At most `concurrency` conversations run at a time (null: as many as the
    schedule asks for, or, at full speed, as were open at a time when recorded).
    """

    def __init__(
        self,
        recording: Recording,
        addresses: Sequence[Address],
        *,
        speed: float = 1.0,
        loops: int = 1,
        concurrency: int | None = None,
        introduced: bool = False,
    ) -> None:
        self.loop = Loop()
        self.addresses = addresses
        self.speed = speed
        self.introduced = introduced
        self.began = recording.header.began_us // 1_000_000
        self.concurrency = concurrency or (None if speed else max(most_open(recording), 1))
        self.scripts = [Script(each, recording.first_us) for each in recording.conversations]
        self.endings = [each.endings["server"] for each in recording.conversations]
        self.came: list[Came] = []
        self.latencies, self.recorded = array("q"), array("q")
        self.lags, self.own_lags = array("q"), array("q")
        self.untimed = 0
        self._length = recording.duration_us
        self._plan = iter(itertools.product(range(loops), range(len(self.scripts))))
        self._next: tuple[int, int] | None = next(self._plan, None)
        self._open: set[_Client] = set()
        self._began = 0.0
        self._opening = False
        self._stopped = False

    def stop(self) -> None:
        """From any thread: end with what was played so far."""
        self.loop.post(self._stop)

    def run(self) -> Report:
        self._began = monotonic()
        try:
            self._open_due()
            self.loop.run(lambda: not (self._open or self._next))
        finally:
            self.loop.close()
        return Report(
            seconds=monotonic() - self._began,
            concurrency=self.concurrency,
            exchanges=len(self.latencies),
            untimed=self.untimed,
            latency=Times.of(self.latencies),
            latency_recorded=Times.of(self.recorded),
            lag=Times.of(self.lags) if self.speed else None,
            own_lag=Times.of(self.own_lags) if self.speed else None,
            complete=not self._stopped,
            conversations=sorted(self.came, key=lambda each: (each.loop, each.conversation)),
        )

    def over(self, client: "_Client", came: Came) -> None:
        self._open.discard(client)
        self.came.append(came)
        self._open_due()

    def late(self, due: float, able: float) -> None:
        """A step is done now that was due then, and could have been done since `able`."""
        now = monotonic()
        self.lags.append(round((now - due) * 1e6))
        self.own_lags.append(round((now - max(due, able)) * 1e6))

    def _open_due(self) -> None:
        """Open what is due and has a place. A conversation may be over as soon as it is opened."""
        if self._opening:
            return
        self._opening = True
        while self._next and (self.concurrency is None or len(self._open) < self.concurrency):
            loop, index = self._next
            due = now = monotonic()
            if self.speed:
                due = self._began + (loop * self._length + self.scripts[index].start) * 1e-6 / self.speed
                if now < due:
                    self.loop.at(due, self._open_due)
                    break
                # it waited for its time, or for a place that has become free just now
                self.late(due, now)
            self._next = next(self._plan, None)
            client = _Client(self, loop, index, due)
            self._open.add(client)
            client.dial()
        self._opening = False

    def _stop(self) -> None:
        self._stopped, self._next = True, None
        for client in list(self._open):
            client.give_up("not finished", "interrupted")


class _Client:
    """One conversation being played."""

    def __init__(self, clients: Clients, loop: int, index: int, due: float) -> None:
        self._clients, self._loop, self._index, self._due = clients, loop, index, due
        # 26 characters, as every id in the log
        self._pair = f"{clients.began:010}.{index:07}.{loop:07}"
        self._script = clients.scripts[index]
        self._stream: Stream | None = None
        self._name = ""
        self._step = self._script.following[CLIENT][0]  # own step to do next
        self._awaited = self._script.following[SERVER][0]  # the server's step to hear next
        self._sent = self._heard = 0
        self._credit = 0  # bytes that are no longer waited for
        self._active = self._able = monotonic()
        self._waiting = False  # a timer looks whether the server has fallen silent
        self._timed = -1  # the step for which a timer is set
        self._asked = 0.0
        self._asked_step = -1
        self._exchanges: list[tuple[int, int, int]] = []  # mark, latency, as recorded
        self._offset: int | None = None
        self._differing = 0
        self._was = self._now = b""
        self._ended = "open"
        self._detail = ""
        self._over = False
        self._cancel: Callable[[], None] = lambda: None

    def dial(self) -> None:
        self._cancel = self._clients.loop.dial(self._clients.addresses, self._dialled)

    def give_up(self, reply: Reply, detail: str) -> None:
        self._cancel()
        self._detail = detail
        if self._stream:
            self._stream.reset()
        self._finish(reply)

    def heard(self, stream: Stream, data: bytes) -> None:  # noqa: ARG002  there is one
        self._compare(data)
        self._heard += len(data)
        self._active = monotonic()
        self._hear_steps()
        self._advance()

    def ended(self, stream: Stream) -> None:  # noqa: ARG002  as above
        self._ended = "end"
        self._hear_steps()
        self._advance()

    def lost(self, stream: Stream, error: OSError) -> None:  # noqa: ARG002  as above
        self._ended = "reset"
        if self._step < len(self._script.kinds):
            self._detail = f"the server was gone: {error.strerror}"
        self._done()

    def drained(self, stream: Stream) -> None:  # noqa: ARG002  as above
        self._advance()

    def _dialled(self, found: socket.socket | OSError) -> None:
        if isinstance(found, OSError):
            self._detail = found.strerror or str(found)
            self._finish("not opened")
            return
        self._name = name_of(found.getsockname())
        self._stream = Stream(self._clients.loop, found, self)
        if self._clients.introduced:
            server = client_address(found.getpeername()) or NAMELESS
            own = client_address(found.getsockname())
            self._stream.send(header("v2", own, server, pair=self._pair))
        self._active = self._able = monotonic()
        self._advance()

    def _hear_steps(self) -> None:
        """Go past the server's steps that are here."""
        script, now = self._script, monotonic()
        while self._awaited < len(script.kinds):
            step = self._awaited
            if script.kinds[step] == DATA:
                if script.marks[step] > self._heard + self._credit:
                    return
                if script.answers[step] and self._asked_step >= 0:
                    latency = round((now - self._asked) * 1e6)
                    recorded = script.whens[step] - script.whens[self._asked_step]
                    self._exchanges.append((script.marks[step], latency, recorded))
            elif self._ended == "open":
                return
            self._awaited = script.following[SERVER][step + 1]
            self._able = now

    def _advance(self) -> None:
        """Do what is due and waits for nothing."""
        script, stream, speed = self._script, self._stream, self._clients.speed
        while stream and not stream.closed and self._step < self._awaited:
            step = self._step
            if speed:
                due = self._due + script.whens[step] * 1e-6 / speed
                if monotonic() < due:
                    if self._timed != step:
                        self._timed = step
                        self._clients.loop.at(due, self._advance)
                    return
            if script.kinds[step] == RESET and stream.unheard and monotonic() < self._active + SILENCE:
                # a reset may destroy what is under way
                self._clients.loop.at(monotonic() + LOOK, self._advance)
                return
            if speed:
                self._clients.late(due, self._able)
            self._step = script.following[CLIENT][step + 1]
            self._active = monotonic()
            if script.kinds[step] == DATA:
                self._asked, self._asked_step = self._active, step
                stream.send(script.streams[CLIENT][self._sent : script.marks[step]])
                self._sent = script.marks[step]
            elif script.kinds[step] == END:
                stream.end()
            else:
                stream.reset()
                self._done()
        if self._over or not stream:
            return
        count = len(script.kinds)
        everything = self._step >= count and self._awaited >= count and not stream.pending
        may_do = self._step < min(self._awaited, count)
        if everything or (self._ended != "open" and not may_do):
            self._done()
        elif not self._waiting:
            self._waiting = True
            self._clients.loop.at(self._patience(), self._waited)

    def _patience(self) -> float:
        """Until when the server may be silent: as long as it was when recorded, and some time."""
        step, whens = self._awaited, self._script.whens
        recorded = 0
        if step < len(whens):
            recorded = whens[step] - (whens[step - 1] if step else 0)
        silence = SILENCE if self._offset is None else SILENCE_AFTER_DIFFERENCE
        return self._active + silence + recorded * 1e-6 / min(self._clients.speed or 1, 1)

    def _waited(self) -> None:
        """Go on without what has not come."""
        script = self._script
        self._waiting = False
        if self._over:
            return
        if monotonic() >= self._patience() and self._step >= self._awaited:
            self._detail = self._detail or f"nothing more came after byte {self._heard:,}"
            if self._step >= len(script.kinds):
                self._done()
                return
            if script.kinds[self._awaited] == DATA:
                self._credit = max(script.marks[self._awaited] - self._heard, 0)
            self._asked_step = -1
            self._awaited = script.following[SERVER][self._awaited + 1]
            self._able = monotonic()
        self._advance()

    def _compare(self, data: bytes) -> None:
        wanted = self._script.streams[SERVER][self._heard : self._heard + len(data)]
        if data == wanted:
            return
        if self._offset is None:
            same = alike(data, wanted)
            self._differs(self._heard + same, data[same : same + CONTEXT])
        length = len(wanted)
        changed = int.from_bytes(data[:length], "big") ^ int.from_bytes(wanted, "big")
        self._differing += length - changed.to_bytes(length, "big").count(0)

    def _differs(self, offset: int, now: bytes) -> None:
        self._offset, self._now = offset, now
        self._waiting = False  # from now on it is waited for less
        self._was = self._script.streams[SERVER][offset : offset + CONTEXT]

    def _done(self) -> None:
        if self._over:
            return
        if self._stream:
            self._stream.close()
        wanted = len(self._script.streams[SERVER])
        if self._offset is None and self._heard < wanted:
            self._differs(self._heard, b"")
        self._finish("as recorded" if self._offset is None else "different")
        certain = wanted if self._heard == wanted or self._offset is None else self._offset
        timed = [each for each in self._exchanges if each[0] <= certain]
        self._clients.untimed += sum(self._script.answers) - len(timed)
        for _, latency, recorded in timed:
            self._clients.latencies.append(latency)
            self._clients.recorded.append(recorded)

    def _finish(self, reply: Reply) -> None:
        if self._over:
            return
        self._over = True
        wanted = len(self._script.streams[SERVER])
        came = Came(
            pair=self._pair,
            conversation=self._index,
            loop=self._loop,
            client=self._name,
            reply=reply,
            bytes_recorded=wanted,
            bytes=self._heard,
            ended_recorded=self._clients.endings[self._index],
            ended=self._ended,
            offset=self._offset,
            differing=self._differing if self._heard == wanted else None,
            was=self._was.hex(),
            now=self._now.hex(),
            detail=self._detail,
        )
        self._clients.over(self, came)


def most_open(recording: Recording) -> int:
    """How many conversations were open at a time."""
    turns = []
    for each in recording.conversations:
        turns.append((each.start_us, 1))
        turns.append((each.start_us + (each.steps[-1].when_us if each.steps else 0), -1))
    # of one instant, what ends goes first
    return max(itertools.accumulate(change for _, change in sorted(turns)), default=0)
