"""`triptych logs tail`: the log while it is written, one line for people a line.

Files are followed through rotation (a name that stands for another file: what is still written to the old
one is read too) and truncation; a stream (`-`, a pipe) until its end. What wraps ours or is a peer's is
shown as ours; what is neither is shown as it is, and called not ours.

Reading never waits for a terminal. Lines that a terminal did not take in time are counted in their place,
so what it shows is never older than PATIENCE. A pipe gets every line, however long it takes.
"""

import os
import re
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import eq, ge, gt, itemgetter, le, lt, ne
from pathlib import Path
from typing import Any

import click
import msgspec

from comparisons.logs.fields import ENVELOPE, FIELDS, NUMBERS
from comparisons.logs.show import console, duration, printable, size
from comparisons.logs.sources import LINE_LIMIT, MAGIC, Unreadable, translated, unwrapped
from services.vocabulary import EVENTS

# seconds between two looks at a file: at 10,000 lines a second some 500 lines
POLL = 0.05
# so long a line waits for a terminal, and a replaced file for a writer that has not reopened its log yet
PATIENCE = 0.5
REPLACED = 5.0
CHUNK = 1 << 20
# lines that a terminal is given at once: little enough that the next ones need not wait
BATCH = 50

STDOUT = 1

Line = dict[str, Any]
Test = Callable[[Line], bool]
DECODE = msgspec.json.Decoder().decode

COMPARISONS = {"=": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
CONSTANTS = {"null": None, "true": True, "false": False}
CONDITION = re.compile(r"([a-z0-9_]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)

COLOURS = {"blocking": "34", "nonblocking": "32", "twisted": "33", "haproxy": "35", "zeek": "36"}
# what every line that is shown as ours has
ALWAYS = ("timestamp", "level", "event", "engine")
LEVELS = {"debug": "2", "warning": "33", "error": "31"}
WIDEST = max(map(len, COLOURS))


class Session(msgspec.Struct):
    """What is shown of a session's end; a peer's log knows only some of it."""

    client_ip: str | None = None
    client_port: int | None = None
    service: str | None = None
    upstream: str | None = None
    duration_us: int = 0
    bytes_c2s: int | None = None
    bytes_s2c: int | None = None
    state: str | None = None
    history: str | None = None
    termination: str | None = None
    error: str | None = None
    faults: str | None = None
    paused_us: int | None = None
    client_retrans: int | None = None
    upstream_retrans: int | None = None


class Where(click.ParamType[Test]):
    name = "condition"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Test:
        found = CONDITION.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} is no FIELD=VALUE; compare with = != < <= > >=", param, ctx)
        field, how, text = found.groups()
        if field not in FIELDS:
            self.fail(f"{field}: no such field; `triptych logs sql --views` names them", param, ctx)
        compare: Callable[[Any, Any], Any] = COMPARISONS[how]
        wanted: Any = text
        if text in CONSTANTS:
            wanted = CONSTANTS[text]
        elif field in NUMBERS:
            try:
                wanted = int(text)
            except ValueError:
                self.fail(f"{field} is a number, and {text!r} is none", param, ctx)

        def test(line: Line) -> bool:
            try:
                return bool(compare(line.get(field), wanted))
            except TypeError:
                # null is neither more nor less
                return False

        return test


@click.command(name="tail")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "-n", "--lines", "last", default=10, show_default=True, help="Of each file, before what is new."
)
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="Only this one's; may be repeated.")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice([event.NAME for event in EVENTS]),
    metavar="NAME",
    help="Only these; may be repeated.",
)
@click.option(
    "--where",
    "conditions",
    multiple=True,
    type=Where(),
    metavar="FIELD=VALUE",
    help="Or != < <= > >=, as in duration_us>20000 or termination!=--; may be repeated, all must hold.",
)
def command(
    files: tuple[str, ...],
    last: int,
    engines: tuple[str, ...],
    events: tuple[str, ...],
    conditions: tuple[Test, ...],
) -> None:
    """Show the lines as they come, until Ctrl-C. Times are UTC.

    FILE is a log that is being written, - is standard input, as in journalctl -f -o json | triptych logs tail -
    """

    def wanted(line: Line) -> bool:
        return (
            (not engines or line["engine"] in engines)
            and (not events or line["event"] in events)
            and all(condition(line) for condition in conditions)
        )

    sources = [_open(name, last) for name in dict.fromkeys(files)]
    output = console()
    render = _Renderer(coloured=output.color_system is not None and not output.no_color)
    screen = _Terminal() if sys.stdout.isatty() else _Pipe()
    _follow(sources, wanted, render, screen)
    screen.close()


