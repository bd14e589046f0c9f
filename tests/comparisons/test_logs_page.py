"""`triptych logs page`: its figures against plain Python, and the page itself in a browser."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser import Page
from log_lines import NOT_OURS, Process, closed, written

from comparisons.logs import page
from comparisons.logs.reader import open_logs
from comparisons.logs.synthetic import lines
from services.cli import main
from services.vocabulary import EngineStalled, SessionClosed

EVIL = "</script><script>alert(1)</script><img src=http://example.com/x>"
SESSIONS = 6_000


def charts_of(text: str) -> dict[str, Any]:
    line = next(line for line in text.splitlines() if line.startswith("const charts = "))
    found: dict[str, Any] = msgspec.json.decode(line.removeprefix("const charts = ").removesuffix(";"))
    return found


def document(*paths: str) -> str:
    with open_logs(paths, page.COLUMNS) as logs:
        return page.document(logs, paths)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A page of a log of some thousand sessions, and their rows."""
    folder = tmp_path_factory.mktemp("page")
    made = list(lines(SESSIONS))
    log = written(folder / "log", [line.rstrip() for line, _ in made])
    assert main(["logs", "page", log, "-o", str(folder / "page.html")]) == 0
    return folder / "page.html", [row for _, row in made]


@pytest.fixture(scope="module")
def opened(
    rows: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with Page(rows[0], tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def test_the_curves_are_the_nearest_ranks_of_all_sessions(rows: tuple[Path, list[dict[str, Any]]]) -> None:
    curves = charts_of(rows[0].read_text())["curves"]
    for timer in ("duration_us", "connect_us"):
        for engine, curve in curves[timer].items():
            values = sorted(
                row[timer] for row in rows[1] if row["engine"] == engine and row[timer] is not None
            )
            assert curve["sessions"] == len(values)
            assert curve["x"][0] == 0
            for nines, us in zip(curve["x"], curve["y"], strict=True):
                rank = max(1, math.ceil(len(values) * (1 - 10**-nines) - 1e-6))
                # three significant figures, upwards
                assert values[rank - 1] <= us <= values[rank - 1] * (1 + 1 / 1024), (timer, engine, nines)


def test_no_session_is_missing_over_time(rows: tuple[Path, list[dict[str, Any]]]) -> None:
    time = charts_of(rows[0].read_text())["time"]
    seconds = time["step_us"] / 1e6
    for engine, series in time["series"].items():
        mine = [row for row in rows[1] if row["engine"] == engine]
        assert round(sum(series["opened"]) * seconds) == len(mine)
        assert round(sum(series["bad"]) * seconds) == sum(row["termination"] != "--" for row in mine)
        for step, count in enumerate(series["open"]):
            end_us = time["start_ms"] * 1000 + (step + 1) * time["step_us"]
            assert count == sum(row["at_us"] - row["duration_us"] < end_us <= row["at_us"] for row in mine)


def test_the_timeline_is_a_bounded_sample_and_says_so(rows: tuple[Path, list[dict[str, Any]]]) -> None:
    text = rows[0].read_text()
    charts = charts_of(text)
    shown = sum(map(len, charts["sessions"].values()))
    assert f"A sample, {shown:,} of {SESSIONS:,}" in text
    for engine, sample in charts["sessions"].items():
        assert page.EVEN < len(sample) <= 2 * page.EVEN + page.LONG + 2 * page.BAD
        longest = sorted((row["duration_us"] for row in rows[1] if row["engine"] == engine), reverse=True)
        assert sorted((took for _, took, *_ in sample), reverse=True)[: page.LONG] == [
            took / 1000 for took in longest[: page.LONG]
        ]


def test_a_small_log_is_shown_whole(tmp_path: Path) -> None:
    process = Process("twisted")
    said = [process.line(closed(number, duration_us=0)) for number in range(5)]
    text = document(written(tmp_path / "log", said))
    assert "All 5 of them" in text
    assert len(charts_of(text)["sessions"]["twisted"]) == 5


def test_the_page_draws_everything_and_asks_for_nothing(opened: Page) -> None:
    opened.wait_for("document.querySelectorAll('.main-svg').length >= 10")
    assert opened.faults == []
    drawn = opened.evaluate(
        "[...document.querySelectorAll('.plot, .timeline')].map((each) => [each.id, each.data.length])"
    )
    assert {name for name, _ in drawn} == {*page.TIMERS, "open", "opened", "bad", "timeline"}
    assert {traces for _, traces in drawn} == {3}
    assert opened.evaluate("document.querySelectorAll('#timeline .bars .point path').length") > 1_000


def test_its_text_is_readable_in_windows_wide_and_narrow(opened: Page) -> None:
    for width in (1600, 1280, 700, 390):
        opened.resize(width)
        # plotly follows the window a little later
        opened.wait_for(
            "document.documentElement.scrollWidth <= innerWidth && "
            "[...document.querySelectorAll('section')].every((each) => each.scrollWidth <= each.clientWidth)"
        )
    opened.resize(1280)


def range_of(browser: Page, chart: str) -> list[float]:
    found: list[float] = browser.evaluate(
        f"document.getElementById('{chart}')._fullLayout.xaxis.range.map((end) => Date.parse(end.replace(' ', 'T') + 'Z'))"
    )
    return found


def box(browser: Page, selector: str) -> tuple[float, float, float]:
    """Left, right and the middle height of an element, once it is in the window."""
    browser.evaluate(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    browser.settle()
    left, right, middle = browser.evaluate(
        f"(({{left, right, top, bottom}}) => [left, right, (top + bottom) / 2])"
        f"(document.querySelector('{selector}').getBoundingClientRect())"
    )
    return left, right, middle


def test_the_timeline_can_be_zoomed_into_and_out_again(opened: Page) -> None:
    whole = range_of(opened, "timeline")
    left, right, middle = box(opened, "#timeline .nsewdrag")
    opened.drag(left + (right - left) * 0.4, middle, left + (right - left) * 0.6)
    opened.wait_for("document.getElementById('timeline')._fullLayout.xaxis.autorange === false")
    zoomed = range_of(opened, "timeline")
    assert (zoomed[1] - zoomed[0]) / (whole[1] - whole[0]) == pytest.approx(0.2, abs=0.02)
    # one axis for the three engines
    assert opened.evaluate(
        "Object.keys(document.getElementById('timeline')._fullLayout).filter((name) => /^xaxis/.test(name))"
    ) == ["xaxis"]
    opened.evaluate("void Plotly.relayout('timeline', {'xaxis.autorange': true})")
    assert range_of(opened, "timeline") == whole


def test_a_zoom_into_one_chart_over_time_is_one_into_all(opened: Page) -> None:
    left, right, middle = box(opened, "#opened .nsewdrag")
    opened.drag(left + 100, middle, right - 100)
    opened.wait_for("document.getElementById('bad')._fullLayout.xaxis.autorange === false")
    assert range_of(opened, "open") == range_of(opened, "opened") == range_of(opened, "bad")


def test_a_session_of_the_timeline_can_be_read(opened: Page) -> None:
    opened.evaluate(
        "[...document.querySelectorAll('#timeline .bars .point path')]"
        ".reduce((a, b) => (a.getBBox().width > b.getBBox().width ? a : b)).id = 'widest'"
    )
    left, right, middle = box(opened, "#widest")
    opened.click((left + right) / 2, middle)
    text = opened.wait_for(
        "!document.getElementById('session').hidden && document.getElementById('session').innerText"
    )
    assert re.search(r"engine\s+blocking", text)
    assert re.search(r"termination\s+\S\S", text)
    assert re.search(r"session\s+\w{26}", text)


def test_colours_are_right_in_the_dark_too(opened: Page) -> None:
    light = opened.evaluate(
        "[document.getElementById('open').data[0].line.color, getComputedStyle(document.body).color]"
    )
    opened.prefer(dark=True)
    dark = opened.wait_for(
        "((now) => now[0] !== '" + light[0] + "' && now)"
        "([document.getElementById('open').data[0].line.color, getComputedStyle(document.body).color])"
    )
    assert dark[1] != light[1]
    opened.prefer(dark=False)
    assert opened.faults == []


def test_no_text_of_the_log_is_more_than_text(tmp_path: Path) -> None:
    session = closed(upstream=EVIL, error=EVIL, client_ip=EVIL, duration_us=1000)
    log = written(tmp_path / "log", [Process("twisted").line(session), NOT_OURS["text"]])
    text = document(log)
    assert text.count("<script") == 2
    assert "<img" not in text
    path = tmp_path / "page.html"
    path.write_text(text)
    with Page(path, tmp_path / "chromium") as browser:
        left, right, middle = box(browser, "#timeline .bars .point path")
        browser.click((left + right) / 2, middle)
        browser.wait_for("!document.getElementById('session').hidden")
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert EVIL in browser.evaluate("document.getElementById('session').innerText")
        assert browser.faults == []


def test_a_log_without_sessions_has_a_page_that_says_so(tmp_path: Path) -> None:
    stalled = Process("twisted").line(EngineStalled(loop_lag_us=7, open_sessions=1))
    assert "No session ended in these logs." in document(written(tmp_path / "log", [stalled]))


def test_the_logs_of_peers_stand_beside_ours(tmp_path: Path) -> None:
    haproxy = b"127.0.0.1:5 [22/Nov/2026:10:00:00.000] front back/r1 0/1/25 190 CD 4/4/4/4/0 0/0"
    zeek = (
        b'{"ts":1795305600.1,"uid":"C1","id.orig_h":"::1","id.orig_p":1,"id.resp_h":"::1","id.resp_p":2,'
        b'"proto":"tcp","conn_state":"SF","duration":0.5}'
    )
    ours = Process("twisted").line(closed(duration_us=7))
    said = {"haproxy": haproxy, "zeek": zeek, "ours": ours}
    text = document(*(written(tmp_path / name, [line]) for name, line in said.items()))
    assert charts_of(text)["engines"] == ["haproxy", "twisted", "zeek"]
    assert "the log does not tell how" in text


@pytest.mark.parametrize("termination", ["--", "CD", "SC", "sQ", "cL", "KD", "ID", "PQ", "RC", "DD"])
def test_every_termination_has_its_words(termination: str) -> None:
    assert re.fullmatch(SessionClosed.__annotations__["termination"].__metadata__[0].pattern, termination)
    assert ("in order" in page.in_words(termination)) == (termination == "--")
    assert page.in_words(termination).count(",") == (termination != "--")
