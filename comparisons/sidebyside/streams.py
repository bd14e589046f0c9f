"""Comparing reply streams: where another engine's bytes first differ from the answering engine's.

Pure: bytes in, differences out; no socket and no clock. How the bytes were cut into chunks never changes
what is found, and what is kept is what the other side has not matched yet, so the caller bounds it by
`behind` and `ahead`.

The unit is the line: what ends with a newline, or 8 KiB of a line that is longer, or what is left at the
end of the stream. Lines that are equal are passed over by the block. A line that is not is held until both
sides have all of it, since

- normalisers see one whole line at a time, so a match never reaches over a newline nor over 8 KiB; lines
  are equal if they are equal once every match is replaced;
- after a line that differs the comparison goes on with the next one of both sides, so that a date in one
  line does not hide what comes later. Text falls into step again; what never does stops being compared at
  its thousandth line, or where one side ends.

Offsets are of the original streams, before any replacement.

Noise is what two processes of the same engine differ in: a line in which the control, a second copy of the
answering engine, differs from it in the same session. A difference of another engine in that very line is
noise. A control that differs in a thousand lines tells nothing of what comes after them: all of that is
noise. A control that was detached, or ended early, makes no noise after its end.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

# RFC 9112 asks servers for request lines of 8,000 bytes; a header line is not longer in practice
LINE = 8192
# differing lines told of one stream; then it is out of step for good
KEPT = 1000
# what of a stream is shown around a difference
BEFORE, AFTER = 16, 16
# a replacement that no protocol says by itself
REPLACEMENT = b"<*>"
# where the ends of the streams differ, beyond all lines
END = -1

_BLOCK = 4096

# fin, rst: what the engine sent. refused: no connection to it. timeout: it had not ended when its patience
# was over. behind, ahead: it was detached. cut: we ended it, for the client's reset or the end of the run.
Ended = Literal["fin", "rst", "refused", "timeout", "behind", "ahead", "cut"]
# bytes: the first byte that is another one. shorter, longer: it ends before, or goes on after, the
# answering engine's. ending: the same bytes, ended in another way.
Kind = Literal["bytes", "shorter", "longer", "ending"]
Judgement = Literal["same", "different", "noise", "detached", "refused", "cut"]


class Normaliser(NamedTuple):
    """What is replaced before lines are compared; a match of no bytes is none."""

    pattern: re.Pattern[bytes]
    text: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """`REGEX` or `REGEX=>TEXT`, the last arrow counts. ValueError with one line."""
        expression, arrow, replacement = text.rpartition("=>")
        if not arrow:
            expression, replacement = text, REPLACEMENT.decode()
        if not expression:
            raise ValueError(f"{text!r}: an expression is needed, as in 'Date: .*'")
        try:
            return cls(re.compile(expression.encode()), replacement.encode())
        except re.error as error:
            raise ValueError(f"{expression!r}: not a regular expression: {error}") from error


class Difference(NamedTuple):
    """`line` and `offset` count from the start of the answering engine's stream, `other_offset` from the
    start of the other one; `expected` and `actual` show the bytes there, at most to the end of the line.
    """

    kind: Kind
    line: int
    offset: int
    other_offset: int
    expected: str
    actual: str


class _Stream:
    """One side, from the start of its first line that is not done."""

    __slots__ = ("before", "ended", "held", "offset", "whole")

    def __init__(self) -> None:
        self.held = bytearray()
        self.offset = 0
        self.before = b""  # the last bytes that are done
        self.ended = False
        self.whole = True  # whether the end is known, or was cut off

    def drop(self, count: int) -> None:
        self.before = (self.before + self.held[max(0, count - BEFORE) : count])[-BEFORE:]
        del self.held[:count]
        self.offset += count

    def line_end(self) -> int | None:
        """How long the first line is; None as long as that is not known."""
        end = self.held.find(b"\n", 0, LINE) + 1
        if end or len(self.held) >= LINE:
            return end or LINE
        return len(self.held) if self.ended else None

    def show(self, at: int, line: int) -> str:
        """The bytes around position `at` of the first line, which is `line` long."""
        return hexdump(self.before + self.held[:line], self.offset - len(self.before), self.offset + at)


class Comparison:
    """One stream against the answering engine's, both as they arrive."""

    def __init__(self, normalisers: Sequence[Normaliser] = ()) -> None:
        self._normalisers = normalisers
        self._ours, self._theirs = _Stream(), _Stream()
        self._over = False
        self.differences: list[Difference] = []

    @property
    def behind(self) -> int:
        """Bytes of the answering engine that are kept until the other one has matched them."""
        return len(self._ours.held)

    @property
    def ahead(self) -> int:
        """Bytes of the other one that are kept until the answering engine has matched them."""
        return len(self._theirs.held)

    @property
    def over(self) -> bool:
        """Nothing more will be found: what comes need not be read."""
        return self._over

    @property
    def horizon(self) -> int | None:
        """From which line on nothing more is told, if there are too many."""
        return self.differences[-1].line if len(self.differences) == KEPT else None

    def answer(self, data: bytes) -> None:
        """More of the answering engine's stream."""
        self._feed(self._ours, data)

    def reply(self, data: bytes) -> None:
        """More of the other one's."""
        self._feed(self._theirs, data)

    def end_answer(self, *, whole: bool) -> None:
        """The answering engine's stream has ended; `whole` unless its end was cut off."""
        self._end(self._ours, whole)

    def end_reply(self, *, whole: bool) -> None:
        """The other one's has ended."""
        self._end(self._theirs, whole)

    def _feed(self, stream: _Stream, data: bytes) -> None:
        if not self._over:
            stream.held += data
            self._advance()

    def _end(self, stream: _Stream, whole: bool) -> None:
        if not stream.ended:
            stream.ended, stream.whole = True, whole
            if not self._over:
                self._advance()

    def _advance(self) -> None:
        """Judge every line that both sides have."""
        ours, theirs = self._ours, self._theirs
        while not self._over:
            shorter, longer = sorted((ours.held, theirs.held), key=len)
            common = len(shorter)
            same = common if longer.startswith(shorter) else first_difference(shorter, longer)
            # whole lines that are equal
            line = shorter.rfind(b"\n", 0, same) + 1
            done = line + (same - line) // LINE * LINE
            if done:
                ours.drop(done)
                theirs.drop(done)
            if same == common and not self._one_goes_on():
                # of one that was cut off, all has been matched
                if any(
                    stream.ended and not stream.whole and len(stream.held) == common
                    for stream in (ours, theirs)
                ):
                    self._finish()
                return
            ends = ours.line_end(), theirs.line_end()
            if ends[0] is None or ends[1] is None:
                return
            self._judge(ends[0], ends[1])

    def _one_goes_on(self) -> bool:
        """Whether one side has ended and the other one has more."""
        ours, theirs = self._ours, self._theirs
        return (ours.ended and ours.whole and len(theirs.held) > len(ours.held)) or (
            theirs.ended and theirs.whole and len(ours.held) > len(theirs.held)
        )

    def _judge(self, our_end: int, their_end: int) -> None:
        """The first lines, which are not the same bytes."""
        ours, theirs = self._ours, self._theirs
        our_line, their_line = bytes(ours.held[:our_end]), bytes(theirs.held[:their_end])
        our_last, their_last = (
            stream.ended and end == len(stream.held) and end < LINE and not line.endswith(b"\n")
            for stream, end, line in ((ours, our_end, our_line), (theirs, their_end, their_line))
        )
        our_origins, their_origins = list(range(our_end + 1)), list(range(their_end + 1))
        if (our_last and not ours.whole) or (their_last and not theirs.whole):
            # what was cut off might have made a match of it
            self._over = True
            if self._normalisers or first_difference(our_line, their_line) == min(our_end, their_end):
                self._finish()
                return
        for normaliser in self._normalisers:
            our_line, our_origins = replace(our_line, our_origins, normaliser)
            their_line, their_origins = replace(their_line, their_origins, normaliser)
        if our_line != their_line:
            at = first_difference(our_line, their_line)
            kind: Kind = "bytes"
            if at == len(our_line) and our_last:
                kind = "longer"
            elif at == len(their_line) and their_last:
                kind = "shorter"
            our_at, their_at = our_origins[at], their_origins[at]
            self.differences.append(
                Difference(
                    kind,
                    ours.offset,
                    ours.offset + our_at,
                    theirs.offset + their_at,
                    ours.show(our_at, our_end),
                    theirs.show(their_at, their_end),
                )
            )
            # where one side is at its end, all the rest of the other one is this same difference
            self._over = self._over or kind != "bytes" or len(self.differences) == KEPT
        if self._over:
            self._finish()
        else:
            ours.drop(our_end)
            theirs.drop(their_end)

    def _finish(self) -> None:
        """Nothing more can be found."""
        self._over = True
        self._ours.held.clear()
        self._theirs.held.clear()


