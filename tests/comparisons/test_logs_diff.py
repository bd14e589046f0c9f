"""`triptych logs diff`: the differences are those that were put there, and none where there is none."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest
from log_troubles import SLOW, scene

from comparisons.logs import diff
from comparisons.logs.synthetic import lines as synthetic
from services.cli import main

Capture = pytest.CaptureFixture[str]
Line = dict[str, Any]


def diffed(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    assert main(["logs", "diff", "--json", *map(str, arguments)]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def written(log: Path, count: int, change: Callable[[Line], Line] = dict) -> Path:
    def changed() -> Iterator[bytes]:
        for line, _ in synthetic(count):
            yield msgspec.json.encode(change(msgspec.json.decode(line))) + b"\n"

    log.write_bytes(b"".join(changed()))
    return log


def verdicts(comparison: dict[str, Any], other: str) -> dict[tuple[str, str], str]:
    return {
        (finding["metric"], finding["statistic"]): finding["verdict"]
        for finding in comparison["findings"]
        if finding["other"] == other
    }


def test_engines_that_differ_in_nothing_show_no_difference(tmp_path: Path, capsys: Capture) -> None:
    [comparison] = diffed(capsys, written(tmp_path / "log", 6000))["comparisons"]
    assert comparison["base"] == {"name": "blocking", "sessions": 2000, "compared": 2000}
    assert [other["name"] for other in comparison["others"]] == ["nonblocking", "twisted"]
    for other in ("nonblocking", "twisted"):
        found = verdicts(comparison, other)
        assert set(found.values()) <= {"no difference", "not enough data"}
        assert found["connect_us", "typical"] == "no difference"
        assert found["cpu_us", "mean"] == "not enough data"


def test_an_engine_that_takes_20_ms_longer_is_worse_by_20_ms(tmp_path: Path, capsys: Capture) -> None:
    def slow(line: Line) -> Line:
        late = 20_000 if line["engine"] == "twisted" and line["first_byte_us"] is not None else 0
        first_byte_us = None if line["first_byte_us"] is None else line["first_byte_us"] + late
        return line | {"first_byte_us": first_byte_us, "duration_us": line["duration_us"] + late}

    log = written(tmp_path / "log", 6000, slow)
    [comparison] = diffed(capsys, "--base", "nonblocking", log)["comparisons"]
    found = verdicts(comparison, "twisted")
    assert found["first_byte_us", "typical"] == found["duration_us", "typical"] == "worse"
    assert found["connect_us", "typical"] == "no difference"
    effect = next(
        finding["effect"]
        for finding in comparison["findings"]
        if (finding["other"], finding["metric"], finding["statistic"])
        == ("twisted", "first_byte_us", "typical")
    )
    assert effect["low"] <= 20_000 <= effect["high"]
    assert effect["high"] - effect["low"] < 200
    lines = map(msgspec.json.decode, log.read_bytes().splitlines())
    times = [
        line["first_byte_us"]
        for line in lines
        if line["engine"] == "twisted" and line["first_byte_us"] is not None
    ]
    assert effect["other"] == median(times)


def test_before_against_after_tells_what_became_slower(tmp_path: Path, capsys: Capture) -> None:
    logs = []
    for name in ("before", "after"):
        directory = tmp_path / name
        directory.mkdir()
        with scene(directory) as stage:
            if name == "after":
                stage.fault(SLOW)
            stage.talk(40)
        logs.append(stage.log)
    before, after = logs
    [comparison] = diffed(capsys, after, "--against", before)["comparisons"]
    assert comparison["base"]["name"] == "nonblocking before"
    found = verdicts(comparison, "nonblocking")
    assert found["first_byte_us", "typical"] == found["duration_us", "typical"] == "worse"
    assert found["resets", "share"] in {"no difference", "not enough data"}
    assert main(["logs", "diff", str(after), "--against", str(before)]) == 0
    said = capsys.readouterr().out
    assert "nonblocking against nonblocking before" in said
    assert "nonblocking: worse: first byte (+2" in said


def test_of_many_sessions_a_sample_by_chance_is_compared(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "MOST", 500)
    log = written(tmp_path / "log", 6000)
    first = diffed(capsys, log)
    [comparison] = first["comparisons"]
    assert comparison["base"] == {"name": "blocking", "sessions": 2000, "compared": 500}
    assert diffed(capsys, log) == first
    assert main(["logs", "diff", str(log)]) == 0
    assert "blocking: 2,000 sessions, 500 of them compared" in capsys.readouterr().out


def test_sessions_that_the_operator_cut_are_not_compared(tmp_path: Path, capsys: Capture) -> None:
    def cut(line: Line) -> Line:
        return line | ({"termination": "KD"} if line["seq"] < 10 else {})

    [comparison] = diffed(capsys, written(tmp_path / "log", 300, cut))["comparisons"]
    assert comparison["base"]["sessions"] == 90


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "two sides are needed, and blocking is all that has sessions here by engine"),
        (
            ("--base", "twisted", "--by", "upstream"),
            "--base: 'twisted' is none of 10.2.0.1:6379, 10.2.0.2:6379",
        ),
        (("--base", "x", "--against", "y"), "--base and --against are two ways"),
    ],
)
def test_sides_that_are_not_there_are_exit_code_64(
    tmp_path: Path, capsys: Capture, arguments: tuple[str, ...], said: str
) -> None:
    log = written(tmp_path / "log", 60, lambda line: line | {"engine": "blocking"})
    assert main(["logs", "diff", str(log), *arguments]) == 64
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
