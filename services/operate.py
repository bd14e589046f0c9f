"""The commands of whoever runs the daemons: `triptych status`, `triptych upstream`, `triptych session`.

They ask the control sockets (`control.py`): all that are found in the runtime directory, or the one given.
A change is made in every daemon that knows what it names, since engines side by side have the same pools.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import msgspec

from services.control import (
    HEAVIEST,
    MOST_SESSIONS,
    Answer,
    AnyRequest,
    AskStatus,
    CloseSession,
    Drain,
    Enable,
    Weight,
    ask,
    find,
)
from services.status import ListenerStatus, Status

# A live table is taken anew this often.
REFRESH = 1.0
# Sessions of each daemon in the table; --json has all that one answer holds.
SHOWN_SESSIONS = 20
NUMBER = re.compile(r"[0-9.]+(s| [KMGT]?i?B)?")

socket_option = click.option(
    "--socket", "path", type=click.Path(path_type=Path), metavar="PATH", help="Of one daemon."
)


class NoDaemon(click.ClickException):
    exit_code = 69


class NotPermitted(click.ClickException):
    exit_code = 77


class Unknown(click.ClickException):
    """What was named is in no daemon."""

    exit_code = 65


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="One object a line, one for each daemon.")
@click.option("--watch", is_flag=True, help="A live table, until interrupted.")
def status(path: Path | None, as_json: bool, watch: bool) -> int:
    """Show what the running daemons do."""
    if watch:
        if as_json or not sys.stdout.isatty():
            raise click.UsageError("--watch is for a terminal, and not with --json")
        return _watch(path)
    found, failures = _ask(path, AskStatus(version=1, sessions=MOST_SESSIONS if as_json else SHOWN_SESSIONS))
    for _, answer in found:
        if answer.status:
            text = msgspec.json.encode(answer.status) if as_json else "\n".join(_table(answer.status))
            click.echo(text)
    return _end(failures)


@click.group()
def upstream() -> None:
    """Drain, enable or weight an upstream."""


@upstream.command()
@click.argument("pool")
@click.argument("name")
@socket_option
def drain(pool: str, name: str, path: Path | None) -> int:
    """Give upstream NAME of POOL no new sessions."""
    return _change(path, Drain(version=1, pool=pool, upstream=name))


@upstream.command()
@click.argument("pool")
@click.argument("name")
@socket_option
def enable(pool: str, name: str, path: Path | None) -> int:
    """Give upstream NAME of POOL new sessions again."""
    return _change(path, Enable(version=1, pool=pool, upstream=name))


@upstream.command()
@click.argument("pool")
@click.argument("name")
@click.argument("number", type=click.IntRange(1, HEAVIEST))
@socket_option
def weight(pool: str, name: str, number: int, path: Path | None) -> int:
    """Give upstream NAME of POOL so many turns."""
    return _change(path, Weight(version=1, pool=pool, upstream=name, weight=number))


@click.group()
def session() -> None:
    """Close a session."""


@session.command()
@click.argument("identity", metavar="ID")
@socket_option
def close(identity: str, path: Path | None) -> int:
    """Reset both sides of session ID now, which its log line or `triptych status` names."""
    return _change(path, CloseSession(version=1, session=identity))


# Asking -----------------------------------------------------------------------------------------


def _ask(
    path: Path | None, request: AnyRequest
) -> tuple[list[tuple[Path, Answer]], list[click.ClickException]]:
    """The answers of the daemon given, or of all that are found, and what went wrong with others. A socket
    that a killed daemon left is none.
    """
    answers: list[tuple[Path, Answer]] = []
    failures: list[click.ClickException] = []
    for each in [path] if path else find(os.environ):
        try:
            answer = ask(each, request)
        except (ConnectionRefusedError, FileNotFoundError):
            if path:
                failures.append(NoDaemon(f"{each}: no daemon listens there; is it running?"))
        except PermissionError:
            failures.append(NotPermitted(f"{each}: not permitted; ask as the daemon's user or as root"))
        except TimeoutError:
            failures.append(NoDaemon(f"{each}: no answer in time; the daemon hangs or is stopped"))
        except OSError as error:
            failures.append(NoDaemon(f"{each}: {error.strerror or error}"))
        except ValueError as error:
            failures.append(NoDaemon(str(error)))
        else:
            if answer.fault in {None, "unknown"}:
                answers.append((each, answer))
            else:
                failures.append(NoDaemon(f"{each}: {answer.error}"))
    if not answers and not failures:
        failures.append(
            NoDaemon(
                "no daemon was found; name its socket with --socket (the log's interface_opened has it), or "
                "start one with [control] in its file"
            )
        )
    return answers, failures


def _change(path: Path | None, request: AnyRequest) -> int:
    answers, failures = _ask(path, request)
    done = [(where, answer) for where, answer in answers if answer.fault is None]
    for where, answer in done:
        click.echo(f"{where}: {_said(request, answer)}")
    if answers and not done:
        where, answer = answers[0]
        failures.append(Unknown(f"{where}: {answer.error}"))
    return _end(failures)


def _end(failures: Sequence[click.ClickException]) -> int:
    """One line each; the last one is told, and its exit code given, by the caller of all commands."""
    for failure in failures[:-1]:
        click.echo(f"triptych: {failure.message}", err=True)
    if failures:
        raise failures[-1]
    return 0


def _said(request: AnyRequest, answer: Answer) -> str:
    if answer.pool is None or not isinstance(request, Drain | Enable | Weight):
        return f"session {answer.closed} is closed"
    each = next(each for each in answer.pool.upstreams if each.upstream == request.upstream)
    return f"{answer.pool.pool} {each.upstream}: {each.state}, weight {each.weight}, {each.sessions} open sessions"


# Showing ----------------------------------------------------------------------------------------


def _watch(path: Path | None) -> int:
    """Until interrupted, also while daemons come and go."""
    before: dict[int, Status] = {}
    try:
        while True:
            answers, failures = _ask(path, AskStatus(version=1, sessions=SHOWN_SESSIONS))
            found = [answer.status for _, answer in answers if answer.status]
            lines = [line for each in found for line in _table(each, before.get(each.pid))]
            lines += [failure.message for failure in failures]
            before = {each.pid: each for each in found}
            size = shutil.get_terminal_size()
            shown = [line[: size.columns] for line in lines[: size.lines - 1]]
            # home, each line to its end, and what was below
            click.echo("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J", nl=False)
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        return 0


def _table(now: Status, before: Status | None = None) -> Iterator[str]:
    """Rates are since `before`, or since the daemon's start."""
    seconds = (now.uptime_us - (before.uptime_us if before else 0)) / 1e6 or 1.0

    def rate(value: Callable[[Status], int]) -> float:
        return (value(now) - (value(before) if before else 0)) / seconds

    unit = "" if now.instance == "-" else f", instance {now.instance}"
    draining = ", DRAINING" if now.draining else ""
    yield f"{now.engine} (pid {now.pid}{unit}): up {_duration(now.uptime_us)}{draining}"
    totals = now.totals
    yield (
        f"  {totals.open_sessions} sessions open, {totals.accepted} accepted, {totals.refused} refused; "
        f"from clients {_size(totals.bytes_c2s)} ({_size(rate(lambda each: each.totals.bytes_c2s))}/s), "
        f"to clients {_size(totals.bytes_s2c)} ({_size(rate(lambda each: each.totals.bytes_s2c))}/s)"
    )
    admission = now.admission
    limits = [f"sessions {admission.sessions} of {_or_any(admission.sessions_limit)}"]
    if admission.sessions_per_client_limit is not None:
        limits.append(
            f"of one client {admission.most_of_one_client} of {admission.sessions_per_client_limit}"
        )
    if admission.accept_rate is not None:
        limits.append(f"{admission.accept_rate} new a second, {admission.tokens} at once now")
    refused = [f"{count} by {cause}" for cause, count in admission.refused.items() if count]
    yield f"  limits: {', '.join(limits)}" + (f"; refused {', '.join(refused)}" if refused else "")
    accepted = {_key(each): each.accepted for each in before.listeners} if before else {}
    yield from _columns(
        ("LISTENER", "ADDRESS", "SERVICE", "POOL", "OPEN", "ACCEPTED", "NEW/S", "REFUSED", "FAULTS"),
        [
            (
                each.listener,
                " ".join(each.addresses) or "disabled",
                each.service,
                each.pool or "-",
                each.open_sessions,
                each.accepted,
                f"{(each.accepted - accepted.get(_key(each), 0)) / seconds:.1f}",
                each.refused,
                ",".join(each.faults) or "-",
            )
            for each in now.listeners
        ],
    )
    yield from _columns(
        (
            "POOL",
            "UPSTREAM",
            "STATE",
            "WEIGHT",
            "SESSIONS",
            "LIMIT",
            "ACCEPTED",
            "FAILED",
            "EJECTED",
            "QUEUE",
        ),
        [
            (
                pool.pool,
                each.upstream + (" (backup)" if each.backup else ""),
                each.state,
                each.weight,
                each.sessions,
                _or_any(each.limit),
                each.accepted,
                each.failed_dials,
                each.ejections,
                f"{pool.queued} of {pool.queue_limit}",
            )
            for pool in now.pools
            for each in pool.upstreams
        ],
    )
    yield from _columns(
        ("SESSION", "AGE", "IDLE", "CLIENT", "UPSTREAM", "FROM", "TO", "STATE", "PHASE", "WAITS FOR"),
        [
            (
                each.session,
                _duration(each.duration_us),
                _duration(each.idle_us),
                each.client or "-",
                each.upstream_address or "-",
                _size(each.bytes_c2s),
                _size(each.bytes_s2c),
                f"{each.state} {each.history}",
                each.phase,
                each.waits_for,
            )
            for each in now.sessions
        ],
    )
    if now.sessions and now.more_sessions:
        yield f"  and {now.more_sessions} younger ones"
    yield ""


def _key(each: ListenerStatus) -> tuple[str, ...]:
    return each.listener, each.service, each.transport


def _columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Nothing for no rows; numbers, also those with a unit, are set to the right."""
    texts = [list(header), *([str(cell) for cell in row] for row in rows)]
    if len(texts) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numbers = [all(map(NUMBER.fullmatch, column[1:])) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = zip(row, widths, numbers, strict=True)
        line = "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in cells)
        yield f"  {line.rstrip()}"


def _or_any(limit: int | None) -> str:
    return "any" if limit is None else str(limit)


def _duration(us: int) -> str:
    """Its two largest units."""
    seconds = us // 1_000_000
    if seconds < 60:
        return f"{us / 1e6:.1f}s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    return f"{hours}h{minutes}m" if hours else f"{minutes}m{seconds}s"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
