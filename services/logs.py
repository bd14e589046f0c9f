"""The one log layer of all engines: an event in, one line out, and traffic never waits for it.

`Log.emit` renders an event of `vocabulary.py` (JSON lines; text when stdout is a terminal) and puts
the line into a bounded queue, which one thread drains. When the log's reader stalls, that thread
stalls; when the queue is full, lines are dropped and counted, and a `log_dropped` line says how
many as soon as there is room again. No fault of the log's reader or disk is raised to the caller.

It is structlog without its standard library parts: filtering by level, a bound context, a chain of
processors that ends in bytes. The chain runs outside the lock; only the number of the line (`seq`)
and its place in the queue are taken under it, so that lines stand in the order of their numbers.
"""

import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from services import systemd
from services.vocabulary import SCHEMA, EngineStats, Event, Level, LogDropped, Session, SessionRefused

# structlog imports rich and Twisted when they are there, and uses neither here: together more than
# half of its import time, and Twisted's modules in engines that do without them. None in
# sys.modules makes an import fail as if it were not installed.
_hidden = [name for name in ("rich", "twisted") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]  # None is what the import system documents
import structlog  # noqa: E402  see above
from structlog.typing import EventDict  # noqa: E402  see above

for _name in _hidden:
    del sys.modules[_name]

# About 10 MB of `session_closed` lines, a second or more of a busy daemon: longer than a reader that
# is alive pauses, and no more memory than a daemon can spare. As many again may be with the writer.
QUEUE = 10_000
# under load the writer is woken this often, not for every line
NAP = 0.01

STDOUT = 1

# RFC 5424, as sd-daemon(3) prefixes them
PRIORITIES: dict[str, int] = {"debug": 7, "info": 6, "warning": 4, "error": 3}


# One for every session, or at every interval: too many for a journal with a rate limit.
FREQUENT = (Session, SessionRefused, EngineStats)


class Log:
    """The log of one process.

    `path` is a file, appended to and made if it is not there, or "-" for stdout. Raises OSError when
    it cannot be opened. `emit` may be called from any thread, at any time.
    """

    def __init__(self, path: str, level: Level, engine: str, instance: str = "-", worker: int = 0) -> None:
        descriptor = _open(path)
        to_journal = systemd.is_journal(STDOUT)
        render: _JsonLine | _TextLine
        if path == "-" and os.isatty(descriptor):
            render = _TextLine()
        else:
            render = _JsonLine(prefixed=path == "-" and to_journal, copied=path != "-" and to_journal)
        self._writer = _Writer(descriptor, lambda lines: self.emit(LogDropped(lines=lines)))
        self._processors = [_Timestamp(), render]
        self._context: dict[str, Any] = {
            "schema": SCHEMA,
            "engine": engine,
            "instance": instance,
            "pid": os.getpid(),
            "worker": worker,
        }
        self._say = self._loggers(level)
        self._writer.start()
        if path != "-" and to_journal:
            # What the file has in full, `journalctl` has in outline. The journal stalls in a queue of
            # its own, and what it loses stands in the file.
            self._writer.journal = _Writer(STDOUT, lambda _lines: None)
            self._writer.journal.start()

    def _loggers(self, level: Level) -> dict[str, Callable[..., None]]:
        """The logger's method for each level; those below `level` do nothing."""
        logger = structlog.wrap_logger(
            self._writer,
            processors=self._processors,
            wrapper_class=structlog.make_filtering_bound_logger(
                logging.getLevelNamesMapping()[level.upper()]
            ),
            context_class=dict,
            cache_logger_on_first_use=True,
            **self._context,
        ).bind()
        return {name: getattr(logger, name) for name in PRIORITIES}

    def reopen(self, path: str, level: Level) -> None:
        """From the next line on, write to `path`, opened anew, and from `level` on. OSError, and nothing
        changed, if it cannot be opened.
        """
        descriptor = _open(path)
        self._say = self._loggers(level)
        self._writer.redirect(descriptor)

    def emit(self, event: Event) -> None:
        """Queues the line of `event`, if its level is logged. Never waits and never fails for the reader."""
        self._say[event.LEVEL](event.NAME, fields=event)

    @property
    def dropped(self) -> int:
        """Lines that were lost so far: the queue was full, or they could not be written."""
        return self._writer.dropped

    def close(self, timeout: float = 2.0) -> None:
        """Writes what is queued, for at most `timeout` seconds; what is emitted from now on is dropped."""
        self._writer.close(timeout)
        if self._writer.journal is not None:
            self._writer.journal.close(timeout)


