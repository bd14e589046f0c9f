"""What `triptych logs` reads: compressed, rotated, wrapped by the journal, written by peers, by older and
newer versions, and Parquet, all into the same tables.
"""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_lines import NOT_OURS, Process, closed, drawn, written

from comparisons.logs.compact import compact
from comparisons.logs.peers import from_haproxy, from_zeek, to_haproxy
from comparisons.logs.reader import Logs, open_logs, schema
from comparisons.logs.sources import Unreadable
from comparisons.logs.summary import Summary, summarize
from services.vocabulary import EVENTS, Envelope

SCHEMA_1 = Path(__file__).with_name("schema_1.log")
STRUCTS: tuple[type[msgspec.Struct], ...] = (Envelope, *EVENTS)
TCPLOG = (
    "192.0.2.7:51234 [22/Nov/2026:09:59:58.250] front redis/one 3/12/1750 4096 -- 5/4/3/2/0 0/0",
    "2001:db8::7:443 [22/Nov/2026:09:59:59.000] front redis/<NOSRV> -1/-1/20 0 SC 1/1/0/0/3 0/0",
)
CONN_LOG = (
    {
        "ts": 1795341600.25,
        "uid": "CHhAvVGS1DHFjwGM9",
        "id.orig_h": "192.0.2.7",
        "id.orig_p": 51234,
        "id.resp_h": "192.0.2.1",
        "id.resp_p": 8000,
        "proto": "tcp",
        "duration": 1.5,
        "orig_bytes": 64,
        "resp_bytes": 4096,
        "conn_state": "SF",
        "local_orig": True,
        "history": "ShADadFf",
        "orig_pkts": 6,
        "resp_pkts": 8,
    },
    {
        "ts": 1795341601.0,
        "uid": "C2",
        "id.orig_h": "192.0.2.7",
        "id.orig_p": 5353,
        "id.resp_h": "192.0.2.1",
        "id.resp_p": 53,
        "proto": "udp",
        "conn_state": "S0",
        "orig_pkts": 1,
        "resp_pkts": 0,
    },
)


def log(count: int = 30, engine: str = "twisted") -> list[bytes]:
    dice = random.Random(count)  # noqa: S311  data, not a secret
    process = Process(engine)
    return [process.line(drawn(number, dice)) for number in range(count)]


def same(one: Summary, other: Summary) -> bool:
    """The same but for the files' names."""
    return without_names(one) == without_names(other)


def without_names(summary: Summary) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(summary)
    del told["files"]
    for fault in told["faults"]:
        del fault["file"]
    return told


def sessions(logs: Logs, *columns: str) -> list[dict[str, Any]]:
    return logs.rows(logs.sessions.select(*columns).order_by("at_us"))


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(zstandard.compress, id="Zstandard"),
        # as logrotate's delaycompress or a second append leaves them
        pytest.param(
            lambda log: gzip.compress(log[:5000]) + gzip.compress(log[5000:]), id="gzip in two parts"
        ),
        pytest.param(
            lambda log: zstandard.compress(log[:5000]) + zstandard.compress(log[5000:]),
            id="Zstandard in two parts",
        ),
    ],
)
def test_a_compressed_log_is_read_like_the_plain_one_whatever_its_name(tmp_path: Path, packed: Any) -> None:
    lines = [*log(), b"torn"]
    plain = written(tmp_path / "plain.log", lines)
    (tmp_path / "packed").write_bytes(packed(Path(plain).read_bytes()))
    assert same(summarize([str(tmp_path / "packed")]), summarize([plain]))