def replace(line: bytes, origins: list[int], normaliser: Normaliser) -> tuple[bytes, list[int]]:
    """The line with all matches replaced, and where each of its bytes (and its end) came from. A match
    begins, as a whole, where it began.
    """
    text = normaliser.text
    replaced, came_from, at = bytearray(), list[int](), 0
    for match in normaliser.pattern.finditer(line):
        start, end = match.span()
        if start < end:
            replaced += line[at:start] + text
            came_from += origins[at:start] + [origins[start]] * len(text)
            at = end
    return bytes(replaced + line[at:]), came_from + origins[at:]


def first_difference(one: bytes | bytearray, other: bytes | bytearray) -> int:
    """Where the first byte is that differs; the shorter one's length if there is none."""
    most = min(len(one), len(other))
    for start in range(0, most, _BLOCK):
        end = min(start + _BLOCK, most)
        mine, yours = one[start:end], other[start:end]
        if mine != yours:
            return next(start + at for at in range(end - start) if mine[at] != yours[at])
    return most


def hexdump(data: bytes | bytearray, offset: int, at: int) -> str:
    """The bytes around offset `at`, whose own is in brackets; `data` begins at `offset`. One line of ASCII."""
    start = max(offset, at - BEFORE)
    shown = data[start - offset : at - offset + AFTER]
    codes = [f"{byte:02x}" for byte in shown]
    if at - start < len(codes):
        codes[at - start] = f"[{codes[at - start]}]"
    else:
        codes.append("[end]")
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
    return f"{start:08x}  {' '.join(codes)}  |{text}|"


