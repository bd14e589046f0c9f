"""`triptych shadow`: one engine answers the client, the others get the same bytes, the answers are compared.

In front of everything is a tee (tee.py); behind it four daemons as anybody would start them: the answering
engine, a second copy of it as the control, and the other two engines. Each has an upstream of its own: a
replica, or a recorded server (`triptych replay --serve`). One server for all would be told everything four
times, which only a server that is read from can stand.

What differs between the answering engine and its second copy, in the same session and line, is noise; what
another engine differs in beyond that is a difference. Times are told as figures and are never one.
streams.py says precisely what is compared, tee.py what a shadow may do to the client (nothing),
shadow_report.py what is said of it.

The traffic is kept nowhere. The daemons' own logs are kept with --keep alone, in DIR/NAME/log.jsonl, and
grow there for as long as it runs.
"""

import contextlib
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec

from comparisons.daemon_log import bound_address
from comparisons.descriptors import allow_descriptors
from comparisons.flags import Failed, duration
from comparisons.front import listening
from comparisons.sidebyside import shadow_report
from comparisons.sidebyside.daemons import Daemon, configuration
from comparisons.sidebyside.shadow_settings import CONTROL, Settings, SettingsError, read
from comparisons.sidebyside.tee import Session, Target, Tee
from services import systemd
from services.config import ENGINES, ListenerConfig
from services.core.addresses import Address
from services.endpoints import (
    EndpointError,
    Listener,
    close_listeners,
    open_listeners,
    resolve,
)
from services.engines.sockets import Wakeup
from services.logs import Log

USAGE, UNAVAILABLE, CONFIGURATION = 64, 69, 78
# sd-daemon(3)
ERROR, NOTICE = 3, 5

# of a session: the client's and one for each engine
DESCRIPTORS = 5
# for the log, the listeners, what Python has open
SPARE = 100
# where an engine listens for the tee: a reset needs TCP
BEHIND = Address("tcp", "127.0.0.1", 0)
LOG = "log.jsonl"
# nobody but the tee connects there, and it introduces each client at once: only a machine that stands still is late
HEADER = "60s"
START_LIMIT = 30.0  # seconds until every daemon has said that it is ready
LOOK = 0.01  # seconds between two looks whether it has
STOP_LIMIT = 10.0  # seconds from SIGTERM to the end of a daemon that has no session any more
TICK = 1.0  # seconds between two looks at what does not come as an event
# seconds between two times that logs which nobody keeps are emptied
EMPTY = 60.0


