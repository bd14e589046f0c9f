"""The log in other programs: their configurations know every field of it, and lnav, which is in Debian, reads
it. Vector and Loki are not: of theirs only the structure is tested.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import Struct
from opentelemetry.semconv._incubating import attributes

from comparisons.logs import fields
from comparisons.logs.synthetic import lines
from services.logs import Log
from services.vocabulary import EVENTS, EngineStalled, Envelope, ServiceReady, UpstreamDown

DEPLOY = Path(__file__).parents[2] / "deploy"
REGENERATE = "run: python -m comparisons.logs.fields"
STRUCTS: tuple[type[Struct], ...] = (Envelope, *EVENTS)
VOCABULARY = {name for struct in STRUCTS for name in struct.__struct_fields__} | {"event"}
# what a stream of Loki's may be told apart by: each has as many values as there are engines, units or events
LABELS = {"engine", "instance", "event", "level"}


def test_every_field_of_the_log_has_a_meaning_and_no_other_has() -> None:
    assert set(fields.FIELDS) == VOCABULARY, "comparisons/logs/fields.py"


def test_the_page_of_the_fields_is_the_one_that_the_tables_make() -> None:
    text = (DEPLOY / "FIELDS.md").read_text(encoding="utf-8")
    assert text.endswith(fields.tables()), REGENERATE
    assert (
        f"`schema` is the number of this vocabulary, now {Envelope.__annotations__['schema'].__args__[0]}."
        in text
    )


def test_no_two_fields_have_one_name_elsewhere() -> None:
    for other in ("ecs", "otel", "zeek"):
        names = [name for field in fields.FIELDS.values() if (name := getattr(field, other))]
        assert not [name for name, count in Counter(names).items() if count > 1]


def test_a_name_that_is_opentelemetrys_is_in_its_conventions() -> None:
    known = {
        value
        for module in pkgutil.iter_modules(attributes.__path__)
        for value in vars(importlib.import_module(f"{attributes.__name__}.{module.name}")).values()
        if isinstance(value, str)
    }
    names = {field.otel for field in fields.FIELDS.values()} - set(fields.OTEL_RECORD)
    assert {name for name in names if not name.startswith("triptych.")} <= known


# lnav


def lnav(home: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["lnav", *arguments],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "xterm", "TZ": "UTC"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the format is installed, and a log of two processes lies."""
    home = tmp_path_factory.mktemp("lnav")
    lnav(home, "-i", str(DEPLOY / "lnav/triptych.json"))
    with (home / "sessions.jsonl").open("wb") as file:
        file.writelines(line for line, _ in lines(500))
    log = Log(str(home / "others.jsonl"), "debug", "twisted", instance="blue")
    log.emit(ServiceReady(addresses=["127.0.0.1:1"], start_us=3))
    log.emit(EngineStalled(loop_lag_us=7, open_sessions=1))
    log.emit(UpstreamDown(pool="redis", upstream="r1", reason="refused"))
    log.close()
    return home


def asked(home: Path, query: str) -> list[dict[str, Any]]:
    files = (str(home / "sessions.jsonl"), str(home / "others.jsonl"))
    found: list[dict[str, Any]] = json.loads(
        lnav(home, "-n", "-c", f";{query}", "-c", ":write-json-to -", *files)
    )
    return found


def test_lnav_knows_every_field_as_what_it_is(home: Path) -> None:
    values = json.loads((DEPLOY / "lnav/triptych.json").read_text(encoding="utf-8"))["triptych_log"]["value"]
    assert values == fields.lnav_values(values), REGENERATE
    assert set(values) == VOCABULARY - {"timestamp"}
    columns = {row["name"] for row in asked(home, "SELECT name FROM pragma_table_info('triptych_log')")}
    assert columns >= VOCABULARY - {"timestamp", "level"}


def test_lnav_counts_what_the_log_says(home: Path) -> None:
    rows = [row for _, row in lines(500)]
    query = (
        "SELECT engine, termination, count(*) AS sessions, sum(duration_us) AS us FROM triptych_log "
        "WHERE event = 'session_closed' GROUP BY engine, termination"
    )
    found = {(row["engine"], row["termination"]): (row["sessions"], row["us"]) for row in asked(home, query)}
    ours = Counter((row["engine"], row["termination"]) for row in rows)
    assert found == {
        how: (
            sessions,
            sum(row["duration_us"] for row in rows if (row["engine"], row["termination"]) == how),
        )
        for how, sessions in ours.items()
    }


def test_lnav_shows_a_line_for_a_line_with_its_level(home: Path) -> None:
    shown = lnav(home, "-n", str(home / "others.jsonl")).splitlines()
    assert len(shown) == 3
    assert all(" twisted " in line for line in shown)
    levels = asked(home, "SELECT event, log_level FROM triptych_log WHERE instance = 'blue' ORDER BY seq")
    assert [row["log_level"] for row in levels] == ["info", "warning", "error"]


# Vector and Loki


def test_vector_follows_the_files_that_the_units_write_and_labels_are_few() -> None:
    config = tomllib.loads((DEPLOY / "vector/triptych.toml").read_text(encoding="utf-8"))
    parts = {name: part for kind in ("sources", "transforms", "sinks") for name, part in config[kind].items()}
    assert {each for part in parts.values() for each in part.get("inputs", ())} < set(parts)
    [source], [transform], [sink] = (
        list(config[kind].values()) for kind in ("sources", "transforms", "sinks")
    )
    [pattern] = source["include"]
    assert pattern in (DEPLOY / "logrotate.conf").read_text(encoding="utf-8")
    labels = {name: value for name, value in sink["labels"].items() if "{{" in value}
    assert set(labels) == LABELS
    assert all(value == f"{{{{ {name} }}}}" for name, value in labels.items())
    # each label is taken from the line
    for name in LABELS:
        assert f".{name} = string(line.{name})" in transform["source"]


def test_queries_to_loki_select_by_labels_and_ask_for_fields_that_are_there() -> None:
    text = (DEPLOY / "loki/loki.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["schema_config"]["configs"][0]["schema"] == "v13"
    selectors = re.findall(r"\{(job=.*?)\}", text)
    assert len(selectors) == 3
    for selector in selectors:
        assert set(re.findall(r"(\w+)=", selector)) <= LABELS | {"job"}
    for event in re.findall(r'event="(\w+)"', text):
        assert event in {each.NAME for each in EVENTS}
    asked_for = re.findall(r"\| (?:json|unwrap) (\w+)", text)
    assert asked_for
    assert set(asked_for) <= VOCABULARY