class Verdict(NamedTuple):
    """`difference` is the first one that is no noise, else the first one; `differences` counts the lines."""

    judgement: Judgement
    difference: Difference | None
    differences: int


def judge(
    answer_ended: Ended, other: tuple[Comparison, Ended], control: tuple[Comparison, Ended] | None
) -> Verdict:
    """What became of one stream, with its way of ending. The control's own differences are noise, and
    there is no control for it.
    """
    comparison, ended = other
    found = list(_all(answer_ended, comparison, ended))
    own = found
    if control is None:
        own = []
    else:
        noisy = {difference.line for difference in _all(answer_ended, *control)}
        horizon = control[0].horizon
        own = [
            difference
            for difference in found
            if difference.line not in noisy and (horizon is None or difference.line < horizon)
        ]
    first = next(iter([*own, *found]), None)
    judgement: Judgement = "same"
    if ended == "refused":
        judgement = "refused"
    elif own:
        judgement = "different"
    elif ended in {"behind", "ahead"}:
        judgement = "detached"
    elif found:
        judgement = "noise"
    elif ended == "cut" or answer_ended in {"cut", "refused"}:
        judgement = "cut"
    return Verdict(judgement, first, len(found))


def _all(answer_ended: Ended, comparison: Comparison, ended: Ended) -> list[Difference]:
    """The differences of the lines and, where both ends are known, of the ends."""
    known = answer_ended in {"fin", "rst"} and ended in {"fin", "rst", "timeout"}
    if not known or ended == answer_ended:
        return comparison.differences
    return [*comparison.differences, Difference("ending", END, END, END, answer_ended, ended)]