class Daemons:
    """The engines behind the tee."""

    def __init__(self, directory: Path, *, kept: bool) -> None:
        self._directory, self._kept = directory, kept
        self._running: dict[str, Daemon] = {}
        self._descriptors: dict[str, int] = {}
        self._emptied = time.monotonic()

    def start(self, settings: Settings) -> list[Target]:
        """Where each of them is; the answering one first. Failed where one does not come up."""
        names = settings.names()
        wanted = [ListenerConfig(name=name, address=BEHIND, service="proxy") for name in names]
        listeners = open_listeners(wanted, {})
        for listener in listeners:
            engine, upstream = names[listener.name]
            directory = self._directory / listener.name
            directory.mkdir()
            path = directory / "triptych.toml"
            text = configuration(
                engine,
                "proxy",
                [str(upstream)],
                log={"path": str(directory / LOG)},
                listener={"proxy_protocol": True},
                timeouts={"header": HEADER},
            )
            path.write_text(text, encoding="utf-8")
            daemon = Daemon(listener.name, path, listener.sockets, directory / "stderr")
            self._running[listener.name] = daemon
            self._descriptors[listener.name] = os.pidfd_open(daemon.pid)
        # a daemon that dies takes its socket with it
        close_listeners(listeners)
        until = time.monotonic() + START_LIMIT
        for name, daemon in self._running.items():
            while bound_address(self._directory / name / LOG) is None:
                if not daemon.runs():
                    raise Failed(daemon.how_it_ended(), UNAVAILABLE)
                if time.monotonic() > until:
                    raise Failed(f"the daemons did not come up within {START_LIMIT:g} s", UNAVAILABLE)
                time.sleep(LOOK)
        return [Target(each.name, names[each.name][0], each.addresses[0]) for each in listeners]

    def watch(self, tee: Tee, died: Callable[[str, str], None]) -> None:
        """Has `died` called with the name of one that has ended, and how."""
        for name, descriptor in self._descriptors.items():

            def ended(name: str = name, descriptor: int = descriptor) -> None:
                if not self._running[name].runs():
                    tee.unwatch(descriptor)
                    died(name, self._running[name].how_it_ended())

            tee.watch(descriptor, ended)

    def empty_logs(self) -> None:
        """Of what nobody keeps only the first lines were needed."""
        if not self._kept and time.monotonic() > self._emptied + EMPTY:
            self._emptied = time.monotonic()
            for name in self._running:
                os.truncate(self._directory / name / LOG, 0)

    def stop(self) -> None:
        """SIGTERM, and some time for the last lines of their logs."""
        poll = select.poll()
        for name, daemon in self._running.items():
            daemon.send(signal.SIGTERM)
            poll.register(self._descriptors[name], select.POLLIN)
        waiting = set(self._descriptors.values())
        until = time.monotonic() + STOP_LIMIT
        while waiting and (left := until - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                waiting.remove(descriptor)
        for daemon in self._running.values():
            daemon.kill()
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class Shadow:
    """One run, from the first client to the last."""

    def __init__(
        self, settings: Settings, listeners: list[Listener], daemons: Daemons, targets: list[Target]
    ) -> None:
        self.addresses = [str(address) for listener in listeners for address in listener.addresses]
        self._listeners = listeners
        self._settings = settings
        self._daemons = daemons
        self._tee = Tee(
            listeners,
            targets,
            settings.normalisers(),
            buffer=settings.buffer,
            patience=settings.patience,
            most=(allow_descriptors() - SPARE) // DESCRIPTORS,
            settled=self._settled,
        )
        names = {name: (engine, str(upstream)) for name, (engine, upstream) in settings.names().items()}
        self._account = shadow_report.Account(names)
        self._log = Log(settings.log, "info", "-") if settings.log else None
        self._signals: list[int] = []
        self._wakeup = Wakeup()
        self._begun = time.monotonic()
        # when to stop, and when to cut what is still open then
        self._end = self._deadline = float("inf")
        self._cut = 0
        self.failure: str | None = None

    def run(self, sessions: int | None, limit: float | None) -> None:
        """Until a signal, so many sessions, so many seconds, or the death of the answering engine, which
        is a `failure`. Then no session is open any more.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)
        self._tee.watch(self._wakeup.fileno(), self._take_signals)
        self._daemons.watch(self._tee, self._died)
        systemd.notify("READY=1", f"STATUS={self.status()}")
        if limit is not None:
            self._end = self._begun + limit
        tick = 0.0
        with _shown() as show:
            while not self._tee.closing or self._tee.sessions:
                self._tee.turn(min(tick, self._end, self._deadline))
                now = time.monotonic()
                if now >= self._end or (sessions is not None and self._account.sessions >= sessions):
                    self._stop()
                if now >= self._deadline:
                    self._deadline = float("inf")
                    self._cut += self._tee.cut()
                if now >= tick:
                    tick = now + TICK
                    self._daemons.empty_logs()
                    self._report()
                    show(self)
        if self._log is not None:
            self._log.emit(self._account.stopped(self._cut))
            self._log.close()

    def results(self) -> shadow_report.Results:
        return self._account.results(self.addresses, time.monotonic() - self._begun, self._cut)

    def _settled(self, session: Session) -> None:
        event = self._account.add(session)
        if self._log is not None:
            self._log.emit(event)

    def _signalled(self, number: int, _frame: object) -> None:
        self._signals.append(number)
        self._wakeup.wake()

    def _take_signals(self) -> None:
        self._wakeup.clear()
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP:
                self._reopen_log()
            elif self._tee.closing:
                self._deadline = 0.0
            else:
                self._stop()

    def _reopen_log(self) -> None:
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        if self._log is not None and self._settings.log is not None:
            try:
                self._log.reopen(self._settings.log, "info")
            except OSError as error:
                _say(f"{self._settings.log}: {error.strerror}; still the old one", ERROR)
        systemd.notify("READY=1")

    def _stop(self) -> None:
        """Take nobody any more, and wait for who is here."""
        if self._tee.closing:
            return
        systemd.notify("STOPPING=1")
        self._tee.stop_accepting()
        close_listeners(self._listeners)
        self._end = float("inf")
        self._deadline = time.monotonic() + self._settings.drain
        if self._tee.serving:
            _say(
                f"waiting for {self._tee.serving:,} open sessions, at most {self._settings.drain:g} s; "
                "Ctrl-C cuts them"
            )

    def _died(self, name: str, how: str) -> None:
        if name == self._settings.answer:
            self.failure = f"{how}; it was the one that answers"
            self._stop()
            self._deadline = 0.0
        else:
            _say(f"{how}; from now on its sessions are told as refused", ERROR)

    def _report(self) -> None:
        report = ["WATCHDOG=1", f"STATUS={self.status()}"]
        if self._tee.closing:
            # until the next report and two more
            report.append(f"EXTEND_TIMEOUT_USEC={int(3e6 * TICK)}")
        systemd.notify(*report)

    def status(self) -> str:
        """How it goes, in one line."""
        doing = "draining" if self._tee.closing else f"on {', '.join(self.addresses)}"
        return f"{doing}; {self._account.sessions:,} sessions compared, {self._tee.serving:,} open"


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Shadow], None]]:
    """The live table: on stderr, and only if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console, Group  # noqa: PLC0415  a unit shows nothing, and needs no extra
    from rich.live import Live  # noqa: PLC0415  as above
    from rich.text import Text  # noqa: PLC0415  as above

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(shadow: Shadow) -> None:
            table = shadow_report.table(shadow.results())
            live.update(Group(Text(shadow.status()), table), refresh=True)

        yield show


def _directory(keep: str | None, stack: contextlib.ExitStack) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-shadow-")))
    directory = Path(keep).absolute()
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise Failed(f"--keep: {keep} exists already; name a new folder", USAGE) from error
    return directory


def _listen(settings: Settings, stack: contextlib.ExitStack) -> list[Listener]:
    """The tee's own sockets. EndpointError, also where an upstream is one of them."""
    upstreams = {upstream for _, upstream in settings.names().values()}
    reached = [each for upstream in upstreams for each in resolve(upstream)]
    return stack.enter_context(listening(settings.listen, reached, _say, systemd.claim()))


def _say(message: str, priority: int = NOTICE) -> None:
    # sd-daemon(3): the journal takes what has no priority for what the unit says, which may be an error
    prefix = f"<{priority}>" if systemd.is_journal(2) else ""
    click.echo(f"{prefix}triptych: {message}", err=True)


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, address = text.partition("=")
        if not equals:
            raise click.UsageError(f"--shadow-upstream: {text!r}: expected ENGINE=ADDR")
        pairs[name] = address
    return pairs


def _announce(settings: Settings, addresses: list[str]) -> None:
    names = settings.names()
    others = [name for name in names if name not in {settings.answer, CONTROL}]
    _say(
        f"on {', '.join(addresses)} {settings.answer} answers; "
        f"{', '.join(others)} and a second {settings.answer} shadow it"
    )
    shared = [name for name in names if name != settings.answer and names[name][1] == settings.upstream]
    if shared:
        _say(
            f"{settings.upstream} is told everything {len(shared) + 1} times, also for "
            f"{', '.join(shared)}; give each a replica by --shadow-upstream"
        )


@click.command("shadow")
@click.option("--listen", metavar="ADDR", help="HOST:PORT, unix:/PATH or systemd:NAME, for your clients.")
@click.option("--upstream", metavar="ADDR", help="HOST:PORT or unix:/PATH; your server.")
@click.option(
    "--shadow-upstream",
    metavar="ENGINE=ADDR",
    multiple=True,
    help="A replica for this engine, instead of --upstream. ENGINE may be control.",
)
@click.option("--answer", type=click.Choice(ENGINES), help="Who answers.  [default: nonblocking]")
@click.option(
    "--normalise",
    metavar="REGEX[=>TEXT]",
    multiple=True,
    help="Replaced in every line before lines are compared: dates, ids.",
)
@click.option(
    "--buffer",
    metavar="SIZE",
    help="What a shadow may fall behind before it is detached, each way; a session may cost six times as "
    "much.  [default: 16MiB]",
)
@click.option(
    "--patience", metavar="DURATION", help="How long a shadow may stand off from the answer.  [default: 10s]"
)
@click.option("--drain", metavar="DURATION", help="At the end, for open sessions.  [default: 30s]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="The same names, in TOML.")
@click.option("--log", metavar="PATH", help="A line for each session; - is stdout.")
@click.option("--keep", metavar="DIR", help="Keep the engines' own logs, in a new folder.")
@click.option("--sessions", type=click.IntRange(1), help="End when so many are compared.")
@click.option("--time", "limit", type=duration, metavar="DURATION", help="End after 90s, 10m, 2h.")
@click.option("--json", "as_json", is_flag=True, help="Print the results instead of the table.")
def command(
    *,
    shadow_upstream: tuple[str, ...],
    normalise: tuple[str, ...],
    config: Path | None,
    sessions: int | None,
    limit: float | None,
    as_json: bool,
    **texts: str | None,
) -> int:
    """One engine answers, the others get the same bytes, the answers are compared.

    Runs until Ctrl-C, --sessions or --time; open sessions may end by themselves, and a second Ctrl-C cuts
    them. With --log - the lines are all that stdout gets.
    """
    given = {name: text for name, text in texts.items() if text is not None}
    lists = {"normalise": list(normalise), "shadow-upstream": _pairs(shadow_upstream)}
    try:
        settings = read(config, {**given, **{name: value for name, value in lists.items() if value}})
    except SettingsError as error:
        for fault in error.faults:
            _say(fault, ERROR)
        return CONFIGURATION if error.of_file else USAGE
    if as_json and settings.log == "-":
        raise click.UsageError("--json: with --log - stdout has the lines already; log to a file")
    # until the run takes signals itself, an end in the middle of the start is cleaned up after
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        daemons = Daemons(_directory(settings.keep, stack), kept=settings.keep is not None)
        stack.callback(daemons.stop)
        try:
            listeners = _listen(settings, stack)
            shadow = Shadow(settings, listeners, daemons, daemons.start(settings))
        except EndpointError as error:
            raise Failed(error.message, error.exit_code) from error
        _announce(settings, shadow.addresses)
        shadow.run(sessions, limit)
        results = shadow.results()
    if as_json:
        click.echo(msgspec.json.encode(results))
    elif settings.log is None or not (settings.log == "-" or systemd.listens()):
        # of a unit the log is all that is wanted
        _print(results)
    if shadow.failure is not None:
        raise Failed(shadow.failure, UNAVAILABLE)
    return 0


def _print(results: shadow_report.Results) -> None:
    from rich.console import Console  # noqa: PLC0415  as in _shown

    click.echo(shadow_report.summary(results))
    Console(highlight=False).print(shadow_report.table(results))
    for found in results.differences:
        click.echo(shadow_report.described(found))