class _Timestamp:
    """RFC 3339, UTC, microseconds. The text of a second is made once."""

    def __init__(self) -> None:
        self._second = (0, "")

    def __call__(self, _logger: object, _level: str, line: EventDict) -> EventDict:
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        known, text = self._second
        if second != known:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            # one assignment, so that no other thread sees half of it
            self._second = (second, text)
        line["timestamp"] = f"{text}.{nanoseconds // 1000:06d}Z"
        return line


class _JsonLine:
    """The last processor: what stands before `seq` and what stands after it.

    All but the timestamp is the same in every line of one kind of event before `seq`, so it is
    encoded once for a kind. `prefixed` puts the priority in front for journald; `copied` asks for a
    copy there of what is not of one session or a statistic.
    """

    def __init__(self, *, prefixed: bool, copied: bool) -> None:
        self._prefixed = prefixed
        self._copied = copied
        self._heads: dict[type[Event], tuple[bytes, bytes, bytes]] = {}
        self._encode = msgspec.json.Encoder().encode

    def __call__(
        self, _logger: object, level: str, line: EventDict
    ) -> tuple[tuple[bytes, bytes, bytes], dict[str, Any]]:
        event = line.pop("fields")
        head = self._heads.get(type(event))
        if head is None:
            keys = ("event", "schema", "engine", "instance", "pid", "worker")
            fixed = self._encode({"level": level, **{key: line[key] for key in keys}})
            priority = b"<%d>" % PRIORITIES[level]
            copied = self._copied and (level == "error" or not isinstance(event, FREQUENT))
            head = self._heads[type(event)] = (
                (priority if self._prefixed else b"") + b'{"timestamp":"',
                b'",' + fixed[1:-1] + b',"seq":',
                priority if copied else b"",
            )
        try:
            fields = self._encode(event)
        except UnicodeEncodeError:
            fields = b""
        if not fields or not fields.isascii():
            fields = _escaped(event)
        return (head[0] + line["timestamp"].encode() + head[1], b"," + fields[1:] + b"\n", head[2]), {}


def _escaped(event: Event) -> bytes:
    """Beyond ASCII there are characters that drive terminals (U+009B), and names of files that are
    not UTF-8 at all (lone surrogates): both are written as escapes.
    """
    fields = msgspec.structs.asdict(event)
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = value.encode(errors="backslashreplace").decode()
        elif isinstance(value, list):
            fields[name] = [str(item).encode(errors="backslashreplace").decode() for item in value]
    return json.dumps(fields, separators=(",", ":")).encode()


class _TextLine:
    """The last processor on a terminal: for eyes, so without what is the same in every line, and
    without what is null.
    """

    def __init__(self) -> None:
        env = os.environ.get
        colors = not env("NO_COLOR") and (bool(env("FORCE_COLOR")) or env("TERM") != "dumb")
        self._render = structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False)

    def __call__(
        self, logger: object, level: str, line: EventDict
    ) -> tuple[tuple[bytes, bytes], dict[str, Any]]:
        fields = {
            name: _printable(value)
            for name, value in msgspec.structs.asdict(line["fields"]).items()
            if value is not None
        }
        shown = {name: line[name] for name in ("timestamp", "event", "engine")}
        text = self._render(logger, level, {**shown, "level": level, **fields})
        return (text.encode() + b"\n", b""), {}


