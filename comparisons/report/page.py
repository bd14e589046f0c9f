"""The page of `triptych compare`: every workload with its charts, its figures and what the logs say."""

from html import escape
from typing import Any

from comparisons.report import figures
from comparisons.report.document import HERE, caption, facts, glance, legend
from comparisons.report.document import render as render_document
from comparisons.results import Results, Spread, WorkloadFacts
from comparisons.units import headline


def render(results: Results) -> str:
    charts: dict[str, Any] = {}
    body = (
        _own_traffic(results, charts)
        if results.client
        else "".join(_workload(results, workload, charts) for workload in results.workloads)
    )
    return render_document(
        "Triptych compare",
        _head(results),
        _broken(results) + body,
        charts,
        (HERE / "compare.js").read_text(encoding="utf-8"),
    )


def _head(results: Results) -> str:
    machine = results.machine
    kind = "the user's own client" if results.client else f"{len(results.workloads)} workloads"
    told = [
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
        told.insert(0, ("incomplete", "the run was interrupted; what it had measured until then is shown"))
    return (
        f"<h1>Triptych</h1><p class=lead>One echo and proxy service, three I/O models, {escape(kind)}.</p>"
        + legend(results.subjects)
        + _glance(results)
        + facts("How and on what it was measured", told)
    )


def _glance(results: Results) -> str:
    """All workloads at once: the headline of every subject, and its share of the best as a bar."""
    if not results.workloads:
        return ""
    rows = []
    for workload in results.workloads:
        found = [results.spread(workload.name, name, workload.headline) for name in results.subjects]
        note = "" if workload.headline == "throughput" else f"<small>{LESS}</small>"
        name = f'<a href="#{escape(workload.name)}">{escape(workload.title)}</a>{note}'
        told = [
            (headline(workload.headline, workload.unit, spread.median), spread.median) if spread else None
            for spread in found
        ]
        rows.append((name, told))
    return glance("At a glance", results.subjects, rows)


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
                f'<figure>{caption(title, note)}<div id="{escape(identity)}" class=plot></div></figure>'
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
        + caption("Wall time, s", LESS)
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
