"""Plays the servers of a recording for clients that say what was recorded.

Which conversation a client is in shows only from what it says. At first it is taken for the one that was
played least, the first recorded among equals; if the server speaks first there, it does so at once. If the
client then says or ends something else, the conversation is changed for one, in the same order, that
begins with everything said so far by both sides. If there is none, the client is unknown: it is reset, and told
of. A client that pauses where another conversation has the server speak is in that one.
So clients that say the same get the recorded answers in the order of recording, and a client has
to say every byte as recorded: another date, password or host name in it is another conversation.

A server's step comes as long after what was before it as it did when recorded, divided by the speed.
"""

import socket
from array import array
from collections.abc import Sequence
from time import monotonic
from typing import Any

import msgspec

from comparisons.recordings.clients import LOOK, SILENCE, Times
from comparisons.recordings.format import Recording
from comparisons.recordings.loop import Loop, Stream, name_of
from comparisons.recordings.script import CLIENT, DATA, END, RESET, SERVER, Script, alike
from services.core.session import Timeouts

UNKNOWN_KEPT = 100
# seconds of silence in which nobody is still sending the rest of what it had to say
PAUSE = 0.05


class Unknown(msgspec.Struct, frozen=True):
    """A client that said what nobody had said: who, and its first byte that no conversation has."""

    client: str
    offset: int


class Served(msgspec.Struct, frozen=True):
    """What came of it: connections played to their end, those that the client left before, and the unknown,
    of which the first hundred are kept. `lag` is how late the steps were.
    """

    connections: int
    played: int
    left: int
    unknown: int
    lag: Times | None
    strangers: list[Unknown]


class Servers:
    """`speed` 0 answers at once."""

    def __init__(
        self, recording: Recording, listeners: Sequence[socket.socket], *, speed: float = 1.0
    ) -> None:
        self.loop = Loop()
        self.speed = speed
        self.scripts = [Script(each, recording.first_us) for each in recording.conversations]
        self.plays = [0] * len(self.scripts)
        self.turns = [_turns(script) for script in self.scripts]
        self.lags = array("q")
        self.played = self.left = self.unknown = self.connections = 0
        self.strangers: list[Unknown] = []
        self.open: set[_Server] = set()
        self._listeners = listeners
        self._stopped = False

    def stop(self) -> None:
        """From any thread: accept no more, end once nobody is connected; called again, at once."""
        self.loop.post(self._stop)

    def run(self) -> Served:
        try:
            for listener in self._listeners:
                self.loop.listen(listener, self._accepted)
            self.loop.run(lambda: self._stopped and not self.open)
        finally:
            self.loop.close()
        return Served(
            self.connections, self.played, self.left, self.unknown, Times.of(self.lags), self.strangers
        )

    def guess(self) -> int:
        """The conversation that was played least, the first among equals; last those in which nothing is said."""
        silent = (not any(script.streams) for script in self.scripts)
        return min(zip(silent, self.plays, range(len(self.plays)), strict=True))[2]

    def find(self, said: bytes, answered: bytes, *, ended: bool = False, paused: bool = False) -> int | None:
        """The same, among those that begin like this, at best where the server speaks now, if `paused` only those;
        `ended`: in which the client says no more than this.
        """
        fitting = (
            (len(said) not in turns, plays, index)
            for index, (plays, turns, script) in enumerate(
                zip(self.plays, self.turns, self.scripts, strict=True)
            )
            if script.streams[CLIENT].startswith(said)
            and script.streams[SERVER].startswith(answered)
            and not (ended and len(script.streams[CLIENT]) > len(said))
            and not (paused and len(said) not in turns)
        )
        return min(fitting, default=(True, 0, None))[2]

    def _accepted(self, sock: socket.socket, peer: Any) -> None:
        self.connections += 1
        self.open.add(server := _Server(self, sock, name_of(peer)))
        server.begin()

    def _stop(self) -> None:
        for listener in self._listeners:
            if listener.fileno() >= 0:
                self.loop.watch(listener, 0, lambda _mask: None)
                listener.close()
        if self._stopped:
            self._cut()
        self._stopped = True
        self.loop.at(monotonic() + Timeouts().drain, self._cut)

    def _cut(self) -> None:
        for server in list(self.open):
            server.leave()


