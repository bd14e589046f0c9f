"""Quantities as text, the same in the table, on the page and in the sentences."""


def number(value: float) -> str:
    """Three significant digits or more, thousands separated."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def microseconds(value: float) -> str:
    return (
        f"{value / 1e6:.2f} s"
        if value >= 1e6
        else f"{value / 1e3:.1f} ms"
        if value >= 1e4
        else f"{value:,.0f} µs"
    )


def size(value: float) -> str:
    if value >= 2**20:
        return f"{value / 2**20:.1f} MiB"
    return f"{value / 2**10:.1f} KiB" if value >= 2**10 else f"{value:.0f} B"


def percent(value: float) -> str:
    return f"{value:.0%}"


def headline(field: str, unit: str, value: float) -> str:
    """A workload's headline figure with its unit."""
    return f"{size(value)} a session" if field == "pss_bytes_per_session" else f"{number(value)} {unit}"