def _follow(
    sources: Sequence["_Followed | _Stream"], wanted: Test, render: "_Renderer", screen: "_Terminal | _Pipe"
) -> None:
    output = select.poll()
    # no events: an error and a hang-up are told anyway
    output.register(STDOUT, 0)
    # whoever reads may leave while there is nothing to write
    while sources and not output.poll(0):
        found: list[tuple[str, str]] = []
        for source in sources:
            stamp = ""
            for raw in source.lines():
                line = _decoded(raw)
                if line is None:
                    found.append((stamp, render.not_ours(raw)))
                    continue
                stamp = line["timestamp"]
                if wanted(line):
                    found.append((stamp, render(line)))
        if len(sources) > 1:
            found.sort(key=itemgetter(0))
        screen.show([text for _, text in found])
        sources = [source for source in sources if not source.ended]
        if not any(source.behind for source in sources):
            streams = [source.stream for source in sources if source.stream is not None]
            select.select(streams, (), (), POLL)


def _decoded(raw: bytes) -> Line | None:
    """The line, a peer's as one of ours; None if it is neither."""
    text = unwrapped(raw)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        line = DECODE(text)
        if isinstance(line, dict) and all(isinstance(line.get(name), str) for name in ALWAYS):
            return line
    return translated(text)


class _Renderer:
    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, line: Line) -> str:
        level, engine = line["level"], line["engine"]
        told = None
        if line["event"] == "session_closed":
            try:
                told = self._session(msgspec.convert(line, Session))
            except msgspec.ValidationError:
                told = None
        if told is None:
            fields = (
                f"{self._paint('2', name + '=')}{_text(value)}"
                for name, value in line.items()
                if name not in ENVELOPE and value is not None
            )
            told = f"{self._paint(LEVELS.get(level, '1'), _safe(line['event']))} {' '.join(fields)}"
        name = self._paint(COLOURS.get(engine, "0"), f"{_safe(engine):<{WIDEST}}")
        return f"{self._paint('2', _safe(line['timestamp'][11:23]))} {name} {told}"

    def not_ours(self, raw: bytes) -> str:
        text = _safe(raw.rstrip(b"\r\n").decode(errors="backslashreplace"))
        return f"{self._paint('31', 'not ours:')} {self._paint('2', text)}"

    def _session(self, session: Session) -> str:
        how = f"{session.state or '-':<4} {session.termination or '??'}"
        client = "unix" if session.client_ip is None else f"{session.client_ip}:{session.client_port}"
        to = session.upstream or session.service or "-"
        amounts = [
            f"{size(amount)} {direction}"
            for amount, direction in ((session.bytes_c2s, "up"), (session.bytes_s2c, "down"))
            if amount is not None
        ]
        parts = [
            self._paint("32" if session.termination == "--" else "31", _safe(how)),
            f"{_safe(client)} > {_safe(to)}",
            duration(session.duration_us),
            ", ".join(amounts),
            _safe(session.history or ""),
        ]
        # what is not so in every session
        parts += [
            self._paint("33", f"{name}={_text(value)}")
            for name, value in (
                ("error", session.error),
                ("faults", session.faults),
                ("paused", duration(session.paused_us) if session.paused_us else None),
                ("client_retrans", session.client_retrans),
                ("upstream_retrans", session.upstream_retrans),
            )
            if value
        ]
        return "  ".join(filter(None, parts))

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured else text


def _text(value: Any) -> str:
    return _safe(",".join(map(str, value)) if isinstance(value, list) else str(value))


def _safe(text: str) -> str:
    return text if text.isprintable() else printable(text)


def _open(name: str, last: int) -> "_Followed | _Stream":
    try:
        descriptor = 0 if name == "-" else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return _Followed(name, descriptor, last)
        if stat.S_ISDIR(mode):
            raise Unreadable(f"{printable(name)}: a folder; name a log that is being written")
        return _Stream(descriptor)
    except OSError as error:
        raise Unreadable(
            f"{printable(name)}: {error.strerror}; name a log that can be read, or - for stdin"
        ) from error


class _Lines:
    """Bytes in, whole lines out."""

    def __init__(self) -> None:
        self._rest = b""

    def whole(self, data: bytes) -> list[bytes]:
        *found, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_LIMIT:
            found.append(self.torn())
        return [line for line in found if line.strip()]

    def torn(self) -> bytes:
        """What was begun and will not be ended."""
        rest, self._rest = self._rest, b""
        return rest


