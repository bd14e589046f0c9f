"""The sessions of an engine by deadline: a heap, armed lazily.

A moved byte puts a session's deadline off without touching the heap; when the old one comes up, the
session finds nothing to do and is armed anew. Only an earlier deadline is pushed at once.
"""

import heapq
import itertools
from collections.abc import Callable

from services.core.session import Session

NEVER = float("inf")
# Entries of sessions that ended, or were armed earlier since, are swept when they outnumber the others.
_SWEEP_FLOOR = 256


class Deadlines:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Session]] = []
        self._armed: dict[Session, float] = {}
        self._order = itertools.count()

    def arm(self, session: Session) -> bool:
        """Make sure that `session` comes up by its deadline. True if it is now the next of all."""
        due = session.deadline()
        if due >= self._armed.get(session, NEVER):
            return False
        self._armed[session] = due
        if len(self._heap) > 2 * len(self._armed) + _SWEEP_FLOOR:
            self._heap = [(when, next(self._order), each) for each, when in self._armed.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (due, next(self._order), session))
        return self._heap[0][2] is session

    def forget(self, session: Session) -> None:
        self._armed.pop(session, None)

    def next(self) -> float:
        """When the first entry comes up; it may turn out to be an old one."""
        return self._heap[0][0] if self._heap else NEVER

    def pop(self, now: float) -> Session | None:
        """A session whose deadline has come; it must be armed again. None when there is no further."""
        while self._heap and self._heap[0][0] <= now:
            when, _, session = heapq.heappop(self._heap)
            if self._armed.get(session) == when:
                del self._armed[session]
                return session
        return None


class Later:
    """Calls that are due at a moment of their own. Not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def call(self, at: float, function: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (at, next(self._order), function))

    def next(self) -> float:
        return self._heap[0][0] if self._heap else NEVER

    def pop(self, now: float) -> Callable[[], object] | None:
        """A call whose time has come; None when there is no further."""
        return heapq.heappop(self._heap)[2] if self.next() <= now else None
