"""One HTML file with everything in it: it opens without a network, and its policy forbids any.

The style, the drawing and the colours of the engines are the same in every page that is made with it.
Charts are drawn by plotly.js, inlined once. The pages' texts are escaped by those who make them; data goes
into the script as JSON with `<` escaped, so that no value can end it.
"""

from html import escape
from pathlib import Path
from typing import Any

import msgspec
from plotly.offline import get_plotlyjs

HERE = Path(__file__).parent
# those that page.css has a colour for
COLOURED = {"direct", "blocking", "nonblocking", "twisted", "haproxy", "zeek"}


def render(title: str, head: str, body: str, charts: Any, script: str) -> str:
    """`head` and `body` are HTML; `script` draws `charts` with what page.js offers."""
    parts = {
        "title": escape(title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "common": (HERE / "page.js").read_text(encoding="utf-8"),
        "script": script,
        "charts": msgspec.json.encode(charts).decode().replace("<", "\\u003c"),
        "head": head,
        "body": body,
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    # split at the marks rather than replace one after the other: inserted text is never searched
    pieces = page.split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def colour(name: str) -> str:
    """What stands for this engine or peer in a style."""
    return f"var(--{name if name in COLOURED else 'other'})"


def legend(names: list[str]) -> str:
    items = (
        f'<li><span class="swatch" style="background:{colour(name)}"></span>{escape(name)}</li>'
        for name in names
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def facts(summary: str, told: list[tuple[str, str]]) -> str:
    """What can be unfolded: names and texts."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in told)
    return f"<details><summary>{escape(summary)}</summary><dl>{rows}</dl></details>"


Figure = tuple[str, float] | None


def glance(
    corner: str, columns: list[str], rows: list[tuple[str, list[Figure]]], whole: float | None = None
) -> str:
    """A table of figures that are seen before they are read: a row's name as HTML, and for each column a text
    and a bar of this share of `whole`, if there is none of the row's largest value.
    """
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    body = []
    for name, figures in rows:
        most = whole or max((value for _, value in filter(None, figures)), default=0.0)
        cells = "".join(
            _figure(figure, most, column) for figure, column in zip(figures, columns, strict=True)
        )
        body.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    return (
        f"<table class=glance><thead><tr><th scope=col>{escape(corner)}</th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _figure(figure: Figure, most: float, column: str) -> str:
    if figure is None:
        return "<td class=none>&ndash;</td>"
    text, value = figure
    width = 100 * value / most if most else 0
    return (
        f"<td><span class=figure>{escape(text)}</span>"
        f'<span class=bar><span style="width:{width:.1f}%;background:{colour(column)}"></span></span></td>'
    )


def caption(title: str, note: str) -> str:
    return f"<figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