class _Stream:
    # select tells when there is more
    behind = False

    def __init__(self, descriptor: int) -> None:
        self.stream: int | None = descriptor
        self.ended = False
        self._lines = _Lines()

    def lines(self) -> list[bytes]:
        if self.stream is None or not select.select([self.stream], (), (), 0)[0]:
            return []
        data = os.read(self.stream, CHUNK)
        self.ended = not data
        return self._lines.whole(data or b"\n")


class _Followed:
    """What a name stands for, whichever file that is at the time."""

    stream = None
    ended = False

    @property
    def behind(self) -> bool:
        return any(file.behind for file in self._files)

    def __init__(self, name: str, descriptor: int, last: int) -> None:
        self._name = name
        self._files = [_File(descriptor)]
        self._files[0].skip_to_last(last, name)

    def lines(self) -> list[bytes]:
        if self._files[-1].is_not(self._name):
            # there may be none between two files of a rotation; the old one is still read
            with suppress(OSError):
                self._files.append(_File(os.open(self._name, os.O_RDONLY | os.O_CLOEXEC)))
        found = [line for file in self._files for line in file.lines()]
        while len(self._files) > 1 and self._files[0].silent_for() > REPLACED:
            found += filter(None, [self._files.pop(0).close()])
        return found


class _File:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines = _Lines()
        self._offset = 0
        self._read_at = time.monotonic()
        # there is more to read at once
        self.behind = False

    def skip_to_last(self, last: int, name: str) -> None:
        """The next lines are the last ones of the file."""
        if os.pread(self._descriptor, 4, 0).startswith(tuple(MAGIC)):
            raise click.UsageError(f"{printable(name)} is an archive; name a log that is being written")
        self._offset = end = os.fstat(self._descriptor).st_size
        newlines = 0
        # the last newline ends the last line
        while self._offset and newlines <= last:
            self._offset = max(0, self._offset - CHUNK)
            block = os.pread(self._descriptor, min(CHUNK, end - self._offset), self._offset)
            end = self._offset
            newlines += block.count(b"\n")
        if newlines > last:
            for _ in range(newlines - last):
                at = block.index(b"\n") + 1
                self._offset += at
                block = block[at:]

    def is_not(self, name: str) -> bool:
        """Whether the name stands for another file by now."""
        try:
            there = Path(name).stat()
        except OSError:
            return False
        here = os.fstat(self._descriptor)
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def lines(self) -> list[bytes]:
        found = []
        if os.fstat(self._descriptor).st_size < self._offset:
            self._offset = 0
            found = [self._lines.torn()]
        data = os.pread(self._descriptor, CHUNK, self._offset)
        self.behind = len(data) == CHUNK
        if data:
            self._offset += len(data)
            self._read_at = time.monotonic()
        return list(filter(None, found + self._lines.whole(data)))

    def silent_for(self) -> float:
        return time.monotonic() - self._read_at

    def close(self) -> bytes:
        os.close(self._descriptor)
        return self._lines.torn()


class _Pipe:
    """Whoever reads it gets every line, and reading waits for that."""

    def show(self, lines: Sequence[str]) -> None:
        if lines:
            # as they are: whether they have colours was decided
            click.echo("\n".join(lines), color=True)

    def close(self) -> None:
        pass


class _Terminal:
    def __init__(self) -> None:
        self._lines: deque[tuple[float, str]] = deque()
        self._late = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()

    def show(self, lines: Sequence[str]) -> None:
        now = time.monotonic()
        with self._changed:
            if self._failed:
                raise self._failed
            self._forget(now)
            self._lines.extend((now, line) for line in lines)
            self._changed.notify()

    def close(self) -> None:
        """Waits until the terminal has what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _forget(self, now: float) -> None:
        while self._lines and not self._closing and now - self._lines[0][0] > PATIENCE:
            self._lines.popleft()
            self._late += 1

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._late or self._closing)
                self._forget(time.monotonic())
                late, self._late = self._late, 0
                text = [f"({late:,} lines not shown: the terminal does not keep up)"] if late else []
                text += [self._lines.popleft()[1] for _ in range(min(BATCH, len(self._lines)))]
                if not text:
                    return
            rest = "".join(f"{line}\n" for line in text).encode()
            try:
                while rest:
                    rest = rest[os.write(STDOUT, rest) :]
            except OSError as error:
                with self._changed:
                    self._failed = error
                return
