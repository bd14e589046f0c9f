"""`triptych logs export`: what other tools read of it is what the log said."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from log_lines import NOT_OURS, Process, closed, written
from opentelemetry.proto.logs.v1.logs_pb2 import LogsData

from comparisons.logs.fields import FIELDS, SESSION_FIELDS
from comparisons.logs.summary import summarize
from comparisons.logs.synthetic import lines
from services.cli import main
from services.vocabulary import EngineStalled, ServiceReady, SessionRefused

Row = dict[str, Any]
SESSIONS = 3_000


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    """A log of sessions, and their rows in the order of their ends."""
    made = list(lines(SESSIONS))
    path = written(tmp_path_factory.mktemp("export") / "log", [line.rstrip() for line, _ in made])
    return path, sorted((row for _, row in made), key=lambda row: row["at_us"])


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Path, str]]:
    """Exports logs; the file that was made, and what was said on stderr."""

    def run(form: str, *files: str) -> tuple[Path, str]:
        made = tmp_path / f"made.{form}"
        assert main(["logs", "export", "--to", form, "-o", str(made), *files]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        return made, err

    return run


Export = Callable[..., tuple[Path, str]]


def alike(path: Path | str, by: str = "engine") -> list[Any]:
    """What two logs have in common if they tell of the same sessions."""
    return [
        (group.sessions, group.bytes_c2s, group.bytes_s2c, group.endings, group.timers, group.opened)
        for group in summarize([str(path)], by).groups
    ]


def test_a_parquet_file_tells_the_same_summary_as_the_log(
    sessions: tuple[str, list[Row]], export: Export
) -> None:
    made, _ = export("parquet", sessions[0])
    assert alike(made) == alike(sessions[0])


def test_csv_has_a_row_for_every_session_in_the_order_of_their_ends(
    sessions: tuple[str, list[Row]], export: Export
) -> None:
    made, _ = export("csv", sessions[0])
    with made.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(SESSION_FIELDS)
    assert [row["session"] for row in found] == [row["session"] for row in sessions[1]]
    for name in ("duration_us", "connect_us", "termination", "engine"):
        assert [row[name] for row in found] == [
            "" if row[name] is None else str(row[name]) for row in sessions[1]
        ]


def test_zeek_lines_read_back_are_the_same_sessions(sessions: tuple[str, list[Row]], export: Export) -> None:
    made, said = export("zeek", sessions[0])
    assert said == ""
    [back], [ours] = summarize([str(made)]).groups, summarize([sessions[0]], "service").groups
    assert (back.sessions, back.bytes_c2s, back.bytes_s2c) == (ours.sessions, ours.bytes_c2s, ours.bytes_s2c)
    assert back.timers["duration_us"] == ours.timers["duration_us"]
    assert Counter({each.state: each.sessions for each in back.endings}) == Counter(
        row["state"] for row in sessions[1]
    )
    told, row = json.loads(made.read_text().splitlines()[0]), sessions[1][0]
    # Zeek's ts is when it began
    assert round(told["ts"] * 1e6) == row["at_us"] - row["duration_us"]
    assert told["uid"] == row["session"]
    assert set(told) <= {field.zeek for field in FIELDS.values()}


def test_haproxys_lines_read_back_are_the_same_sessions(
    sessions: tuple[str, list[Row]], export: Export
) -> None:
    made, _ = export("haproxy", sessions[0])
    [back] = summarize([str(made)]).groups
    assert Counter({each.termination: each.sessions for each in back.endings}) == Counter(
        row["termination"] for row in sessions[1]
    )
    assert back.bytes_s2c == sum(row["bytes_s2c"] for row in sessions[1])


def test_halog_counts_the_same_sessions_and_finds_the_same_gaps_in_accepting(
    sessions: tuple[str, list[Row]], export: Export
) -> None:
    made, _ = export("haproxy", sessions[0])

    def halog(*arguments: str) -> list[str]:
        with made.open() as file:
            done = subprocess.run(
                ["halog", "-q", *arguments], stdin=file, capture_output=True, text=True, check=True
            )
        return done.stdout.splitlines()

    assert halog("-c") == [str(SESSIONS)]
    # halog knows the time of the day only
    opened = sorted({(row["at_us"] - row["duration_us"]) // 1000 % 86_400_000 for row in sessions[1]})
    least = 5
    gaps = [second - first for first, second in pairwise(opened) if second - first >= least]
    # time, milliseconds, the gap before it, how many came at once
    assert [int(line.split()[2]) for line in halog("-ad", str(least))] == gaps
    assert gaps


def awkward(path: Path) -> str:
    """A log with one of everything that is awkward to tell."""
    process = Process("twisted")
    said = [
        process.line(ServiceReady(addresses=["127.0.0.1:1", "[::1]:2"], start_us=3)),
        process.line(EngineStalled(loop_lag_us=7, open_sessions=1)),
        process.line(
            SessionRefused(
                service="echo",
                listener="e",
                transport="tcp",
                client_ip="::1",
                client_port=9,
                termination="PQ",
                reason="full",
                refused=2,
            )
        ),
        process.line(closed(0, transport="unix")),
        process.line(closed(1, transport="udp", client_ip="::1", datagrams_c2s=3, datagrams_s2c=2)),
        process.line(
            closed(2, client_ip="::1", client_port=5, duration_us=1_500, termination="CD", error="ECONNRESET")
        ),
        NOT_OURS["text"],
        process.line(closed(3)).replace(b"session_closed", b"session_dreamt"),
    ]
    return written(path, said)


def test_what_a_format_cannot_express_is_left_out_and_counted(tmp_path: Path, export: Export) -> None:
    log = awkward(tmp_path / "log")
    made, said = export("zeek", log)
    assert [json.loads(line)["proto"] for line in made.read_text().splitlines()] == ["udp", "tcp"]
    assert said == "left out: 1 sessions that zeek cannot express\n"
    made, said = export("haproxy", log)
    assert made.read_text().count("\n") == 2
    assert said == "left out: 1 sessions that haproxy cannot express\n"


def test_every_line_is_a_document_of_the_elastic_common_schema(tmp_path: Path, export: Export) -> None:
    made, _ = export("ecs", awkward(tmp_path / "log"))
    documents = [json.loads(line) for line in made.read_text().splitlines()]
    assert [each["event"]["action"] for each in documents] == [
        "service_ready",
        "engine_stalled",
        "session_refused",
        *["session_closed"] * 3,
    ]
    ready, stalled, refused, *_, last = documents
    assert ready["triptych"]["addresses"] == ["127.0.0.1:1", "[::1]:2"]
    assert (stalled["log"]["level"], stalled["event"]["sequence"]) == ("warning", 1)
    assert refused["event"]["type"] == ["connection", "denied"]
    assert (last["client"]["ip"], last["client"]["port"], last["error"]["code"]) == ("::1", 5, "ECONNRESET")
    # in nanoseconds, as the schema has it
    assert (last["event"]["duration"], last["event"]["outcome"]) == (1_500_000, "failure")
    assert "node" not in last["service"]
    assert None not in last["triptych"].values()


def test_every_line_is_a_record_of_opentelemetry(tmp_path: Path, export: Export) -> None:
    made, _ = export("otel", awkward(tmp_path / "log"))
    records = []
    for line in made.read_text().splitlines():
        # unknown names and wrong kinds are errors
        [resource] = json_format.Parse(line, LogsData()).resource_logs
        [scope] = resource.scope_logs
        [record] = scope.log_records
        assert [each.key for each in resource.resource.attributes] == ["service.name", "process.pid"]
        records.append(record)
    assert [each.event_name for each in records] == [
        "triptych.service_ready",
        "triptych.engine_stalled",
        "triptych.session_refused",
        *["triptych.session_closed"] * 3,
    ]
    assert [each.severity_number for each in records] == [9, 13, 13, 9, 9, 9]
    attributes = {each.key: each.value for each in records[-1].attributes}
    assert attributes["client.address"].string_value == "::1"
    assert attributes["triptych.duration_us"].int_value == 1_500
    ready = {each.key: each.value for each in records[0].attributes}
    addresses = ready["triptych.addresses"].array_value.values
    assert [each.string_value for each in addresses] == ["127.0.0.1:1", "[::1]:2"]
    first = datetime.fromisoformat("2026-11-22T10:00:00+00:00")
    assert records[0].time_unix_nano == int(first.timestamp()) * 10**9


def test_it_goes_to_standard_output_but_parquet_not_to_a_terminal(tmp_path: Path) -> None:
    log = awkward(tmp_path / "log")
    command = [sys.executable, "-m", "services.cli", "logs", "export", log, "--to"]
    done = subprocess.run([*command, "csv"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 4
    terminal, end = os.openpty()
    refused = subprocess.run(
        [*command, "parquet"], stdout=end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(end)
    os.close(terminal)
    assert (refused.returncode, refused.stderr.count("\n")) == (64, 1)
    assert "name a file with -o" in refused.stderr


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = awkward(tmp_path / "log")
    assert main(["logs", "export", log, "--to", "ecs", "-o", str(tmp_path / "absent" / "out")]) != 0
    assert capsys.readouterr().err.count("\n") == 1
