"""The report: one page without a network, texts that cannot break it, sentences that follow the figures."""

import html.parser
import re
from pathlib import Path

import msgspec
import pytest
from browser import Page
from rich.console import Console

from comparisons.report import page, table
from comparisons.results import Cell, Facts, Machine, Results, Run, WorkloadFacts
from comparisons.workloads import signals
from comparisons.workloads.table import WORKLOADS, Workload

ECHO, BULK, IDLE = (
    next(entry for entry in WORKLOADS if entry.name == name) for name in ("echo-64-64", "bulk", "idle")
)
MACHINE = Machine(
    kernel="Linux 6", processor="a <fast> one", cores=2, python="3.11.7", pinning="", pinned=True, packages={}
)


def facts(**figures: float | None) -> Facts:
    empty: dict[str, object] = dict.fromkeys(Facts.__struct_fields__, 0)
    return Facts(**{**empty, "terminations": {"--": 1}, **figures})  # type: ignore[arg-type]  # the fields are of several types


def results(*cells: Cell) -> Results:
    return Results(
        created="2026-01-01T00:00:00+00:00",
        command=["compare"],
        seed=1,
        quick=False,
        rounds=2,
        complete=True,
        machine=MACHINE,
        subjects=["direct", "blocking", "nonblocking", "twisted"],
        cells=list(cells),
    )


def echo_cell(subject: str, throughput: float, threads: int, would_block: int, round_: int = 1) -> Cell:
    return Cell(
        workload=ECHO.name,
        subject=subject,
        round=round_,
        place=1,
        exchanges=1000,
        throughput=throughput,
        threads=threads,
        p50_us=10.0,
        p90_us=20.0,
        p99_us=40.0,
        log=facts(reads=1000, writes=1000, would_block=would_block),
    )


def told(found: Results, *workloads: Workload) -> Results:
    found.workloads = [
        WorkloadFacts(
            name=workload.name,
            title=workload.title,
            about=workload.about,
            unit=workload.unit,
            size=workload.size,
            headline=workload.headline,
            reference=workload.reference,
            sentence=signals.sentence(found, workload),
            signals=signals.figures(found, workload),
        )
        for workload in workloads
    ]
    return found


def test_a_sentence_names_the_leader_and_what_differs_most_with_its_numbers() -> None:
    found = results(
        echo_cell("blocking", 30_000, 65, 0),
        echo_cell("nonblocking", 60_000, 1, 980),
        echo_cell("twisted", 20_000, 1, 0),
    )
    assert signals.sentence(found, ECHO) == (
        "nonblocking led with 60,000 req/s, 3.0 times twisted's; they differ most in "
        "threads (blocking 65, nonblocking and twisted 1) and "
        "would_block a request (blocking and twisted 0.00, nonblocking 0.98), "
        "but not in reads a request (1.00) and writes a request (1.00)."
    )


def test_a_sentence_follows_the_data() -> None:
    level = results(echo_cell("blocking", 30_000, 1, 0), echo_cell("twisted", 29_900, 1, 0))
    sentence = signals.sentence(level, ECHO)
    assert sentence.startswith("The engines are level, blocking at 30,000 req/s; they do not differ")
    alone = signals.sentence(results(echo_cell("twisted", 5, 1, 0)), ECHO)
    assert alone.startswith("twisted alone: 5.00 req/s; its log tells reads a request (twisted 1.00)")
    broken = echo_cell("twisted", 5, 1, 0)
    broken.broken = "lost a byte"
    assert (
        signals.sentence(results(broken), ECHO)
        == "No engine has an unbroken cell here, so the logs explain nothing."
    )


def test_a_sentence_takes_the_median_of_the_rounds() -> None:
    cells = [echo_cell("blocking", speed, 1, 0, number) for number, speed in enumerate((1.0, 50.0, 3.0))]
    assert signals.sentence(results(*cells), ECHO).startswith("blocking alone: 3.00 req/s")


