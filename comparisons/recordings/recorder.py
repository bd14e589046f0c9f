"""A recording proxy: it accepts, dials, passes bytes on both ways with half-close and resets, and hands
what was said, and when, to a keeper.

It changes nothing in what it passes on, and a stalled reader stops its sender as it would directly: beyond
the kernel's buffers a direction holds `BUFFER` bytes. A step is noted when it is read, before it is passed
on, so an answer always follows its question. What is not here: engines, pools, limits, timeouts. One
loop with non-blocking sockets is the least that stands between two programs that are to be listened to.

When it stops, open sessions go on: they are cut only after the drain time of a daemon, and a cap on what is
kept cuts nobody.
"""

import contextlib
import socket
from collections.abc import Callable, Sequence
from time import monotonic, monotonic_ns
from typing import Any

from comparisons.recordings.format import Side, Step
from comparisons.recordings.keeper import Keeper
from comparisons.recordings.loop import Loop, Stream, name_of
from services.core.addresses import Address
from services.core.session import Timeouts
from services.endpoints import BACKLOG

BUFFER = 1 << 18  # bytes that wait for one peer before the other is no longer read
PART = 1 << 16  # bytes of a conversation that are handed to the keeper together
FLUSH = 1.0  # seconds after which they are handed over all the same
STEP_BYTES = 32  # counted for a step beside its bytes, so that many small ones meet the cap as well

OTHER: dict[Side, Side] = {"client": "server", "server": "client"}


class Recorder:
    """Records what passes from `listeners` to the first of `upstreams` that can be dialled. `serve` returns once
    it was stopped (`stop`, a cap, or `sessions` of them) and the open sessions have ended. `say` gets a
    line when something stops it.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        upstreams: Sequence[Address],
        keeper: Keeper,
        *,
        most_bytes: int = 64 << 20,
        most_time: float = 3600.0,
        sessions: int | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.loop = Loop()
        self.listeners, self.upstreams = listeners, upstreams
        self.keeper: Keeper | None = keeper  # while something is kept
        self.room = most_bytes
        self.most_time = most_time
        self.sessions = sessions
        self.say = say
        self.open: set[_Session] = set()
        self.begun = 0  # sessions that have reached the upstream
        self.cut = 0  # sessions that were open when the drain time was over
        self.unreachable = 0  # clients that were turned away because the upstream could not be dialled
        self.first_ns = monotonic_ns()
        self._accepting = False
        self._stopping = False
        self._asked = False

    def stop(self) -> None:
        """From any thread: accept no more, and end with the open sessions; called again, cut them."""
        self.loop.post(self._stop)

    def stop_keeping(self, why: str) -> None:
        """Nothing more is kept, the file is ended, nobody is accepted; sessions go on as long as they want."""
        if not self.keeper:
            return
        keeper, self.keeper = self.keeper, None
        for session in self.open:
            session.flush(keeper)
        keeper.finish()
        self._stopping = True
        self.accept()
        self.say(f"recording has stopped: {why}; sessions go on until they end")

    def serve(self) -> None:
        try:
            self.first_ns = monotonic_ns()
            now = monotonic()
            self.loop.at(now + self.most_time, lambda: self.stop_keeping("--most-time is over"))
            self.loop.at(now + FLUSH, self._flush)
            self.accept()
            self.loop.run(lambda: not (self._accepting or self.open))
        finally:
            self.loop.close()

    def accept(self) -> None:
        """Accept or do not, as things stand."""
        full = self.sessions is not None and self.begun + self._dialling >= self.sessions
        wanted = not (self._stopping or full)
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self.listeners:
                if wanted:
                    self.loop.listen(listener, self._accepted)
                else:
                    self.loop.watch(listener, 0, lambda _mask: None)
        if self._stopping or (self.sessions is not None and self.begun >= self.sessions):
            self._end_listening()

    def _end_listening(self) -> None:
        """Whoever waits in the backlog is taken, unless there are sessions enough; later ones are refused."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            with contextlib.suppress(OSError):
                for _ in range(BACKLOG):  # more than that have come meanwhile, and others will
                    if self.sessions is not None and self.begun + self._dialling >= self.sessions:
                        break
                    _Session(self, *listener.accept()).dial()
            listener.close()

    @property
    def _dialling(self) -> int:
        return sum(session.dialling for session in self.open)

    def _accepted(self, sock: socket.socket, peer: Any) -> None:
        _Session(self, sock, peer).dial()
        self.accept()

    def _stop(self) -> None:
        if self._asked:
            self._cut()
            return
        self._asked = self._stopping = True
        self.accept()
        self.loop.at(monotonic() + Timeouts().drain, self._cut)

    def _cut(self) -> None:
        self.cut = len(self.open)
        for session in list(self.open):
            session.cut()

    def _flush(self) -> None:
        self.loop.at(monotonic() + FLUSH, self._flush)
        if self.keeper and self.keeper.failure:
            self.stop_keeping(self.keeper.failure.strerror or "the file cannot be written")
        elif self.keeper:
            for session in self.open:
                session.flush(self.keeper)


