"""How fast the logs are read, beside the tools that operators have: `python -m comparisons.logs.bench`.

A million synthetic sessions are written once as ours and once as HAProxy would write them, then each tool
reads its own as a process of its own: wall time, CPU time of all its threads, peak memory. `halog` knows
timers in HTTP lines only, so HAProxy's lines have the shape of `option httplog`, with our connect time, our
wait for the first byte and our duration as theirs. What a tool can tell is said beside its time: halog
answers one question a run, `jq` counts, `goaccess` draws requests, and only the summary does all at once.

It compares what two tools tell of the same sessions, and exits with 99 if they tell different things.
"""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

from comparisons.logs.peers import haproxy_stamp
from comparisons.logs.show import console, table
from comparisons.logs.synthetic import lines

GATE = 99
# how often a running tool's memory is looked at
LOOK_S = 0.01
TRIPTYCH = (sys.executable, "-m", "services.cli", "logs")
COUNT_ENDINGS = "reduce inputs.termination as $how ({}; .[$how] += 1)"
# goaccess on lines of HTTP shape, as its manual builds formats
GOACCESS = '%^]: %h:%^ [%d:%t.%^] %^ %v/%^ %^/%^/%^/%^/%L %s %b %^ %^ %^ %^ %^ "%r"'


class Measured(Struct, frozen=True):
    """One run of one tool; `output` is its stdout."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    output: bytes


def run(command: Sequence[str | Path], source: Path | None = None) -> Measured:
    """Runs a command to its end with this file as its stdin."""
    with (source or Path(os.devnull)).open("rb") as stdin, tempfile.TemporaryFile() as output:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdin=stdin, stdout=output)
        peak_kib = 0
        with open(os.pidfd_open(process.pid), "rb", buffering=0) as ended:  # noqa: PTH123  a descriptor has no path
            # not ru_maxrss: that of a child begins with what its parent had
            while not select.select([ended], [], [], LOOK_S)[0]:
                found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                peak_kib = int(found[1]) if found else peak_kib
        wall_s = time.monotonic() - begun
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{command[0]}: exit {process.returncode}; see above")
        output.seek(0)
        return Measured(wall_s, used.ru_utime + used.ru_stime, peak_kib / 1024, output.read())


def write(count: int, seed: int, ours: Path, theirs: Path) -> None:
    """The same sessions as our lines and as HAProxy's, in the shape of `option httplog`."""
    with ours.open("wb") as own, theirs.open("w") as haproxy:
        for line, session in lines(count, seed):
            own.write(line)
            haproxy.write(httplog(session) + "\n")


def httplog(session: Mapping[str, Any]) -> str:
    """A session as an HTTP line of HAProxy's; -1 for what it never reached."""
    connect_us, first_us, duration_us = (
        session[name] for name in ("connect_us", "first_byte_us", "duration_us")
    )
    connect_ms = -1 if connect_us is None else connect_us // 1000
    response_ms = -1 if first_us is None or connect_us is None else (first_us - connect_us) // 1000
    return (
        f"Nov 22 00:00:00 localhost haproxy[{session['pid']}]: {session['client_ip']}:{session['client_port']} "
        f"[{haproxy_stamp(session['at_us'] - duration_us)}] front front/{session['upstream']} "
        f"0/0/{connect_ms}/{response_ms}/{duration_us // 1000} 200 {session['bytes_s2c']} - - "
        f'{session["termination"]}-- 1/1/1/1/0 0/0 "GET / HTTP/1.1"'
    )


@click.command()
@click.option("--lines", "count", default=1_000_000, show_default=True, help="How many sessions.")
@click.option("--seed", default=1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep the logs here.")
def main(count: int, seed: int, folder: Path | None) -> int:
    """Measure the readers of logs on the same sessions."""
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as scratch:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        return measure(count, seed, folder or Path(scratch))


def measure(count: int, seed: int, folder: Path) -> int:
    ours, theirs, packed = folder / "ours.log", folder / "haproxy.log", folder / "packed"
    click.echo(f"writing {count:,} sessions", err=True)
    write(count, seed, ours, theirs)
    shutil.rmtree(packed, ignore_errors=True)
    runs: list[tuple[str, str, Measured | None]] = []

    def measured(
        name: str, tells: str, command: Sequence[str | Path], source: Path | None = None
    ) -> Measured | None:
        click.echo(name, err=True)
        # a first look at the files, so that nobody pays for the disk
        subprocess.run(["cat", ours, theirs], stdout=subprocess.DEVNULL, check=True)
        found = run(command, source) if shutil.which(command[0]) else None
        runs.append((name, tells, found))
        return found

    everything = "all of the summary"
    summary = measured("logs summary, lines", everything, [*TRIPTYCH, "summary", "--json", ours])
    measured("logs compact", "nothing, once", [*TRIPTYCH, "compact", ours, "--to", packed])
    again = measured("logs summary, Parquet", everything, [*TRIPTYCH, "summary", "--json", packed])
    endings = measured("halog -tc", "terminations", ["halog", "-q", "-tc"], theirs)
    measured("halog -pct", "four percentile curves", ["halog", "-q", "-pct"], theirs)
    measured("halog -srv", "servers, mean times", ["halog", "-q", "-srv"], theirs)
    counted = measured("jq", "terminations", ["jq", "-n", COUNT_ENDINGS, ours])
    measured(
        "goaccess",
        "requests by host and hour",
        [
            "goaccess",
            theirs,
            "--no-progress",
            "--log-format",
            GOACCESS,
            "--date-format",
            "%d/%b/%Y",
            "--time-format",
            "%T",
            "-o",
            folder / "goaccess.json",
        ],
    )

    shown = table(
        f"{count:,} sessions, {ours.stat().st_size / 1e6:,.0f} MB of ours",
        "",
        ">wall, s",
        ">CPU, s",
        ">lines/s",
        ">peak, MiB",
        ">ratio",
    )
    first = next(found for _, _, found in runs if found)
    for name, _, found in runs:
        if found is None:
            shown.add_row(name, "not installed")
            continue
        shown.add_row(
            name,
            f"{found.wall_s:.2f}",
            f"{found.cpu_s:.2f}",
            f"{count / found.wall_s:,.0f}",
            f"{found.peak_mib:,.0f}",
            f"{found.wall_s / first.wall_s:.2f}",
        )
    console().print(shown)
    for name, tells, _ in runs:
        click.echo(f"{name}: {tells}")

    assert summary
    assert again
    told = {"logs summary, lines": terminations(json.loads(summary.output))}
    told["logs summary, Parquet"] = terminations(json.loads(again.output))
    if endings:
        told["halog -tc"] = {
            how: int(number) for how, number in re.findall(r"(\S\S) (\d+)", endings.output.decode())
        }
    if counted:
        told["jq"] = json.loads(counted.output)
    if any(counts != told["logs summary, lines"] for counts in told.values()):
        click.echo(f"the counts by termination differ: {told}", err=True)
        return GATE
    click.echo(f"the counts by termination are the same: {', '.join(told)}")
    return 0


def terminations(summary: Mapping[str, Any]) -> dict[str, int]:
    """How many sessions ended so, of a summary's JSON."""
    counts: dict[str, int] = {}
    for group in summary["groups"]:
        for ending in group["endings"]:
            counts[ending["termination"]] = counts.get(ending["termination"], 0) + ending["sessions"]
    return counts


if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
