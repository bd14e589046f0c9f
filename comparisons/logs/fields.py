"""What every field of the log means, and what other log formats call it: the one table of it.

`logs export` writes by this table, `logs sql --views` prints it, and `python -m comparisons.logs.fields`,
run at the top, makes the tables of deploy/FIELDS.md and the fields of deploy/lnav from it. Names are those of the Elastic Common Schema (9),
OpenTelemetry's semantic conventions and log record, and Zeek's conn.log. Where they have no word for a
field of ours, it keeps its own behind `triptych.`; Zeek's file has no place for such a field.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from services.vocabulary import EVENTS, Envelope, Event, SessionClosed


class Field(NamedTuple):
    meaning: str
    ecs: str = ""
    otel: str = ""
    zeek: str = ""


# OpenTelemetry keeps these beside the attributes of a log record: in the record itself, or with what sent it
OTEL_RECORD = ("timeUnixNano", "severityText", "eventName")
OTEL_RESOURCE = ("service.instance.id", "process.pid")

ENVELOPE = {
    "timestamp": Field(
        "When the line was said: RFC 3339, UTC, microseconds; of a session its close (Zeek's ts is its open)",
        "@timestamp",
        "timeUnixNano",
        "ts",
    ),
    "level": Field("debug, info, warning or error", "log.level", "severityText"),
    "event": Field("What the line tells; it decides which fields follow", "event.action", "eventName"),
    "schema": Field("The number of this vocabulary"),
    "engine": Field("blocking, nonblocking or twisted; - for a process that has none"),
    "instance": Field("The unit's instance, or -", "service.node.name", "service.instance.id"),
    "pid": Field("The daemon's process", "process.pid", "process.pid"),
    "worker": Field("Which worker of the daemon"),
    "seq": Field("The line's number in its process, without gaps: a gap is a lost line", "event.sequence"),
}

SESSION = {
    "session": Field("Sortable unique id of the session, 26 characters", zeek="uid"),
    "pair": Field("The id shared by sessions that split, shadow or replay made from one"),
    "service": Field("echo or proxy"),
    "listener": Field("The listener's name"),
    "transport": Field("tcp, udp or unix", "network.transport", "network.transport", "proto"),
    "client_ip": Field("The client's address", "client.ip", "client.address", "id.orig_h"),
    "client_port": Field("The client's port", "client.port", "client.port", "id.orig_p"),
    "local_ip": Field(
        "The address that the client reached", "server.ip", "network.local.address", "id.resp_h"
    ),
    "local_port": Field("Its port", "server.port", "network.local.port", "id.resp_p"),
    "upstream": Field("The upstream's name, as configured"),
    "upstream_ip": Field("The upstream's address"),
    "upstream_port": Field("The upstream's port"),
    "accept_wait_us": Field("In the backlog before accept; the kernel tells whole milliseconds"),
    "queue_us": Field("In the queue for an upstream; null for an echo"),
    "connect_us": Field("First dial to connected"),
    "first_byte_us": Field("Accept to the first byte sent to the client"),
    "duration_us": Field("Accept to close", "event.duration", "", "duration"),
    "max_gap_us": Field("The longest silence while relaying"),
    "client_first_us": Field("Accept to the first byte read from the client"),
    "client_end_us": Field("Accept to the end (FIN) that was read from the client"),
    "upstream_end_us": Field("Accept to the end (FIN) that was read from the upstream"),
    "bytes_c2s": Field("From the client", "client.bytes", "", "orig_bytes"),
    "bytes_s2c": Field("To the client", "server.bytes", "", "resp_bytes"),
    "datagrams_c2s": Field("From the client; null for streams", "client.packets", "", "orig_pkts"),
    "datagrams_s2c": Field("To the client; null for streams", "server.packets", "", "resp_pkts"),
    "reads": Field("Successful reads, both legs"),
    "writes": Field("Successful writes, both legs"),
    "partial_writes": Field("Writes of which the kernel took a part only"),
    "would_block": Field("Calls that the kernel could not serve at once"),
    "pauses": Field("How often reading stopped because the other side did not take what was read"),
    "paused_us": Field("How long, both directions together"),
    "paused_c2s_us": Field("How long the client was not read because the upstream did not take"),
    "paused_s2c_us": Field(
        "How long the upstream (of an echo: the client) was not read because the client did not take"
    ),
    "longest_pause_us": Field("The longest of these pauses"),
    "peak_buffer": Field("The most bytes that waited in the daemon in one direction"),
    "spliced_bytes": Field("Bytes that never left the kernel"),
    "loop_lag_us": Field("How late the engine was with its timers at most"),
    "state": Field(
        "The client's connection as Zeek writes it: SF, RSTO, RSTR, REJ, S0 to S3", "", "", "conn_state"
    ),
    "history": Field(
        "S h handshake, D d data, F f FIN, R r reset; upper case from the client", "", "", "history"
    ),
    "termination": Field("HAProxy's two letters: who ended it and in which phase"),
    "closed_by": Field("client, upstream or service"),
    "error": Field("The errno's name, or the text of a fault of ours", "error.code", "error.type"),
    "faults": Field("Faults on purpose that were met, by name; of a configuration, what is wrong with it"),
    "via_ip": Field("Who connected, where a PROXY header told the client's own address"),
    "via_port": Field("Its port"),
    "sessions": Field("Open in the process at the close of this one"),
    "client_rtt_us": Field("The kernel's smoothed round trip time of the client's connection"),
    "client_retrans": Field("Segments sent again to the client"),
    "upstream_rtt_us": Field("The same of the upstream's connection"),
    "upstream_retrans": Field("The same of the upstream's connection"),
}

OTHERS = {
    "accepted": Field("Sessions since the start"),
    "closed": Field("Of these, ended"),
    "refused": Field("Clients refused: since the start, or since the last line of this event"),
    "open_sessions": Field("Sessions that are open"),
    "datagrams_dropped": Field("Datagrams that the kernel did not take"),
    "lines_dropped": Field("Lines that the log's reader did not take in time"),
    "threads": Field("Of the process"),
    "open_descriptors": Field("Of the process"),
    "rss_bytes": Field("Memory of the process"),
    "cpu_us": Field("CPU time of the process"),
    "addresses": Field("What is bound, ports resolved; of an upstream, what its name stands for"),
    "start_us": Field("From the process's start to ready"),
    "reason": Field("Why", "event.reason"),
    "deadline_us": Field("How long open sessions may take to finish"),
    "cut": Field("Sessions that the deadline ended"),
    "path": Field("The configuration file"),
    "added": Field("Listeners that are new"),
    "removed": Field("Listeners that are gone"),
    "kept": Field("Listeners that stayed"),
    "address": Field("What the listener is bound to"),
    "interface": Field("What answers there: metrics, faults or control"),
    "inherited": Field("Whether the socket was handed over"),
    "risk": Field("What the listener offers to strangers"),
    "pause_us": Field("For how long nothing is accepted"),
    "pool": Field("The upstreams' pool"),
    "draining": Field("Whether the upstream gets no new sessions"),
    "weight": Field("Its share of new sessions"),
    "lacking": Field("What this system lacks"),
    "instead": Field("What the engine does without it"),
    "traceback": Field("Where the bug is", "error.stack_trace", "exception.stacktrace"),
    "lines": Field("How many lines were dropped"),
}

FIELDS = {
    name: field._replace(ecs=field.ecs or f"triptych.{name}", otel=field.otel or f"triptych.{name}")
    for name, field in {**ENVELOPE, **SESSION, **OTHERS}.items()
}

ENVELOPE_NAMES = tuple(ENVELOPE)


def names(event: type[Event]) -> tuple[str, ...]:
    """The fields of a line of this event, in the line's order, without the envelope's."""
    return event.__struct_fields__


# what stands in a session_closed line
SESSION_FIELDS = (*ENVELOPE_NAMES, *names(SessionClosed))


def _types(*structs: type[msgspec.Struct]) -> Iterator[tuple[str, str, inspect.Type]]:
    """Every struct's name of an event, a field and what the field may be, but for null."""
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            kind = inspect.type_info(field.type)
            some = kind.types[0] if isinstance(kind, inspect.UnionType) else kind
            yield getattr(struct, "NAME", ""), field.encode_name, some


