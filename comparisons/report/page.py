"""One HTML page with everything in it: it opens without a network, and its policy forbids any.

Charts are drawn by plotly.js, inlined once. Every text is escaped; data goes into the script as
JSON with `<` escaped, so that no value can end it.
"""

from html import escape
from pathlib import Path
from typing import Any

import msgspec
from plotly.offline import get_plotlyjs

from comparisons.report import figures
from comparisons.results import Results, Spread, WorkloadFacts
from comparisons.units import headline

HERE = Path(__file__).parent
# told apart by the colour-blind too (Okabe and Ito, 2008); the floor recedes
COLOURS = {"direct": "#8a9199", "blocking": "#0072b2", "nonblocking": "#009e73", "twisted": "#d55e00"}


def render(results: Results) -> str:
    charts: dict[str, Any] = {}
    body = (
        _own_traffic(results, charts)
        if results.client
        else "".join(_workload(results, workload, charts) for workload in results.workloads)
    )
    parts = {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "charts": msgspec.json.encode(charts).decode().replace("<", "\\u003c"),
        "colours": msgspec.json.encode(COLOURS).decode(),
        "head": _head(results),
        "broken": _broken(results),
        "body": body,
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    # split at the marks rather than replace one after the other: inserted text is never searched
    pieces = page.split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _head(results: Results) -> str:
    machine = results.machine
    kind = "the user's own client" if results.client else f"{len(results.workloads)} workloads"
    facts = [
        ("measured", results.created.replace("T", " ")),
        ("rounds", f"{results.rounds}, order shuffled in each{', quick' if results.quick else ''}"),
        ("seed", str(results.seed)),
        ("took", f"{results.seconds:g} s"),
        ("machine", f"{machine.processor}, {machine.cores} cores, {machine.kernel}"),
        ("cores", machine.pinning),
        ("Python", machine.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
        ("command", " ".join(["triptych", *results.command])),
    ]
    if not results.complete:
        facts.insert(0, ("incomplete", "the run was interrupted; what it had measured until then is shown"))
    legend = "".join(
        f'<li><span class="swatch" style="background:{COLOURS[name]}"></span>{escape(name)}</li>'
        for name in results.subjects
    )
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return (
        f"<h1>Triptych</h1><p class=lead>One echo and proxy service, three I/O models, {escape(kind)}.</p>"
        f"<ul class=legend>{legend}</ul>{_glance(results)}<details><summary>How and on what it was measured</summary><dl>{rows}</dl></details>"
    )


def _glance(results: Results) -> str:
    """All workloads at once: the headline of every subject, and its share of the best as a bar."""
    if not results.workloads:
        return ""
    rows = []
    for workload in results.workloads:
        found = {name: results.spread(workload.name, name, workload.headline) for name in results.subjects}
        most = max((spread.median for spread in found.values() if spread), default=0.0)
        cells = "".join(_glance_cell(workload, name, spread, most) for name, spread in found.items())
        note = "" if workload.headline == "throughput" else f"<small>{LESS}</small>"
        rows.append(
            f'<tr><th scope=row><a href="#{escape(workload.name)}">{escape(workload.title)}</a>'
            f"{note}</th>{cells}</tr>"
        )
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in results.subjects)
    return f"<table class=glance><thead><tr><th scope=col>At a glance</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _glance_cell(workload: WorkloadFacts, name: str, spread: Spread | None, most: float) -> str:
    if spread is None:
        return "<td class=none>&ndash;</td>"
    text = headline(workload.headline, workload.unit, spread.median)
    width = 100 * spread.median / most if most else 0
    return (
        f"<td><span class=figure>{escape(text)}</span>"
        f'<span class=bar><span style="width:{width:.1f}%;background:{COLOURS[name]}"></span></span></td>'
    )


def _workload(results: Results, workload: WorkloadFacts, charts: dict[str, Any]) -> str:
    signals = [
        (name, [texts.get(subject, "") for subject in results.subjects])
        for name, texts in workload.signals.items()
    ]
    drawn = []
    for title, note, kind, fields in _charts(workload):
        series = [
            {"name": subject, **drawing}
            for subject in results.subjects
            if (drawing := _series(results, workload.name, subject, fields))
        ]
        if series:
            identity = f"{workload.name}-{fields[0]}"
            charts[identity] = {"kind": kind, "series": series, "labels": ["p50", "p90", "p99"]}
            drawn.append(
                f'<figure>{_caption(title, note)}<div id="{escape(identity)}" class=plot></div></figure>'
            )
    faults = "".join(
        f"<li><b>{escape(subject)}</b>, round {number}: {escape(reason)}</li>"
        for subject, number, reason in figures.faults(results, workload.name)
    )
    return (
        f'<section id="{escape(workload.name)}"><h2>{escape(workload.title)}</h2><p class=about>{escape(workload.about)}</p>'
        f"<p class=why>{escape(workload.sentence)}</p>"
        + (f"<ul class=faults>{faults}</ul>" if faults else "")
        + f"<div class=plots>{''.join(drawn)}</div>"
        + _table(results.subjects, figures.lines(results, workload, ranges=True))
        + f"<details><summary>What the logs say</summary>{_table(results.subjects, signals)}</details></section>"
    )


def _caption(title: str, note: str) -> str:
    return f"<figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"


def _charts(workload: WorkloadFacts) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Title, note, kind and fields of the charts of a workload, the headline first."""
    throughput = (f"Throughput, {workload.unit}", "more is better", "bars", ("throughput",))
    latency = ("Latency, µs", "log axis, less is better", "lines", ("p50_us", "p90_us", "p99_us"))
    cpu = (
        f"CPU µs a {'connection' if workload.unit == 'conn/s' else 'request'}",
        LESS,
        "bars",
        ("cpu_us_per_request",),
    )
    if workload.unit == "Gbit/s":
        cpu = ("CPU seconds a GB", LESS, "bars", ("cpu_s_per_gb",))
    if workload.headline == "throughput":
        return [throughput, latency, cpu, ("PSS, MiB", LESS, "bars", ("pss_bytes",))]
    return [("PSS a session, KiB", LESS, "bars", ("pss_bytes_per_session",)), throughput, latency, cpu]


LESS = "less is better"
SCALE = {"pss_bytes": 2**20, "pss_bytes_per_session": 2**10}


def _series(
    results: Results, workload: str, subject: str, fields: tuple[str, ...]
) -> dict[str, list[float]] | None:
    """The medians of some fields and how far they reach; None where the subject has none of them."""
    spreads = [spread for field in fields if (spread := results.spread(workload, subject, field))]
    return _drawing(spreads, SCALE.get(fields[0], 1)) if spreads else None


def _drawing(spreads: list[Spread], scale: float) -> dict[str, list[float]]:
    return {
        "values": [spread.median / scale for spread in spreads],
        "low": [spread.min / scale for spread in spreads],
        "high": [spread.max / scale for spread in spreads],
    }


def _own_traffic(results: Results, charts: dict[str, Any]) -> str:
    series = [
        {"name": subject, **_drawing([spread], 1)}
        for subject in results.subjects
        if (spread := results.run_spread(subject, lambda run: run.wall_s))
    ]
    charts["wall"] = {"kind": "bars", "series": series, "labels": []}
    said = "".join(
        f"<li><b>{escape(run.subject)}</b>, round {run.round}: <code>{escape(' | '.join(run.last_lines))}</code></li>"
        for run in results.runs
        if run.last_lines
    )
    return (
        f"<section><h2>Your own client</h2><p class=about><code>{escape(' '.join(results.client))}</code></p>"
        "<div class=plots><figure>"
        + _caption("Wall time, s", LESS)
        + "<div id=wall class=plot></div></figure></div>"
        + _table(results.subjects, figures.run_lines(results, ranges=True))
        + (f"<h3>What it said when it failed</h3><ul>{said}</ul>" if said else "")
        + "</section>"
    )


def _table(subjects: list[str], lines: list[tuple[str, list[str]]]) -> str:
    heads = "".join(f"<th scope=col>{escape(subject)}</th>" for subject in subjects)
    rows = "".join(
        f"<tr><th scope=row>{escape(label)}</th>{''.join(map(_table_cell, texts))}</tr>"
        for label, texts in lines
    )
    return f"<table class=figures><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _table_cell(text: str) -> str:
    return f"<td>{escape(text)}</td>" if text else "<td class=none>&ndash;</td>"


def _broken(results: Results) -> str:
    broken = results.broken()
    if not broken:
        return ""
    items = "".join(
        f"<li><b>{escape(figures.name(entry))}</b>, round {entry.round}: {escape(entry.broken or '')}</li>"
        for entry in broken
    )
    return (
        f"<aside><h2>{len(broken)} broken</h2><p>These did not return what was sent, or their log contradicts the load. "
        f"They are in no figure below.</p><ul>{items}</ul></aside>"
    )
