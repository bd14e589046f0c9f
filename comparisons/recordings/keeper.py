"""The file of a recording while it is made: redacted, packed and written in a thread of its own, so that
neither an expression nor a disk holds up traffic.

Every part is written as soon as it is known, in one call, so a recorder that is killed leaves a file in
which all but the last moments can be read. What is held back for redaction is never on disk.
"""

import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from comparisons.recordings.format import Begun, End, Header, More, Part, Side, Step, pack
from comparisons.recordings.redaction import Redactor


class File(Protocol):
    def write(self, data: memoryview, /) -> int: ...


class Keeper:
    """Keeps conversations in `file`, which is not buffered. `failure` is the first error of it; after that nothing is
    kept. Use as a context manager: leaving it writes what is left, and the end.
    """

    def __init__(
        self,
        file: File,
        header: Header,
        patterns: Sequence[re.Pattern[bytes]] = (),
    ) -> None:
        self._file, self._header = file, header
        self._patterns = patterns
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[int, _Kept] = {}
        self.failure: OSError | None = None
        self._thread = threading.Thread(target=self._run)
        self.count = 0
        self.bytes: dict[Side, int] = {"client": 0, "server": 0}
        self.redacted = [0] * len(patterns)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._thread.join()

    def begin(self, number: int, start_us: int, client: str, server: str) -> None:
        self._queue.put(lambda: self._begin(number, start_us, client, server))

    def add(self, number: int, steps: list[Step]) -> None:
        self._queue.put(lambda: self._open[number].add(steps))

    def end(self, number: int) -> None:
        self._queue.put(lambda: self._end(number))

    def finish(self) -> None:
        """Nothing more will be given to keep: end what is open, and the file. Does not wait."""
        self._queue.put(None)

    def _run(self) -> None:
        self._write(self._header)
        while (call := self._queue.get()) is not None:
            call()
        for number in list(self._open):
            self._end(number)
        self._write(End(self.count))

    def _begin(self, number: int, start_us: int, client: str, server: str) -> None:
        redactors = {side: Redactor(self._patterns) for side in self.bytes} if self._patterns else {}
        self._open[number] = _Kept(self._write, Begun(number, start_us, client, server, []), redactors)
        self.count += 1

    def _end(self, number: int) -> None:
        kept = self._open.pop(number)
        kept.end()
        for side in self.bytes:
            self.bytes[side] += kept.bytes[side]
        for redactor in kept.redactors.values():
            self.redacted = [sum(each) for each in zip(self.redacted, redactor.count, strict=True)]

    def _write(self, part: Part) -> None:
        data = memoryview(pack(part))
        try:
            while data and not self.failure:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.failure = error


class _Kept:
    """One conversation, of which some steps may still wait for their bytes to be redacted."""

    def __init__(self, write: Callable[[Part], None], begun: Begun, redactors: dict[Side, Redactor]) -> None:
        self.redactors = redactors
        self.bytes: dict[Side, int] = {"client": 0, "server": 0}
        self._write, self._begun = write, begun
        self._part = 0
        self._waiting: deque[Step] = deque()
        self._decided: dict[Side, bytearray] = {"client": bytearray(), "server": bytearray()}

    def add(self, steps: list[Step]) -> None:
        for step in steps:
            self.bytes[step.who] += len(step.data)
        if not self.redactors:
            self._keep(steps)
            return
        for step in steps:
            self._waiting.append(step)
            self._decided[step.who] += self.redactors[step.who].feed(step.data)
        self._release()

    def end(self) -> None:
        for side, redactor in self.redactors.items():
            self._decided[side] += redactor.end()
        self._release()
        if not self._part:
            self._keep([])

    def _release(self) -> None:
        """Keep the steps of which every byte is decided; those after them wait, to stay in order."""
        ready = []
        while self._waiting and len(self._waiting[0].data) <= len(self._decided[self._waiting[0].who]):
            step = self._waiting.popleft()
            decided = self._decided[step.who]
            ready.append(Step(step.when_us, step.who, step.what, bytes(decided[: len(step.data)])))
            del decided[: len(step.data)]
        if ready:
            self._keep(ready)

    def _keep(self, steps: list[Step]) -> None:
        begun = self._begun
        if self._part:
            self._write(More(begun.number, self._part, steps))
        else:
            self._write(Begun(begun.number, begun.start_us, begun.client, begun.server, steps))
        self._part += 1