# events and their fields that are lists, which our tables hold as JSON text
LISTS = {(event, name) for event, name, kind in _types(*EVENTS) if isinstance(kind, inspect.ListType)}
# fields that are numbers
NUMBERS = {name for _, name, kind in _types(Envelope, *EVENTS) if isinstance(kind, inspect.IntType)} | {
    "schema"
}


def unit(name: str) -> str:
    """As the names promise it; "" for what has none."""
    if name.endswith("_us"):
        return "µs"
    return "bytes" if "bytes" in name or name == "peak_buffer" else ""


def tables() -> str:
    """The tables of deploy/FIELDS.md."""
    told: dict[str, list[str]] = {}
    for event in EVENTS:
        for name in names(event):
            told.setdefault(name, []).append(event.NAME)
    parts = []
    for title, fields in (("Every line", ENVELOPE), ("Sessions", SESSION), ("Other events", OTHERS)):
        rows = ["| field | meaning | unit | ECS | OpenTelemetry | Zeek |", "|---|---|---|---|---|---|"]
        for name in fields:
            field = FIELDS[name]
            others = [f"`{text}`" if text else "" for text in field[1:]]
            rows.append(f"| `{name}` | {field.meaning} | {unit(name)} | {' | '.join(others)} |")
        parts.append(f"### {title}\n\n" + "\n".join(rows) + "\n")
    rows = ["| event | level | fields beside the envelope's |", "|---|---|---|"]
    session = set(names(SessionClosed))
    for event in EVENTS:
        own = names(event)
        listed = ", ".join(f"`{name}`" for name in own)
        text = "all of Sessions" if session <= set(own) else listed
        rows.append(f"| `{event.NAME}` | {event.LEVEL} | {text} |")
    parts.append("### Events\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def lnav_values(kept: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values of lnav's format: what each field is there, and of those it had whatever else it says."""
    values: dict[str, dict[str, Any]] = {}
    for name in (*FIELDS, "level"):
        if name != "timestamp":
            kind = "integer" if name in NUMBERS else "string"
            values[name] = kept.get(name, {"hidden": True}) | {"kind": kind}
    return values


def write(deploy: Path) -> None:
    """Makes what rests on the tables anew: the page's tables, and the values of lnav's format."""
    page = deploy / "FIELDS.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index("### Every line\n")] + tables(), encoding="utf-8")
    lnav = deploy / "lnav/triptych.json"
    found = json.loads(lnav.read_text(encoding="utf-8"))
    form = found["triptych_log"]
    form["value"] = lnav_values(form["value"])
    lnav.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path("deploy"))
