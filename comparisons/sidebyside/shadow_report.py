"""What a shadow says: a log line for each session, and the table of them all.

The lines have the envelope of the daemons' log (services/vocabulary.py) with the engine "-", since the tee
is none. `shadow_compared` is one for each session, flat: what is told of an engine stands in fields that
begin with its name, and `control_` is the second copy of the answering engine. `shadow_stopped` is the
last line, with the totals.

Fields of each engine, null where there is nothing to say:

- `verdict`: `answer` for the engine that answered; else `same`, `different`, `noise` (it differs, but only
  where the control does too), `detached`, `refused` (it could not be connected to), or `cut` (no difference
  as far as it was compared: the client's reset, or the end of the run, came before its end);
- `differences`: how many lines differ, noise included (streams.py says what a line is); `difference`: the
  kind of the first one that is no noise: `bytes`, `shorter`, `longer` or `ending`; `offset` in the answering
  engine's stream and `other_offset` in this one; `expected` and `actual`: the bytes there, or the endings;
- `bytes` of its answer; `ended`: `fin`, `rst`, `timeout`, `behind` and `ahead` (detached), `refused`, `cut`;
  `closing`: F the client's FIN was passed on to it, f its own FIN came, r its reset. The order is a matter of
  time as well, and so is never a difference by itself;
- `first_byte_us` from accepting the client to the first byte of this answer, `max_gap_us` the longest time
  between two reads of it: figures, never a difference.

`session` is the session's id, and the `pair` of the four lines that the engines' own logs have of it. The tee
tells each engine so in a PROXY header, with the client's address.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from comparisons.sidebyside.shadow_settings import CONTROL
from comparisons.sidebyside.streams import END, Judgement, Verdict, judge
from comparisons.sidebyside.tee import Answer, Session
from comparisons.units import microseconds
from services.config import ENGINES
from services.vocabulary import Count, Event, Microseconds

if TYPE_CHECKING:
    from rich.table import Table

NAMES = (*ENGINES, CONTROL)
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)
# differences that the summary shows in full
SHOWN = 5

_OF_EACH: dict[str, Any] = {
    "verdict": Literal["answer", "same", "different", "noise", "detached", "refused", "cut"],
    "differences": Count | None,
    "difference": Literal["bytes", "shorter", "longer", "ending"] | None,
    "offset": Count | None,
    "other_offset": Count | None,
    "expected": str | None,
    "actual": str | None,
    "bytes": Count,
    "ended": Literal["fin", "rst", "refused", "timeout", "behind", "ahead", "cut"],
    "closing": str,
    "first_byte_us": Microseconds | None,
    "max_gap_us": Microseconds,
}


def _event(name: str, event: str, fields: Sequence[tuple[str, Any]]) -> type[Event]:
    made = msgspec.defstruct(
        name, fields, bases=(Event,), namespace={"NAME": event}, module=__name__, frozen=True, kw_only=True
    )
    return cast("type[Event]", made)


ShadowCompared = _event(
    "ShadowCompared",
    "shadow_compared",
    [
        ("session", str),
        ("client_ip", str | None),
        ("client_port", Count | None),
        ("bytes_c2s", Count),
        ("duration_us", Microseconds),
        *((f"{name}_{field}", kind) for name in NAMES for field, kind in _OF_EACH.items()),
    ],
)
ShadowStopped = _event(
    "ShadowStopped",
    "shadow_stopped",
    [
        ("sessions", Count),
        ("sessions_cut", Count),
        *((f"{name}_{each}", Count) for name in NAMES for each in JUDGEMENTS),
    ],
)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A difference that is no noise; the offsets are null where only the endings differ."""

    session: str
    name: str
    kind: str
    offset: int | None
    other_offset: int | None
    expected: str
    actual: str


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds, to two digits."""

    p50: int
    p99: int
    max: int


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One engine; the answering one has no verdicts."""

    name: str
    engine: str
    upstream: str
    answers: bool
    verdicts: dict[str, int]
    bytes: int
    first_byte_us: Times | None
    max_gap_us: Times | None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints: version 1 of that format. `cut`: clients that the end of the run reset.
    `differences` are the first ones.
    """

    version: int = 1
    addresses: list[str]
    seconds: float
    sessions: int
    cut: int
    engines: list[Told]
    differences: list[Found]


class _Tally:
    """One engine's sessions so far."""

    def __init__(self) -> None:
        self.verdicts: Counter[Judgement] = Counter()
        self.bytes = 0
        # microseconds, to two digits: how many sessions. A shadow may run for months, and where only its log is
        # wanted it runs without the extra that would bring a histogram.
        self.first_byte: Counter[int] = Counter()
        self.max_gap: Counter[int] = Counter()

    def add(self, answer: Answer) -> None:
        self.bytes += answer.received
        if answer.first_byte is not None:
            self.first_byte[_two_digits(answer.first_byte // 1000)] += 1
        if answer.max_gap:
            self.max_gap[_two_digits(answer.max_gap // 1000)] += 1


class Account:
    """All sessions so far. `names` gives the engine and the upstream of each, the answering one first."""

    def __init__(self, names: Mapping[str, tuple[str, str]]) -> None:
        self._names = names
        self._tallies = {name: _Tally() for name in names}
        self._found: list[Found] = []
        self.sessions = 0

    def add(self, session: Session) -> Event:
        """Counts it, and tells of it."""
        self.sessions += 1
        answering, *others = session.answers
        assert answering.ended is not None
        fields: dict[str, Any] = _facts(answering, "answer", None)
        control = next(each for each in others if each.target.name == CONTROL)
        self._tallies[answering.target.name].add(answering)
        for each in others:
            assert each.comparison is not None
            assert each.ended is not None
            assert control.comparison is not None
            assert control.ended is not None
            verdict = judge(
                answering.ended,
                (each.comparison, each.ended),
                None if each is control else (control.comparison, control.ended),
            )
            fields.update(_facts(each, verdict.judgement, verdict))
            tally = self._tallies[each.target.name]
            tally.add(each)
            tally.verdicts[verdict.judgement] += 1
            if verdict.judgement == "different" and verdict.difference and len(self._found) < SHOWN:
                first = verdict.difference
                known = first.offset != END
                self._found.append(
                    Found(
                        session=session.id,
                        name=each.target.name,
                        kind=first.kind,
                        offset=first.offset if known else None,
                        other_offset=first.other_offset if known else None,
                        expected=first.expected,
                        actual=first.actual,
                    )
                )
        return ShadowCompared(
            session=session.id,
            client_ip=session.peer.host if session.peer else None,
            client_port=session.peer.port if session.peer else None,
            bytes_c2s=session.received,
            duration_us=session.duration // 1000,
            **fields,
        )

    def stopped(self, cut: int) -> Event:
        counts = {
            f"{name}_{each}": self._tallies[name].verdicts[each] for name in NAMES for each in JUDGEMENTS
        }
        return ShadowStopped(sessions=self.sessions, sessions_cut=cut, **counts)

    def results(self, addresses: list[str], seconds: float, cut: int) -> Results:
        engines = [
            Told(
                name=name,
                engine=engine,
                upstream=upstream,
                answers=number == 0,
                verdicts={} if number == 0 else {each: tally.verdicts[each] for each in JUDGEMENTS},
                bytes=tally.bytes,
                first_byte_us=_times(tally.first_byte),
                max_gap_us=_times(tally.max_gap),
            )
            for number, (name, (engine, upstream)) in enumerate(self._names.items())
            for tally in [self._tallies[name]]
        ]
        return Results(
            addresses=addresses,
            seconds=round(seconds, 1),
            sessions=self.sessions,
            cut=cut,
            engines=engines,
            differences=self._found,
        )


def _facts(answer: Answer, verdict: str, judged: Verdict | None) -> dict[str, Any]:
    """The fields of one engine."""
    first = judged.difference if judged else None
    known = first is not None and first.offset != END
    facts = {
        "verdict": verdict,
        "differences": judged.differences if judged else None,
        "difference": first.kind if first else None,
        "offset": first.offset if first and known else None,
        "other_offset": first.other_offset if first and known else None,
        "expected": first.expected if first else None,
        "actual": first.actual if first else None,
        "bytes": answer.received,
        "ended": answer.ended,
        "closing": answer.closing,
        "first_byte_us": None if answer.first_byte is None else answer.first_byte // 1000,
        "max_gap_us": answer.max_gap // 1000,
    }
    return {f"{answer.target.name}_{field}": value for field, value in facts.items()}


def _two_digits(number: int) -> int:
    unit: int = 10 ** max(len(str(number)) - 2, 0)
    return number // unit * unit


def _times(counts: Counter[int]) -> Times | None:
    if not counts:
        return None
    values = sorted(counts)
    # how many sessions took as long as that, or less
    upto = list(accumulate(counts[value] for value in values))
    p50, p99 = (values[bisect_left(upto, upto[-1] * part)] for part in (0.50, 0.99))
    return Times(p50=p50, p99=p99, max=values[-1])


def table(results: Results) -> "Table":
    """The engines side by side, the answering one first, in 80 columns; --json has the rest."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  a shadow without a terminal needs no extra
    from rich.table import Table  # noqa: PLC0415  as above
    from rich.text import Text  # noqa: PLC0415  as above

    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    made.add_column("", no_wrap=True)
    for column in (*JUDGEMENTS, "first byte\np50", "\np99"):
        made.add_column(column, justify="right", no_wrap=True)
    for told in results.engines:
        verdicts = [
            Text(f"{count:,}" if count else "-", style=_style(each) if count else "dim")
            for each, count in told.verdicts.items()
        ]
        if told.answers:
            verdicts = [Text("answers"), *[Text()] * (len(JUDGEMENTS) - 1)]
        first = told.first_byte_us
        times = [microseconds(first.p50), microseconds(first.p99)] if first else ["-", "-"]
        made.add_row(told.name, *verdicts, *times)
    return made


def summary(results: Results) -> str:
    """The line above the table."""
    cut = f", {results.cut:,} of them cut at the end" if results.cut else ""
    return f"{results.sessions:,} sessions{cut}, in {results.seconds:,} s on {', '.join(results.addresses)}\n"


def described(found: Found) -> str:
    """One difference, below the table."""
    where = f"{found.kind} at offset {found.offset:,}" if found.offset is not None else "another ending"
    if found.other_offset is not None and found.other_offset != found.offset:
        where += f" (its own {found.other_offset:,})"
    return (
        f"\n{found.name}, session {found.session}: {where}\n"
        f"  expected  {found.expected}\n  actual    {found.actual}"
    )


def _style(judgement: str) -> str:
    return {"different": "red", "detached": "yellow", "refused": "yellow"}.get(judgement, "")