class _Server:
    """One connection."""

    def __init__(self, servers: Servers, sock: socket.socket, peer: str) -> None:
        self._servers, self._peer = servers, peer
        self._index = servers.guess()
        self._script = servers.scripts[self._index]
        servers.plays[self._index] += 1
        self._step = 0  # of both sides, the next to come
        self._said = self._answered = 0  # bytes of the client and ours
        self._fin = False  # our end was sent
        self._done_at = monotonic()  # when the step before it was due or came
        self._timed = -1  # the step for which a timer is set
        self._finished = False
        self._stream = Stream(servers.loop, sock, self)

    def begin(self) -> None:
        self._advance()

    def leave(self) -> None:
        self._stream.reset()
        self._finish(whole=False)

    def heard(self, stream: Stream, data: bytes) -> None:  # noqa: ARG002  there is one
        wanted = self._script.streams[CLIENT]
        so_far = wanted[: self._said] + data
        if not wanted.startswith(data, self._said) and not self._change(so_far):
            self._refuse(self._said + alike(data, wanted[self._said :]))
            return
        self._said += len(data)
        self._advance()

    def ended(self, stream: Stream) -> None:  # noqa: ARG002  as above
        wanted = self._script.streams[CLIENT]
        if len(wanted) > self._said:
            self._change(wanted[: self._said], ended=True)
        self._advance()

    def lost(self, stream: Stream, error: OSError) -> None:  # noqa: ARG002  as above
        kinds = self._script.kinds
        self._finish(whole=self._step < len(kinds) and kinds[self._step] == RESET)

    def drained(self, stream: Stream) -> None:
        if self._finished:
            stream.close()
            self._servers.open.discard(self)

    def _change(self, said: bytes, *, ended: bool = False, paused: bool = False) -> bool:
        """Take up another conversation that begins like this, if there is one."""
        servers = self._servers
        answered = self._script.streams[SERVER][: self._answered]
        index = servers.find(said, answered, ended=ended, paused=paused)
        if index is None:
            return False
        servers.plays[self._index] -= 1
        servers.plays[index] += 1
        self._index, self._script = index, servers.scripts[index]
        self._step = 0
        while self._step < len(self._script.kinds) and self._is_done(self._step):
            self._step += 1
        return True

    def _paused(self, said: int) -> None:
        """The client had said so much a while ago; if it has said no more, it may wait for an answer."""
        over = self._finished or self._stream.closed or self._stream.told
        if not over and said == self._said and self._change(self._script.streams[CLIENT][:said], paused=True):
            self._advance()

    def _is_done(self, step: int) -> bool:
        script, client = self._script, self._script.sides[step] == CLIENT
        if script.kinds[step] == DATA:
            return script.marks[step] <= (self._said if client else self._answered)
        return script.kinds[step] == END and (self._stream.told if client else self._fin)

    def _refuse(self, offset: int) -> None:
        servers = self._servers
        servers.unknown += 1
        servers.plays[self._index] -= 1
        if len(servers.strangers) < UNKNOWN_KEPT:
            servers.strangers.append(Unknown(self._peer, offset))
        self._stream.reset()
        servers.open.discard(self)

    def _finish(self, *, whole: bool) -> None:
        """The conversation is over; what is still to be sent is sent."""
        if self._finished:
            return
        self._finished = True
        self._servers.played += whole
        self._servers.left += not whole
        self._stream.end()
        if not self._stream.pending:
            self.drained(self._stream)

    def _due(self) -> None:
        self._timed = -1
        self._advance()

    def _advance(self) -> None:
        """Go on with the conversation as far as it is time and the client has come."""
        script, stream, servers = self._script, self._stream, self._servers
        while not stream.closed and self._step < len(script.kinds):
            step, now = self._step, monotonic()
            kind = script.kinds[step]
            if script.sides[step] == CLIENT:
                if not self._is_done(step):
                    if kind == DATA and self._said not in servers.turns[self._index]:
                        servers.loop.at(now + PAUSE, lambda said=self._said: self._paused(said))  # type: ignore[misc]  # mypy cannot infer it
                    break
                self._done_at = now
            else:
                gap = script.whens[step] - (script.whens[step - 1] if step else 0)
                due = self._done_at + (gap * 1e-6 / servers.speed if servers.speed else 0)
                if now < due:
                    if self._timed != step:
                        self._timed = step
                        servers.loop.at(due, self._due)
                    return
                if kind == RESET and stream.unheard and now < due + SILENCE:
                    servers.loop.at(now + LOOK, self._advance)
                    return
                servers.lags.append(round((now - due) * 1e6))
                self._done_at = due
                self._perform(step)
            self._step += 1
        left = self._step < len(script.kinds)
        if stream.closed or (stream.told and not left):
            self._finish(whole=not left)
        elif stream.told and script.sides[self._step] == CLIENT and script.kinds[self._step] != RESET:
            self._finish(whole=False)  # it has left before the recorded client did

    def _perform(self, step: int) -> None:
        kind, mark = self._script.kinds[step], self._script.marks[step]
        if kind == DATA:
            self._stream.send(self._script.streams[SERVER][self._answered : mark])
            self._answered = mark
        elif kind == END:
            self._fin = True
            self._stream.end()
        else:
            self._stream.reset()


def _turns(script: Script) -> frozenset[int]:
    """After how many bytes of the client the server does something."""
    said, turns = 0, set()
    for side, kind, mark in zip(script.sides, script.kinds, script.marks, strict=True):
        if side == SERVER:
            turns.add(said)
        elif kind == DATA:
            said = mark
    return frozenset(turns)
