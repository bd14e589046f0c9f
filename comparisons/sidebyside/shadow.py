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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from comparisons.runner import allow_descriptors
from comparisons.sidebyside import shadow_report
from comparisons.sidebyside.shadow_settings import CONTROL, Settings, SettingsError, read
from comparisons.sidebyside.tee import Session, Target, Tee
from comparisons.subjects import Engine, Running, SubjectFailed
from services import systemd
from services.config import DURATION, ENGINES, SECONDS, ListenerConfig
from services.core.addresses import Address
from services.endpoints import (
    EndpointError,
    Listener,
    Route,
    close_listeners,
    exposure,
    open_listeners,
    refuse_loops,
    resolve,
)
from services.engines.sockets import Wakeup
from services.logs import Log

USAGE, UNAVAILABLE, CONFIGURATION = 64, 69, 78

# of a session: the client's and one for each engine
DESCRIPTORS = 5
# for the log, the listeners, what Python has open
SPARE = 100
STOP_LIMIT = 10.0  # seconds from SIGTERM to the end of a daemon that has no session any more
TICK = 1.0  # seconds between two looks at what does not come as an event
# seconds between two times that logs which nobody keeps are emptied
EMPTY = 60.0


class Failed(click.ClickException):
    """One line, and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = UNAVAILABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class Seconds(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = DURATION.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} is no duration such as 90s or 10m", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


class Daemons:
    """The engines behind the tee."""

    def __init__(self, directory: Path, *, kept: bool) -> None:
        self._directory, self._kept = directory, kept
        self._running: dict[str, Running] = {}
        self._descriptors: dict[str, int] = {}
        self._emptied = time.monotonic()

    def start(self, settings: Settings) -> list[Target]:
        """Where each of them is; the answering one first. Failed where one does not come up."""
        names = settings.names()
        for name, (engine, upstream) in names.items():
            directory = self._directory / name
            directory.mkdir()
            self._running[name] = Engine(engine).start("proxy", str(upstream), directory, None)
        targets = []
        for name, running in self._running.items():
            try:
                address = Address.parse(running.address())
            except SubjectFailed as error:
                raise Failed(f"{name}: {error}") from error
            targets.append(Target(name, names[name][0], address))
            assert running.pid is not None
            self._descriptors[name] = os.pidfd_open(running.pid)
        return targets

    def watch(self, tee: Tee, died: Callable[[str, str], None]) -> None:
        """Has `died` called with the name of one that has ended, and how."""
        for name, descriptor in self._descriptors.items():

            def ended(name: str = name, descriptor: int = descriptor) -> None:
                tee.unwatch(descriptor)
                died(name, self._running[name].died() or "")

            tee.watch(descriptor, ended)

    def empty_logs(self) -> None:
        """Of what nobody keeps only the first lines were needed."""
        if not self._kept and time.monotonic() > self._emptied + EMPTY:
            self._emptied = time.monotonic()
            for name in self._running:
                os.truncate(self._directory / name / "log.jsonl", 0)

    def stop(self) -> None:
        """SIGTERM, and some time for the last lines of their logs."""
        poll = select.poll()
        for name, descriptor in self._descriptors.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            poll.register(self._descriptors[name], select.POLLIN)
        waiting = set(self._descriptors.values())
        until = time.monotonic() + STOP_LIMIT
        while waiting and (left := until - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                waiting.remove(descriptor)
        for running in self._running.values():
            running.kill()
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
            if number == signal.SIGHUP and self._log is not None and self._settings.log is not None:
                try:
                    self._log.reopen(self._settings.log, "info")
                except OSError as error:
                    click.echo(
                        f"triptych: {self._settings.log}: {error.strerror}; still the old one", err=True
                    )
            elif self._tee.closing:
                self._deadline = 0.0
            else:
                self._stop()

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
            click.echo(
                f"triptych: waiting for {self._tee.serving:,} open sessions, at most "
                f"{self._settings.drain:g} s; Ctrl-C cuts them",
                err=True,
            )

    def _died(self, name: str, how: str) -> None:
        if name == self._settings.answer:
            self.failure = f"{name}, which answers: {how}"
            self._stop()
            self._deadline = 0.0
        else:
            click.echo(f"triptych: {name}: {how}; from now on its sessions are told as refused", err=True)

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
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
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


def _listen(settings: Settings, stack: contextlib.ExitStack, loop: int) -> list[Listener]:
    """The tee's own sockets. Failed; with `loop` where an upstream is one of them."""
    wanted = ListenerConfig(name="shadow", address=settings.listen, service="proxy")
    try:
        listeners = open_listeners([wanted], systemd.claim())
        stack.callback(close_listeners, listeners)
        own = [address for listener in listeners for address in listener.addresses]
        upstreams = {upstream for _, upstream in settings.names().values()}
        reached = [address for upstream in upstreams for address in resolve(upstream)]
    except EndpointError as error:
        raise Failed(error.message, error.exit_code) from error
    try:
        refuse_loops([Route("shadow", own, reached)])
    except EndpointError as error:
        raise Failed(error.message, loop) from error
    for address in own:
        risk = exposure("proxy", address)
        if risk is not None:
            click.echo(f"triptych: {address} can be reached from other hosts: {risk}", err=True)
    return listeners


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
    click.echo(
        f"triptych: on {', '.join(addresses)} {settings.answer} answers; "
        f"{', '.join(others)} and a second {settings.answer} shadow it",
        err=True,
    )
    shared = [name for name in names if name != settings.answer and names[name][1] == settings.upstream]
    if shared:
        click.echo(
            f"triptych: {settings.upstream} is told everything {len(shared) + 1} times, also for "
            f"{', '.join(shared)}; give each a replica by --shadow-upstream",
            err=True,
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
@click.option("--buffer", metavar="SIZE", help="Kept for each shadow, each way.  [default: 1MiB]")
@click.option(
    "--patience", metavar="DURATION", help="How long a shadow may stand off from the answer.  [default: 10s]"
)
@click.option("--drain", metavar="DURATION", help="At the end, for open sessions.  [default: 30s]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="The same names, in TOML.")
@click.option("--log", metavar="PATH", help="A line for each session; - is stdout.")
@click.option("--keep", metavar="DIR", help="Keep the engines' own logs, in a new folder.")
@click.option("--sessions", type=click.IntRange(1), help="End when so many are compared.")
@click.option("--time", "limit", type=Seconds(), metavar="DURATION", help="End after 90s, 10m, 2h.")
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
            click.echo(f"triptych: {fault}", err=True)
        return CONFIGURATION if error.of_file else USAGE
    if as_json and settings.log == "-":
        raise click.UsageError("--json: with --log - stdout has the lines already; log to a file")
    # until the run takes signals itself, an end in the middle of the start is cleaned up after
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        listeners = _listen(settings, stack, USAGE if config is None else CONFIGURATION)
        daemons = Daemons(_directory(settings.keep, stack), kept=settings.keep is not None)
        stack.callback(daemons.stop)
        shadow = Shadow(settings, listeners, daemons, daemons.start(settings))
        _announce(settings, shadow.addresses)
        shadow.run(sessions, limit)
        results = shadow.results()
    if as_json:
        click.echo(msgspec.json.encode(results))
    elif settings.log != "-":
        console = Console(highlight=False)
        click.echo(shadow_report.summary(results))
        console.print(shadow_report.table(results))
        for found in results.differences:
            click.echo(shadow_report.described(found))
    if shadow.failure is not None:
        raise Failed(shadow.failure)
    return 0