class _Session:
    """One client and its upstream."""

    def __init__(self, recorder: Recorder, sock: socket.socket, peer: Any) -> None:
        self._recorder = recorder
        self._start_ns = monotonic_ns()
        self._peer = name_of(peer)
        self._number = 0
        self._steps: list[Step] = []
        self._size = 0
        self._reset = False
        self.dialling = True
        recorder.open.add(self)
        # its end waits in the kernel until there is somebody to tell it to; its reset is looked for
        self._streams: dict[Side, Stream] = {"client": Stream(recorder.loop, sock, self, paused=True)}
        self._cancel: Callable[[], None] = lambda: None

    def dial(self) -> None:
        self._cancel = self._recorder.loop.dial(self._recorder.upstreams, self._dialled)

    def cut(self) -> None:
        self._cancel()
        self._close(reset=True)

    def flush(self, keeper: Keeper) -> None:
        """Hand over what was noted."""
        if self._steps:
            keeper.add(self._number, self._steps)
            self._steps, self._size = [], 0

    def heard(self, stream: Stream, data: bytes) -> None:
        who = self._who(stream)
        self._note(who, data)
        other = self._streams[OTHER[who]]
        other.send(data)
        if other.pending > BUFFER:
            stream.pause()

    def drained(self, stream: Stream) -> None:
        other = self._streams[OTHER[self._who(stream)]]
        if self._reset:
            self._close(reset=True)
        elif not other.closed:
            other.resume()
            self._settle()

    def ended(self, stream: Stream) -> None:
        who = self._who(stream)
        self._note(who, b"")
        self._streams[OTHER[who]].end()
        self._settle()

    def lost(self, stream: Stream, error: OSError) -> None:  # noqa: ARG002  a reset is a reset
        if self.dialling:
            self.cut()
            return
        who = self._who(stream)
        self._note(who, None)
        self._reset = True
        # what a side had said before its end is still delivered
        if not (stream.told and self._streams[OTHER[who]].pending):
            self._close(reset=True)

    def _dialled(self, found: socket.socket | OSError) -> None:
        recorder = self._recorder
        self.dialling = False
        if isinstance(found, OSError):
            recorder.unreachable += 1
            self._close(reset=False)
            return
        self._number = recorder.begun
        recorder.begun += 1
        if recorder.keeper:
            server = ""
            with contextlib.suppress(OSError):  # it has reset the connection already
                server = name_of(found.getpeername())
            start_us = (self._start_ns - recorder.first_ns) // 1000
            recorder.keeper.begin(self._number, start_us, self._peer, server)
        self._streams["server"] = Stream(recorder.loop, found, self)
        self._streams["client"].resume()
        recorder.accept()

    def _who(self, stream: Stream) -> Side:
        return "client" if stream is self._streams["client"] else "server"

    def _note(self, who: Side, data: bytes | None) -> None:
        """Data, an end (no bytes) or a reset (None)."""
        recorder = self._recorder
        if not recorder.keeper or self._reset:
            return
        when_us = (monotonic_ns() - self._start_ns) // 1000
        size = len(data or b"") + STEP_BYTES
        if size > recorder.room:
            recorder.stop_keeping("--most-bytes are kept")
            return
        recorder.room -= size
        what = "reset" if data is None else "data" if data else "end"
        self._steps.append(Step(when_us, who, what, data or b""))  # type: ignore[arg-type]  # one of the three
        self._size += size
        if self._size >= PART:
            self.flush(recorder.keeper)

    def _settle(self) -> None:
        """Close once both ends were passed on."""
        if all(stream.told and not stream.pending for stream in self._streams.values()):
            self._close(reset=False)

    def _close(self, *, reset: bool) -> None:
        recorder = self._recorder
        if self not in recorder.open:
            return
        for stream in self._streams.values():
            if reset:
                stream.reset()
            else:
                stream.close()
        recorder.open.discard(self)
        self.dialling = False
        if recorder.keeper and "server" in self._streams:
            self.flush(recorder.keeper)
            recorder.keeper.end(self._number)
        recorder.accept()