def test_a_proxied_sentence_says_the_share_of_the_floor_and_memory_is_better_when_less() -> None:
    cells = [
        Cell(
            workload=BULK.name,
            subject=name,
            round=1,
            place=1,
            throughput=speed,
            log=None if name == "direct" else facts(),
        )
        for name, speed in (("direct", 20.0), ("blocking", 10.0), ("twisted", 5.0))
    ]
    assert signals.sentence(results(*cells), BULK).startswith(
        "blocking led with 10.0 Gbit/s (50% of direct), 2.0 times twisted's"
    )
    cells = [
        Cell(
            workload=IDLE.name,
            subject=name,
            round=1,
            place=1,
            pss_bytes_per_session=size,
            threads=1,
            log=facts(),
        )
        for name, size in (("blocking", 40_960.0), ("twisted", 4_096.0))
    ]
    assert signals.sentence(results(*cells), IDLE).startswith(
        "twisted needs least, 4.0 KiB a session; blocking needs 10.0 times that"
    )


class Outside(html.parser.HTMLParser):
    """Collects everything that a page would load, and the text of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "srcset", "data", "poster", "action"} or (
                name == "href" and not (value or "").startswith("#")
            ):
                self.loaded.append(f"{tag} {name}={value}")


@pytest.fixture
def awkward() -> Results:
    """Results in which every free text tries to be more than text."""
    evil = "</script><script>alert(1)</script><img src=http://example.com/x>"
    broken = echo_cell("twisted", 1, 1, 1)
    broken.broken = evil
    found = told(results(echo_cell("blocking", 1.0, 1, 1), echo_cell("blocking", 2.0, 1, 1, 2), broken), ECHO)
    found.command = ["compare", evil]
    return found


def test_the_page_loads_nothing_from_anywhere(awkward: Results) -> None:
    text = page.render(awkward)
    parser = Outside()
    parser.feed(text)
    assert parser.loaded == []
    assert parser.tags.count("script") == 2
    assert "img" not in parser.tags
    assert "default-src 'none'" in text
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "@import" not in style[1]
    assert "url(" not in style[1]


def test_a_browser_draws_the_page_in_the_light_and_in_the_dark(awkward: Results, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.render(awkward), encoding="utf-8")
    bar = "document.getElementById('echo-64-64-throughput').data[0].marker.color"
    with Page(path, tmp_path / "chromium") as browser:
        light = browser.wait_for(bar)
        assert browser.evaluate("document.querySelectorAll('.plot .main-svg').length") > 0
        browser.prefer(dark=True)
        browser.wait_for(f"{bar} !== '{light}'")
        assert browser.faults == []


def test_the_charts_of_the_page_have_the_figures(awkward: Results) -> None:
    line = next(line for line in page.render(awkward).splitlines() if line.startswith("const charts = "))
    charts = msgspec.json.decode(line.removeprefix("const charts = ").removesuffix(";"))
    assert charts["echo-64-64-throughput"]["series"] == [
        {"name": "blocking", "values": [1.5], "low": [1.0], "high": [2.0]}
    ]
    assert charts["echo-64-64-p50_us"]["series"][0]["values"] == [10.0, 20.0, 40.0]


def test_the_table_shows_broken_cells_with_their_reason(awkward: Results) -> None:
    console = Console(width=100, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(table.render(awkward))
    text = capture.get()
    assert "BROKEN" in text
    assert "broken echo-64-64, twisted, round 1: </script>" in text
    assert "1.50" in text


def test_the_users_own_traffic_has_its_page() -> None:
    found = results()
    found.client = ["curl", "http://{host}:{port}/<x>"]
    found.runs = [
        Run(subject="direct", round=1, place=1, status=0, wall_s=1.0, ratio=1.0),
        Run(
            subject="twisted",
            round=1,
            place=2,
            status=7,
            wall_s=2.0,
            last_lines=["<b>no</b>"],
            log=facts(closed=3),
        ),
    ]
    text = page.render(found)
    assert "&lt;b&gt;no&lt;/b&gt;" in text
    assert "http://{host}:{port}/&lt;x&gt;" in text
    assert '"name":"twisted","values":[2.0]' in text
