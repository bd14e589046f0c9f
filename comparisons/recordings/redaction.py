"""Overwriting what must not be kept, before anything of it is written.

Every match of a regular expression over bytes is overwritten with `x`, byte for byte, so that lengths
which a protocol states elsewhere stay true. Matches are looked for in the stream of one direction,
whatever chunks it came in: the stream is decided in blocks at fixed offsets, each seen with `REACH` bytes
before it and after it, so the result depends on the stream alone. A match is found for certain if it is,
with all that its expression looks at, no longer than `REACH`; of a longer one a part may stay.

So up to a block and `REACH` bytes are held back until more of the stream has come, or its end.
"""

import re
from collections.abc import Sequence

REACH = 4096  # bytes; longer than any header line or password that is worth a name
OVERWRITTEN = b"x"


class Redactor:
    """One direction of one conversation. `block` and `reach` are smaller in tests."""

    def __init__(
        self, patterns: Sequence[re.Pattern[bytes]], *, block: int = REACH, reach: int = REACH
    ) -> None:
        self._patterns = patterns
        self._block, self._reach = block, reach
        self._window = bytearray()  # from `_first` of the stream on
        self._first = 0
        self._decided = 0  # up to here the matches are known
        self._handed = 0  # up to here the stream was handed out
        self._free = [0] * len(patterns)  # where the next match of each may begin
        self._marked: list[tuple[int, int]] = []  # matches that reach beyond what is decided
        self.count = [0] * len(patterns)

    def feed(self, data: bytes) -> bytes:
        """What is decided now of the stream so far; the rest comes later."""
        self._window += data
        length = self._first + len(self._window)
        while self._decided + self._block + self._reach <= length:
            self._decide(self._decided + self._block + self._reach)
        return self._hand_out(self._decided)

    def end(self) -> bytes:
        """The rest: nothing follows."""
        length = self._first + len(self._window)
        while self._decided < length:
            self._decide(min(self._decided + self._block + self._reach, length))
        return self._hand_out(length)

    def _decide(self, seen: int) -> None:
        """Find the matches that begin in the next block, as it looks with the stream up to `seen`."""
        first = max(self._decided - self._reach, 0)
        until = self._decided + self._block
        view = bytes(self._window[first - self._first : seen - self._first])
        for number, pattern in enumerate(self._patterns):
            for match in pattern.finditer(view, max(self._free[number], self._decided) - first):
                begin, end = match.start() + first, match.end() + first
                if begin >= until:
                    break
                if begin < end:
                    self.count[number] += 1
                    self._marked.append((begin, end))
                    self._free[number] = end
        self._decided = min(until, seen)

    def _hand_out(self, until: int) -> bytes:
        handed = bytearray(self._window[self._handed - self._first : until - self._first])
        for begin, end in self._marked:
            low, high = max(begin, self._handed), min(end, until)
            if low < high:
                handed[low - self._handed : high - self._handed] = OVERWRITTEN * (high - low)
        self._marked = [each for each in self._marked if each[1] > until]
        self._handed = until
        kept = max(until - self._reach, self._first)
        del self._window[: kept - self._first]
        self._first = kept
        return bytes(handed)
