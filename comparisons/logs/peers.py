"""The logs of peers as lines of ours: HAProxy's `option tcplog` and Zeek's conn.log in JSON.

One line of theirs is one `session_closed` whose `engine` is the peer's name, so that peers stand beside
the three engines in every table. What they do not write is null, also where our vocabulary allows no
null: HAProxy knows neither the bytes from the client nor the client's history, Zeek no listener and no
termination. HAProxy's times are whole milliseconds of its host's clock without a zone: taken as UTC.
`to_haproxy` writes such a line from a session, for the tools that read nothing else.
"""

import functools
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from services.vocabulary import SCHEMA

# %ci:%cp [%t] %ft %b/%s %Tw/%Tc/%Tt %B %ts %ac/..., the configuration manual's chapter 8.2.2; a + marks a
# line that was written before the end of the session
TCPLOG = re.compile(
    rb"(?:haproxy\[(?P<pid>\d{1,9})\]: |^)(?P<client_ip>[0-9a-fA-F.:]{2,45}):(?P<client_port>\d{1,5}) "
    rb"\[(?P<day>\d\d/[A-Z][a-z]{2}/\d{4}):(?P<time>\d\d:\d\d:\d\d)\.(?P<ms>\d{3})\] "
    rb"(?P<listener>[^ /]{1,200}) [^ /]{1,200}/(?P<upstream>[^ ]{1,200}) "
    rb"-?\d{1,9}/(?P<connect>-?\d{1,9})/\+?(?P<total>\d{1,12}) \+?(?P<bytes>\d{1,18}) "
    rb"(?P<termination>[A-Za-z-]{2}) (?P<sessions>\d{1,9})/"
)
CAUSES = {"C": "client", "c": "client", "S": "upstream", "s": "upstream"}
KEPT = 2


class Connection(
    msgspec.Struct,
    rename={
        "client": "id.orig_h",
        "client_port": "id.orig_p",
        "local": "id.resp_h",
        "local_port": "id.resp_p",
    },
):
    """What is read of a line of Zeek's conn.log."""

    ts: float
    uid: str
    client: str
    client_port: int
    local: str
    local_port: int
    proto: str
    conn_state: str
    history: str | None = None
    duration: float = 0.0
    orig_bytes: int | None = None
    resp_bytes: int | None = None
    orig_pkts: int | None = None
    resp_pkts: int | None = None


CONNECTION = msgspec.json.Decoder(Connection)


def from_haproxy(line: bytes) -> dict[str, Any] | None:
    """The session that this tcplog line tells of, with or without a syslog header; None if it is none."""
    found = TCPLOG.search(line)
    if found is None:
        return None
    text = {name: value.decode(errors="replace") for name, value in found.groupdict(b"").items()}
    accepted_s = _seconds(text["day"], text["time"])
    if accepted_s is None:
        return None
    duration_ms, connect_ms = int(text["total"]), int(text["connect"])
    closed_us = accepted_s * 1_000_000 + (int(text["ms"]) + duration_ms) * 1000
    cause = text["termination"][0]
    return _line("haproxy", closed_us) | {
        "pid": int(text["pid"] or 0),
        "service": "proxy",
        "listener": text["listener"],
        "transport": "tcp",
        "client_ip": text["client_ip"],
        "client_port": int(text["client_port"]),
        "upstream": None if text["upstream"] == "<NOSRV>" else text["upstream"],
        "connect_us": connect_ms * 1000 if connect_ms >= 0 else None,
        "duration_us": duration_ms * 1000,
        "bytes_s2c": int(text["bytes"]),
        "termination": text["termination"],
        "closed_by": None if cause == "-" else CAUSES.get(cause, "service"),
        "sessions": int(text["sessions"]),
    }


def from_zeek(line: bytes) -> dict[str, Any] | None:
    """The connection that this line of a JSON conn.log tells of; None if it is none."""
    try:
        found = CONNECTION.decode(line)
        closed_us = round((found.ts + found.duration) * 1_000_000)
        told = _line("zeek", closed_us)
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return None
    udp = found.proto == "udp"
    return told | {
        "pid": 0,
        "session": found.uid,
        "transport": found.proto,
        "client_ip": found.client,
        "client_port": found.client_port,
        "local_ip": found.local,
        "local_port": found.local_port,
        "duration_us": round(found.duration * 1_000_000),
        "bytes_c2s": found.orig_bytes,
        "bytes_s2c": found.resp_bytes,
        "datagrams_c2s": found.orig_pkts if udp else None,
        "datagrams_s2c": found.resp_pkts if udp else None,
        "state": found.conn_state,
        "history": found.history,
    }


def to_haproxy(session: Mapping[str, Any]) -> str:
    """A `session_closed` row as HAProxy would log it, without a syslog header.

    Milliseconds are cut off as HAProxy cuts them; a dial that never succeeded is -1, and 0 stands where
    we do not know what it counts (its queues and its own connection counters).
    """
    duration_us = session["duration_us"]
    connect_us = session["connect_us"]
    connect_ms = -1 if connect_us is None else connect_us // 1000
    server = session["upstream"] or "<NOSRV>"
    count = session["sessions"] or 0
    return (
        f"{session['client_ip'] or 'unix'}:{session['client_port'] or 0} [{haproxy_stamp(session['at_us'] - duration_us)}] "
        f"{session['listener']} {session['listener']}/{server.replace(' ', '_')} "
        f"0/{connect_ms}/{duration_us // 1000} {session['bytes_s2c']} {session['termination']} "
        f"{count}/{count}/{count}/{count}/0 0/0"
    )


def haproxy_stamp(at_us: int) -> str:
    """A time as HAProxy writes it between brackets, in UTC."""
    seconds, micros = divmod(at_us, 1_000_000)
    return f"{_second(seconds)}.{micros // 1000:03}"


def _line(engine: str, closed_us: int) -> dict[str, Any]:
    seconds, micros = divmod(closed_us, 1_000_000)
    return {
        "timestamp": f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{micros:06}Z",
        "level": "info",
        "event": "session_closed",
        "schema": SCHEMA,
        "engine": engine,
        "instance": "-",
    }


@functools.lru_cache(maxsize=KEPT)
def _seconds(day: str, time: str) -> int | None:
    try:
        return int(datetime.strptime(f"{day}:{time}Z", "%d/%b/%Y:%H:%M:%S%z").timestamp())
    except ValueError:
        return None


@functools.lru_cache(maxsize=KEPT)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%d/%b/%Y:%H:%M:%S}"