@pytest.mark.parametrize("packed", [gzip.compress, zstandard.compress], ids=["gzip", "Zstandard"])
def test_a_torn_archive_gives_what_it_still_holds(tmp_path: Path, packed: Any) -> None:
    dice = random.Random(7)  # noqa: S311  data, not a secret
    # what cannot be compressed, so that half of the bytes are half of the lines
    lines = [Process("twisted").line(closed(n, error=dice.randbytes(4000).hex())) for n in range(60)]
    archive = packed(b"\n".join(lines))
    (tmp_path / "torn").write_bytes(archive[: len(archive) // 2])
    found = summarize([str(tmp_path / "torn")])
    assert 0 < found.sessions < 60
    damaged = bytearray(archive)
    damaged[len(archive) // 2 : len(archive) // 2 + 200] = bytes(200)
    (tmp_path / "damaged").write_bytes(damaged)
    found = summarize([str(tmp_path / "damaged")])
    assert 0 < found.sessions + found.foreign == found.lines


def test_a_rotated_set_is_named_by_a_pattern(tmp_path: Path) -> None:
    lines = log()
    (tmp_path / "access.log.2.gz").write_bytes(gzip.compress(b"\n".join(lines[:10])))
    (tmp_path / "access.log.1").write_bytes(b"\n".join(lines[10:20]) + b"\n")
    written(tmp_path / "access.log", lines[20:])
    whole = written(tmp_path / "whole", lines)
    assert same(summarize([str(tmp_path / "access.log*")]), summarize([whole]))
    # also when a part of it is named beside it
    found = summarize([str(tmp_path / "access.log"), str(tmp_path / "access.log*")])
    assert found.sessions == 30


def test_a_pattern_that_nothing_has_is_one_line_and_exit_66(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="no file has such a name") as caught:
        summarize([str(tmp_path / "access.log*")])
    assert caught.value.exit_code == 66


def test_haproxy_s_tcplog_is_read_as_sessions_of_a_peer(tmp_path: Path) -> None:
    header = "Nov 22 10:00:00 lb haproxy[77]: "
    lines = [f"{header}{TCPLOG[0]}", TCPLOG[1], f"{header}Server redis/one is DOWN.", log(1)[0].decode()]
    path = written(tmp_path / "haproxy.log", [line.encode() for line in lines])
    found = summarize([path])
    assert (found.lines, found.sessions, found.foreign) == (4, 3, 1)
    assert [(fault.line, fault.text) for fault in found.faults] == [(3, lines[2])]
    assert {group.name: group.sessions for group in found.groups} == {"haproxy": 2, "twisted": 1}
    with open_logs([path]) as logs:
        refused, served = sorted(
            logs.rows(logs.sessions.filter(logs.sessions.engine == "haproxy")),
            key=lambda row: -row["duration_us"],
        )[::-1]
    reached = {name: value for name, value in served.items() if value is not None}
    assert reached == {
        "kind": "known",
        "at_us": 1_795_341_600_000_000,
        "timestamp": "2026-11-22T10:00:00.000000Z",
        "event": "session_closed",
        "level": "info",
        "schema": 1,
        "engine": "haproxy",
        "instance": "-",
        "pid": 77,
        "service": "proxy",
        "listener": "front",
        "transport": "tcp",
        "client_ip": "192.0.2.7",
        "client_port": 51234,
        "upstream": "one",
        "connect_us": 12_000,
        "duration_us": 1_750_000,
        "bytes_s2c": 4096,
        "termination": "--",
        "sessions": 5,
    }
    assert (refused["client_ip"], refused["upstream"], refused["connect_us"]) == ("2001:db8::7", None, None)
    assert (refused["termination"], refused["closed_by"]) == ("SC", "upstream")


def test_zeek_s_conn_log_is_read_as_sessions_of_a_peer(tmp_path: Path) -> None:
    path = written(tmp_path / "conn.log", [json.dumps(line).encode() for line in CONN_LOG])
    with open_logs([path]) as logs:
        columns = (
            "engine",
            "session",
            "transport",
            "at_us",
            "duration_us",
            "bytes_c2s",
            "datagrams_c2s",
            "state",
            "history",
        )
        tcp, udp = (
            tuple(row.values())
            for row in sorted(sessions(logs, *columns), key=lambda row: str(row["session"]), reverse=True)
        )
    assert tcp == (
        "zeek",
        "CHhAvVGS1DHFjwGM9",
        "tcp",
        1_795_341_601_750_000,
        1_500_000,
        64,
        None,
        "SF",
        "ShADadFf",
    )
    assert udp == ("zeek", "C2", "udp", 1_795_341_601_000_000, 0, None, 1, "S0", None)


@settings(max_examples=200, deadline=None)
@given(dice=st.randoms(use_true_random=False), garbage=st.binary(max_size=60))
def test_a_session_written_for_haproxy_reads_back_to_the_millisecond(
    dice: random.Random, garbage: bytes
) -> None:
    session = {
        **msgspec.structs.asdict(drawn(1, dice)),
        "client_ip": "192.0.2.7",
        "client_port": 9,
        "at_us": dice.randrange(10**15, 2 * 10**15),
    }
    line = to_haproxy(session)
    read = from_haproxy(line.encode())
    assert read
    for timer in ("connect_us", "duration_us"):
        assert read[timer] == (None if session[timer] is None else session[timer] // 1000 * 1000)
    for name in ("client_ip", "client_port", "bytes_s2c", "termination", "upstream", "listener"):
        assert read[name] == session[name]
    # and what is no such line is none, whatever it is
    torn = line.encode()[: dice.randrange(len(line) // 2)] + garbage
    assert from_haproxy(torn) is None or b"[" in torn
    assert from_zeek(garbage) is None


@pytest.mark.parametrize("count", [pytest.param(3, id="three lines"), pytest.param(0, id="none")])
def test_parquet_gives_the_summary_that_the_lines_gave(tmp_path: Path, count: int) -> None:
    lines = [line for foreign in NOT_OURS.values() for line in [*log(count), foreign]]
    lines += log(20, "blocking") if count else []
    path = written(tmp_path / "a.log", lines)
    assert compact([path], tmp_path / "packed") == (len(lines), len(NOT_OURS))
    assert same(summarize([str(tmp_path / "packed")]), summarize([path]))
    # by date and engine, as other tools know it
    folders = {str(part.parent.relative_to(tmp_path / "packed")) for part in tmp_path.rglob("*.parquet")}
    engines = ("blocking", "twisted") if count else ()
    assert folders == {".", *(f"date=2026-11-22/engine={engine}" for engine in engines)}


def test_parquet_and_lines_may_be_named_together(tmp_path: Path) -> None:
    first, second = log(20), log(20, "blocking")
    compact([written(tmp_path / "first.log", first)], tmp_path / "day [1]")
    both = [str(tmp_path / "day [1]"), written(tmp_path / "second.log", second)]
    assert same(summarize(both), summarize([written(tmp_path / "both.log", first + second)]))


def test_a_folder_is_never_written_twice_and_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "a.log", log())
    command = [
        sys.executable,
        "-m",
        "services.cli",
        "logs",
        "compact",
        path,
        "--to",
        str(tmp_path / "packed"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("30 lines, 0 of them not ours, in ")
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stdout) == (64, "")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(Unreadable):
        compact([str(tmp_path / "nothing")], tmp_path / "other")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.log", "packed"}


@pytest.mark.parametrize(
    "columns", ["1 AS a", "'known' AS kind, 'x' AS event, 'x' AS engine, 'now' AS at_us"]
)
def test_parquet_of_another_program_is_one_line_and_exit_65(tmp_path: Path, columns: str) -> None:
    path = tmp_path / "other.parquet"
    with open_logs([written(tmp_path / "a.log", [])]) as logs:
        logs.sql.execute(f"COPY (SELECT {columns}) TO '{path}'")
    for content in (path.read_bytes(), path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(click.ClickException, match=r"other\.parquet") as caught:
            summarize([str(path)])
        assert caught.value.exit_code == 65
        assert "\n" not in caught.value.message


def test_a_log_of_schema_1_as_it_was_first_written_still_reads() -> None:
    """The file holds every event as the first release wrote it. It is never edited: what fails here
    breaks the promise that a log outlives the version that wrote it.
    """
    lines = SCHEMA_1.read_bytes().splitlines()
    with open_logs([str(SCHEMA_1)]) as logs:
        kinds = logs.rows(logs.lines.group_by("kind").aggregate(lines=lambda t: t.count()))
        rows = {row["event"]: row for row in logs.rows(logs.lines)}
    assert kinds == [{"kind": "known", "lines": len(lines)}]
    for line in lines:
        told = json.loads(line)
        read = rows[told["event"]]
        for name, value in told.items():
            assert read[name] == (
                value if not isinstance(value, list) else json.dumps(value, separators=(",", ":"))
            )


def test_a_newer_daemon_s_fields_are_ignored_and_its_events_are_counted(tmp_path: Path) -> None:
    process = Process("twisted")
    lines = [process.line(closed(0), colour="red", nested={"a": [1]}), process.line(closed(1))]
    lines[1:1] = [
        process.line(closed(2), event="tunnel_opened"),
        process.line(closed(3), event="tunnel_opened"),
    ]
    found = summarize([written(tmp_path / "newer.log", lines)])
    assert (found.lines, found.foreign, found.sessions) == (4, 0, 2)
    assert found.unknown == {"tunnel_opened": 2}
    # they are lines of their process all the same
    assert [(each.lines, each.missing) for each in found.processes] == [(4, 0)]


def test_the_tables_have_every_field_of_the_vocabulary() -> None:
    fields = {field.encode_name for struct in STRUCTS for field in msgspec.structs.fields(struct)}
    assert fields | {"kind", "event", "at_us"} == schema().keys()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_makes_the_reader_raise_whatever_it_holds(tmp_path: Path, data: st.DataObject) -> None:
    ours = b"\n".join(
        [*log(4), *(line.encode() for line in TCPLOG), *(json.dumps(line).encode() for line in CONN_LOG)]
    )
    whole = data.draw(st.sampled_from([ours, gzip.compress(ours), zstandard.compress(ours)]))
    torn = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(torn)))
        torn[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    (tmp_path / "fuzzed").write_bytes(torn)
    found = summarize([str(tmp_path / "fuzzed")])
    assert found.sessions + found.foreign + sum(found.unknown.values()) <= found.lines
    json.dumps(msgspec.to_builtins(found))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_fast_way_to_read_whole_logs_tells_what_the_other_does(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Both are DuckDB's, but not the same code: one line that only the other can read makes all the
    lines of a log go that way, which must not change what the first lines tell.
    """
    odd = st.sampled_from([None, -1, 2**63, 2**70, 1.5, 1e3, True, "12", "", "SF", [1], {"a": 1}])
    fields = st.sampled_from(
        ["seq", "pid", "reads", "bytes_c2s", "error", "pair", "state", "client_port", "event"]
    )
    process = Process("twisted")
    lines = [process.line(closed(n), **data.draw(st.dictionaries(fields, odd, max_size=2))) for n in range(6)]
    rows = []
    for last in (closed(9, error="whole"), None):
        path = written(tmp_path / "log", [*lines, process.line(last) if last else b"torn"])
        with open_logs([path]) as logs:
            found = logs.rows(logs.lines.order_by("at_us"))
        rows.append([row for row in found if row["error"] != "whole" and row["kind"] != "foreign"])
    assert rows[0] == rows[1]
