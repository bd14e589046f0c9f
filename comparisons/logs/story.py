"""One session told from its log lines: in words, on a timeline, and what the log does not know of it.

Every sentence rests on a field of the session's lines or on a line of its process while it was open. A
moment stands on the timeline where the log has its time; what is only known as a sum (pauses, the longest
silence) is told beside it and put nowhere.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from comparisons.logs.reader import Logs
from comparisons.logs.show import duration
from comparisons.logs.summary import timestamp
from services.core.service import STALL

Row = Mapping[str, Any]

LETTERS = {
    "S": "the client's SYN",
    "h": "our handshake",
    "D": "data from the client",
    "d": "data to the client",
    "F": "the client's FIN",
    "f": "our FIN",
    "R": "the client's reset",
    "r": "our reset",
}
CAUSES = {
    "-": "nobody broke it off",
    "C": "the client broke it off",
    "S": "the upstream broke it off",
    "P": "a limit or list refused it",
    "R": "we ran out of a resource",
    "I": "a bug of ours cut it",
    "D": "the upstream was taken for down",
    "K": "the operator, the drain's deadline or a fault on purpose cut it",
    "c": "the client's side was silent for too long",
    "s": "the upstream's side was silent for too long",
}
PHASES = {
    "Q": "while an upstream was chosen",
    "C": "while we connected to the upstream",
    "D": "while bytes were relayed",
    "L": "after one side had ended",
    "-": "complete",
}
STATES = {
    "SF": "ended in order",
    "S0": "never answered",
    "S1": "still open",
    "S2": "still open, the client has ended",
    "S3": "still open, the upstream has ended",
    "RSTO": "reset by the client",
    "RSTR": "reset by us",
    "REJ": "refused",
}
# a tenth of what the engine itself calls a stall
LATE_US = int(STALL * 1_000_000) // 10
# lines of a process that touch every session it has open
AROUND = (
    "engine_stalled",
    "engine_fault",
    "listener_paused",
    "faults_changed",
    "config_reloaded",
    "upstream_down",
    "upstream_up",
    "log_dropped",
    "service_draining",
    "service_stopped",
)
PROCESS = ("engine", "instance", "pid", "worker")


class Moment(Struct, frozen=True):
    """`after_us` is from accept; what lies before it is negative."""

    after_us: int
    what: str


class Story(Struct, frozen=True, kw_only=True):
    session: str
    engine: str
    opened: str
    told: list[str]
    timeline: list[Moment]
    history: list[tuple[str, str]]
    state: str | None
    unknown: list[str]


def tell(logs: Logs, session: str) -> Story | None:
    """The story of this session; None if no line tells of it."""
    known = logs.lines.filter(logs.lines.kind == "known")
    lines = logs.rows(known.filter(known.session == session).order_by("at_us", "seq"))
    of_session = [line for line in lines if line["event"].startswith("session_")]
    if not of_session:
        return None
    # the fullest: it ended, or this is how far it was
    last = next((line for line in of_session if line["event"] == "session_closed"), of_session[-1])
    opened_us = last["at_us"] - (last["duration_us"] or 0)
    same = [known[name] == last[name] for name in PROCESS if last[name] is not None]
    during = known.filter(
        [*same, known.event.isin(AROUND), known.at_us >= opened_us, known.at_us <= last["at_us"]]
    )
    around = logs.rows(during.order_by("at_us", "seq"))
    paired = []
    if last["pair"] is not None:
        sessions = logs.sessions.filter(
            (logs.sessions.pair == last["pair"]) & (logs.sessions.session != session)
        )
        paired = logs.rows(sessions.order_by("engine", "at_us"))
    timeline = sorted(
        (*_moments(last), *_progress(of_session, opened_us), *_around(around, last, opened_us)),
        key=lambda moment: moment.after_us,
    )
    return Story(
        session=session,
        engine=last["engine"],
        opened=str(timestamp(opened_us)),
        told=[*_told(last), *_pairs(last, paired)],
        timeline=timeline,
        history=[(letter, LETTERS.get(letter, "not one of ours")) for letter in last["history"] or ""],
        state=last["state"],
        unknown=list(_unknown(last)),
    )


def ending(line: Row) -> str:
    """How it ended, in words: the two letters of `termination`, who, and the errno."""
    letters = line["termination"]
    if letters is None:
        is_closed = line["event"] == "session_closed"
        return "How it ended is not told." if is_closed else "It has not ended in this log."
    if letters == "--":
        if line["transport"] == "udp":
            return "It was forgotten after a silence, as UDP sessions are."
        first = {"client": "the client's end came first", "upstream": "the upstream's end came first"}
        return f"It ended in order; {first.get(line['closed_by'] or '', 'who ended first is not told')}."
    cause, phase = CAUSES.get(letters[0], "cause unknown"), PHASES.get(letters[1], "phase unknown")
    if letters == "SC":
        cause = "the upstream could not be reached"
    return f"{cause[0].upper()}{cause[1:]}, {phase}{_errno(line['error'])}."


def _errno(name: str | None) -> str:
    if name is None:
        return ""
    number = getattr(errno, name, None)
    return f": {name}, {os.strerror(number).lower()}" if number else f": {name}"


def _told(line: Row) -> Iterator[str]:
    yield f"{_client(line)} came to {_place(line)}."
    if line["accept_wait_us"] is not None:
        waited = line["accept_wait_us"]
        yield (
            f"It was accepted after {duration(waited)} in the backlog."
            if waited
            else "It was accepted at once."
        )
    if line["upstream"] is not None:
        yield _dialled(line)
    yield from _first_bytes(line)
    if line["bytes_c2s"] is not None or line["bytes_s2c"] is not None:
        effort = (
            "" if line["reads"] is None else f", in {line['reads']:,} reads and {line['writes']:,} writes"
        )
        amounts = f"{_count(line['bytes_c2s'])} bytes came from the client and {_count(line['bytes_s2c'])} went to it"
        yield f"{amounts}{effort}."
    yield from _hindrances(line)
    if line["faults"]:
        yield f"It met faults on purpose: {line['faults']}."
    yield ending(line)


def _count(amount: int | None) -> str:
    return "an unknown number of" if amount is None else f"{amount:,}"


def _client(line: Row) -> str:
    if line["client_ip"] is None:
        return "A client without a name"
    return f"The client {_address(line['client_ip'], line['client_port'])}"


def _place(line: Row) -> str:
    listener = f"listener {line['listener']}" if line["listener"] else "a listener that is not told"
    local = f" at {_address(line['local_ip'], line['local_port'])}" if line["local_ip"] else ""
    kind = " ".join(filter(None, (line["transport"], line["service"])))
    return f"{listener}{local} ({kind}, engine {line['engine']}, pid {line['pid']})"


def _address(host: str, port: int | None) -> str:
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _dialled(line: Row) -> str:
    resolved = (
        _address(line["upstream_ip"], line["upstream_port"]) if line["upstream_ip"] else line["upstream"]
    )
    where = line["upstream"] if resolved == line["upstream"] else f"{line['upstream']} ({resolved})"
    if line["connect_us"] is None:
        return f"It dialled {where} and was not connected."
    return f"It dialled {where} and was connected after {duration(line['connect_us'])}."


def _first_bytes(line: Row) -> Iterator[str]:
    asked, answered = line["client_first_us"], line["first_byte_us"]
    connected = line["connect_us"] or 0
    if asked is not None and (answered is None or asked <= answered):
        yield f"The client spoke first, {duration(asked)} after accept."
    if answered is not None:
        text = f"The first byte went to the client {duration(answered)} after accept"
        if asked is not None and asked <= answered:
            who = "the upstream" if line["upstream"] else "the echo"
            text += f": {who} took {duration(answered - max(asked, connected))}"
        elif asked is not None or "D" not in (line["history"] or ""):
            text += f", before the client spoke: the upstream took {duration(answered - connected)}"
        yield f"{text}."
    elif line["bytes_s2c"] == 0:
        yield "No byte went to the client."


def _hindrances(line: Row) -> Iterator[str]:
    paused = ((line["paused_s2c_us"], "client"), (line["paused_c2s_us"], "upstream"))
    for paused_us, who in paused:
        if paused_us:
            yield f"The {who} did not take what was for it for {duration(paused_us)} in all."
    if line["paused_us"] and not any(paused_us for paused_us, _ in paused):
        yield f"One side did not take what was for it for {duration(line['paused_us'])} in all."
    if line["paused_us"]:
        longest = f", the longest of {duration(line['longest_pause_us'])}" if line["longest_pause_us"] else ""
        yield f"There were {line['pauses']:,} pauses{longest}; up to {line['peak_buffer']:,} bytes waited in us."
    if line["max_gap_us"]:
        yield f"The longest silence was {duration(line['max_gap_us'])}."
    if (line["loop_lag_us"] or 0) >= LATE_US:
        yield f"While it was open our engine was late by as much as {duration(line['loop_lag_us'])}."
    for leg in ("client", "upstream"):
        if line[f"{leg}_retrans"]:
            yield f"{line[f'{leg}_retrans']:,} segments to the {leg} had to be sent again."


def _pairs(line: Row, paired: Sequence[Row]) -> Iterator[str]:
    for other in paired:
        same = all(line[name] == other[name] for name in ("bytes_c2s", "bytes_s2c"))
        moved = (
            "the same bytes"
            if same
            else f"other bytes ({_count(other['bytes_c2s'])} from and {_count(other['bytes_s2c'])} to the client)"
        )
        yield (
            f"Its pair {other['session']} on {other['engine']} moved {moved} in {duration(other['duration_us'])} "
            f"and ended {other['termination']}."
        )


def _moments(line: Row) -> Iterator[Moment]:
    if line["accept_wait_us"]:
        yield Moment(-line["accept_wait_us"], "the kernel had the connection; it waited to be accepted")
    yield Moment(0, "accepted" + (f"; dialled {line['upstream']}" if line["upstream"] else ""))
    for name, what in (
        ("connect_us", "connected to the upstream"),
        ("client_first_us", "first byte from the client"),
        ("first_byte_us", "first byte to the client"),
        ("client_end_us", "the client's end was read"),
        ("upstream_end_us", "the upstream's end was read"),
    ):
        if line[name] is not None:
            yield Moment(line[name], what)
    if line["event"] == "session_closed":
        codes = " ".join(filter(None, (line["termination"], line["error"])))
        yield Moment(line["duration_us"] or 0, f"closed ({codes})" if codes else "closed")


def _progress(lines: Sequence[Row], opened_us: int) -> Iterator[Moment]:
    for line in lines:
        if line["event"] == "session_progress":
            so_far = (
                f"still open: {line['bytes_c2s']:,} bytes from and {line['bytes_s2c']:,} to the client so far"
            )
            yield Moment(line["at_us"] - opened_us, so_far)


def _around(lines: Sequence[Row], session: Row, opened_us: int) -> Iterator[Moment]:
    for line in lines:
        if line["listener"] not in {None, session["listener"]} or line["upstream"] not in {
            None,
            session["upstream"],
        }:
            continue
        details = {
            "engine_stalled": f"a timer ran {duration(line['loop_lag_us'] or 0)} late",
            "service_draining": line["reason"],
            "listener_paused": line["error"],
            "engine_fault": line["error"],
            "upstream_down": line["reason"],
            "log_dropped": f"{line['lines'] or 0:,} lines",
        }
        detail = details.get(line["event"])
        yield Moment(
            line["at_us"] - opened_us, f"the process: {line['event']}" + (f", {detail}" if detail else "")
        )


def _unknown(line: Row) -> Iterator[str]:
    if line["event"] == "session_opened":
        yield "everything after accept: there is no later line of this session"
        return
    if line["event"] == "session_progress":
        yield "how it ended: there is no session_closed in these files"
    if line["accept_wait_us"] is None:
        yield "how long it waited to be accepted: only TCP tells"
    elif line["accept_wait_us"] == 0:
        yield "a wait of less than a step of the kernel's clock (4 ms on most) before accept"
    if line["client_first_us"] is None and "D" in (line["history"] or ""):
        yield "when the client first spoke, so how much of the first answer's time was its own"
    if line["paused_us"]:
        yield "when the pauses were; only their number, sum and longest are kept"
    if line["max_gap_us"]:
        yield "when the longest silence was, and whose; a silence at the very end is not in it"
    if line["client_retrans"] or line["upstream_retrans"]:
        yield "how long the retransmissions took; the kernel only counts them"