def _printable(value: object) -> str:
    """One line that leaves the terminal as it is."""
    text = ",".join(value) if isinstance(value, list) else str(value)
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class _Writer:
    """The queue and the thread that drains it; to structlog it is the logger that gets the lines."""

    def __init__(self, descriptor: int, say_dropped: Callable[[int], None]) -> None:
        self.dropped = 0
        # where lines are copied to
        self.journal: _Writer | None = None
        self._descriptor = descriptor
        self._say_dropped = say_dropped
        # reentrant: the writer says `log_dropped` while it holds it, and so may a signal handler
        self._lock = threading.RLock()
        self._lines: list[bytes] = []
        # descriptors that take over, in their order
        self._redirects: list[int] = []
        # how many lines there may be
        self._room = QUEUE
        self._seq = 0
        # dropped lines that no `log_dropped` has told yet
        self._untold = 0
        # whether the last write failed: then nothing is told, since telling would fail as well, for ever
        self._failing = False
        # whether what was written last ends within a line
        self._torn = False
        self._asleep = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, head: bytes, tail: bytes, copied: bytes = b"") -> None:
        """Queues one line; `seq` comes between head and tail, unless there is no tail. With a priority
        in `copied`, the line goes to the journal too.
        """
        with self._lock:
            seq = self._seq
            self._seq = seq + 1
            if copied and self.journal is not None:
                self.journal.put(b"%b%b%d%b" % (copied, head, seq, tail), b"")
            if len(self._lines) >= self._room:
                self._lose(1)
                return
            self._lines.append(b"%b%d%b" % (head, seq, tail) if tail else head)
            if not self._asleep:
                return
            self._asleep = False
        self._wake.set()

    # structlog calls the method of the level
    debug = info = warning = error = put

    def redirect(self, descriptor: int) -> None:
        """What is queued now goes to the new descriptor; the old one is closed."""
        with self._lock:
            self._redirects.append(descriptor)
            self._asleep = False
        self._wake.set()

    def close(self, timeout: float) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._deadline = time.monotonic() + timeout
            self._closing.set()
            self._room = 0
        self._wake.set()
        self._thread.join(timeout)
        # a thread that is stuck in a write still uses it; it ends with the process
        if self._descriptor != STDOUT and not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        while True:
            with self._lock:
                lines, self._lines = self._lines, []
                redirects, self._redirects = self._redirects, []
                if self._untold and not self._failing:
                    untold, self._untold = self._untold, 0
                    # the queue was emptied just now; this line goes first, also when closing
                    room, self._room = self._room, 1
                    self._say_dropped(untold)
                    self._room = room
                self._asleep = idle = not lines and not self._lines
            for descriptor in redirects:
                if self._descriptor not in {STDOUT, descriptor}:
                    os.close(self._descriptor)
                self._descriptor = descriptor
                self._failing = self._torn = False
            if lines:
                self._write(b"".join(lines))
                # returns at once when closing
                self._closing.wait(NAP)
            elif idle:
                if self._closing.is_set():
                    return
                self._wake.wait()
                self._wake.clear()

    def _write(self, data: bytes) -> None:
        """Writes whole lines. What cannot be written is lost and counted."""
        if self._torn:
            data = b"\n" + data
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    self._await_room()
        except OSError:
            # a reader that is gone, a full disk, a deadline: traffic goes on without these lines
            self._failing = True
            self._torn = len(rest) < len(data) and data[len(data) - len(rest) - 1] != ord("\n")
            with self._lock:
                self._lose(bytes(rest).count(b"\n"))
        else:
            self._failing = self._torn = False

    def _await_room(self) -> None:
        """For a descriptor that does not block, which the other end of a terminal or pipe may have set."""
        if time.monotonic() > self._deadline:
            raise TimeoutError
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        # in steps, since the deadline may be set meanwhile
        poll.poll(100)

    def _lose(self, lines: int) -> None:
        self.dropped += lines
        self._untold += lines


def _open(path: str) -> int:
    if path != "-":
        # O_NONBLOCK: a FIFO that nobody reads is an error now, not a start that never ends
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
        return os.open(path, flags, 0o640)
    # the descriptor, since Twisted may replace sys.stdout; Python sets it to None when 1 is closed, and
    # then 1 will be the number of a socket
    if sys.__stdout__ is None:
        raise OSError("stdout is closed; use --log FILE")
    return STDOUT
