"""`triptych split`: the sessions of one port, dealt to the three engines by the kernel.

A randomised experiment on real traffic: each engine and a control, a second process of one of them, listen
on the same port, chance decides which of them a client gets, and nobody stands between the two. So what the
engines make of the traffic differs by nothing but the engine, and what the control differs from its own
engine is how much nothing at all differs.

Everything is set against the control's engine, since that is the one whose noise is known: with `--control
twisted` everything is set against Twisted. Engines are not set against each other beyond that; two
verdicts against the same base can be read beside each other.

Sessions are independent of each other when dealt at random. With `--deal sticky` they are not: a client's
sessions all meet one engine, so a client with a thousand slow ones slows one engine alone. Sticky is for
servers that expect a client to come back to the same proxy; its verdicts are worth something with many
clients. CPU a session is no figure of a session but of a process: what each daemon's `engine_stats` line
says it used from one second to the next, over the sessions that ended meanwhile.

A split never cuts a session by itself. It keeps nothing but what `--keep` asks for, and it deals TCP only.
"""

import contextlib
import select
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import click
import msgspec
from rich.console import Console
from rich.live import Live

from comparisons import effects
from comparisons.effects import Finding
from comparisons.flags import Failed, duration
from comparisons.sidebyside import tables
from comparisons.sidebyside.arms import Account, Arm, configuration
from comparisons.sidebyside.daemons import Daemon
from comparisons.sidebyside.dealing import Deal, Group
from services import systemd
from services.config import ENGINES, ConfigError, from_flags
from services.core.addresses import Address
from services.endpoints import EndpointError, Route, refuse_loops, resolve

VERSION = 1
UNAVAILABLE = 69

CONTROL = "control"
START_LIMIT = 30.0  # seconds until every daemon has said that it is ready
LOOK, SHORT_LOOK = 0.25, 0.01  # seconds between two looks into the logs; while something is awaited
REFRESH = 1.0  # seconds between two live tables
RATE_SPAN = 5.0  # seconds over which sessions a second are told
MOST_SHARES = 1000
WIDTH = 120  # of the tables where there is no terminal to fill


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One arm, as --json tells it; `cut` sessions were ended by us and `missing` have no line: neither is
    among the `sessions` that are compared.
    """

    name: str
    engine: str
    weight: int
    faults: list[str]
    sessions: int
    cut: int
    missing: int
    resets: int
    bytes_c2s: int
    bytes_s2c: int


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints: version 1 of that format. `base` is what everything is compared with; amounts of
    the findings are in microseconds, bytes a second, or shares of 1.
    """

    version: int = VERSION
    addresses: list[str]
    deal: Deal
    seconds: float
    base: str
    arms: list[Told]
    findings: list[Finding]


class Signals:
    """What asks us to end, and the ends of children, as something to wait for. numpy's threads take signals
    too, so none is blocked: whichever thread gets one, its number comes out of a socket.
    """

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)

    def __enter__(self) -> Self:
        self._numbers, self._arriving = socket.socketpair()
        for each in (self._numbers, self._arriving):
            each.setblocking(False)
        # not their default, which would end us
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.WATCHED}
        self._wakeup = signal.set_wakeup_fd(self._arriving.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._numbers.close()
        self._arriving.close()

    def wait(self, seconds: float) -> set[int]:
        """Those that came, within so many seconds at most, without SIGCHLD: a child's end only wakes."""
        if not select.select([self._numbers], [], [], seconds)[0]:
            return set()
        return set(self._numbers.recv(4096)) - {signal.SIGCHLD}


class Split:
    """The daemons on the sockets of a group, from the first to the last line of their logs."""

    def __init__(self, arms: Sequence[Arm], group: Group, directory: Path, signals: Signals) -> None:
        self._signals = signals
        self._group = group
        self._directory = directory
        self._daemons: dict[Arm, Daemon] = {}
        self.accounts = {arm: Account(directory / f"{arm.name}.jsonl") for arm in arms}

    def start(self, service: str, upstreams: Sequence[str]) -> None:
        """Returns when all daemons serve. Failed where one does not."""
        for arm, sockets in zip(self.accounts, self._group.sockets, strict=True):
            path = self._directory / f"{arm.name}.toml"
            log = self._directory / f"{arm.name}.jsonl"
            path.write_text(configuration(arm, service, upstreams, log), encoding="utf-8")
            self._daemons[arm] = Daemon(arm.name, path, sockets, self._directory / f"{arm.name}.stderr")
        until = time.monotonic() + START_LIMIT
        while not all(account.ready for account in self.accounts.values()):
            if self._signals.wait(SHORT_LOOK):
                raise click.Abort
            self._read_on()
            failure = self._failure()
            if failure is not None:
                raise Failed(failure, UNAVAILABLE)
            if time.monotonic() > until:
                raise Failed(f"the daemons did not come up within {START_LIMIT:g} s", UNAVAILABLE)

    def run(self, sessions: int | None, limit: float | None) -> str | None:
        """Until a signal, so many ended sessions, so many seconds, or the end of a daemon that was not
        told to: then how that was. All have ended when it returns.
        """
        until = float("inf") if limit is None else time.monotonic() + limit
        failure = None
        with _shown() as show:
            while failure is None and time.monotonic() < until:
                asked = self._signals.wait(LOOK)
                self._read_on()
                show(self.accounts)
                failure = self._failure()
                ended = sum(account.sessions for account in self.accounts.values())
                if asked or (sessions and ended >= sessions):
                    break
        return self._end() or failure

    def kill(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()

    def _end(self) -> str | None:
        self._send(signal.SIGTERM)
        listening = True
        told = 0
        while any(daemon.runs() for daemon in self._daemons.values()):
            if signal.SIGINT in self._signals.wait(SHORT_LOOK if listening else LOOK):
                # to a daemon that drains it means: at once
                self._send(signal.SIGINT)
            self._read_on()
            if listening and all(
                self.accounts[arm].draining for arm, daemon in self._daemons.items() if daemon.runs()
            ):
                # each has taken what waited, and closed its listener; but it keeps what it was handed, so
                # that a client would wait there for as long as the last open session takes
                self._group.silence()
                listening = False
            waiting = {arm.name: account.open for arm, account in self.accounts.items() if account.open}
            count = sum(waiting.values())
            if not listening and count and count != told:
                told = count
                where = ", ".join(f"{name} {number:,}" for name, number in waiting.items())
                click.echo(
                    f"triptych: waiting for {count:,} open sessions ({where}); Ctrl-C cuts them",
                    err=True,
                )
        self._read_on()
        return self._failure(stopped=True)

    def _send(self, number: signal.Signals) -> None:
        for daemon in self._daemons.values():
            daemon.send(number)

    def _read_on(self) -> None:
        for arm, account in self.accounts.items():
            try:
                account.read_on()
            except ValueError as error:
                raise Failed(
                    f"the log of {arm.name} has a line that is none: {error}", UNAVAILABLE
                ) from error

    def _failure(self, *, stopped: bool = False) -> str | None:
        """How the first daemon that should not have ended so did."""
        for arm, daemon in self._daemons.items():
            if not daemon.runs() and not (stopped and self.accounts[arm].stopped):
                return daemon.how_it_ended()
        return None


def compare(control: str, accounts: Mapping[Arm, Account]) -> list[Finding]:
    """The control against its engine, judged by the tolerance alone; then the other engines."""
    samples = {arm.name: account.sample() for arm, account in accounts.items()}
    base, again = samples.pop(control), samples.pop(CONTROL)
    return [*effects.compare(base, {CONTROL: again}), *effects.compare(base, samples, again)]


def _told(arm: Arm, account: Account) -> Told:
    return Told(
        name=arm.name,
        engine=arm.engine,
        weight=arm.weight,
        faults=list(arm.faults),
        sessions=account.sessions,
        cut=account.cut,
        missing=account.missing,
        resets=sum(account.resets),
        bytes_c2s=account.bytes_c2s,
        bytes_s2c=account.bytes_s2c,
    )


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Mapping[Arm, Account]], None]]:
    """The live table: on stderr, and only if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    history: deque[tuple[float, dict[Arm, int]]] = deque()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(accounts: Mapping[Arm, Account]) -> None:
            now = time.monotonic()
            if history and now - history[-1][0] < REFRESH:
                return
            history.append((now, {arm: account.sessions for arm, account in accounts.items()}))
            if now - history[0][0] > RATE_SPAN:
                history.popleft()
            begun, then = history[0]
            rates = {
                arm: (account.sessions - then[arm]) / max(now - begun, REFRESH)
                for arm, account in accounts.items()
            }
            live.update(tables.arms(accounts, rates), refresh=True)

        yield show


def _print(results: Results, accounts: Mapping[Arm, Account]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    total = sum(told.sessions for told in results.arms)
    console.print(f"{total:,} sessions in {results.seconds:,} s on {', '.join(results.addresses)}\n")
    rates = {arm: account.sessions / max(results.seconds, REFRESH) for arm, account in accounts.items()}
    console.print(tables.arms(accounts, rates))
    for told in results.arms:
        if told.cut:
            were = "session was cut and is" if told.cut == 1 else "sessions were cut and are"
            console.print(f"{told.name}: {told.cut:,} {were} not compared")
        if told.missing:
            console.print(f"{told.name}: {told.missing:,} sessions have no line in its log (it dropped them)")
    if total:
        console.print("", tables.findings(results.base, results.findings))


def _address(service: str, listen: str, upstreams: Sequence[str], faults: Sequence[str]) -> Address:
    if service == "echo" and upstreams:
        raise click.UsageError("--upstream: an echo has no upstreams")
    if service == "proxy" and not upstreams:
        raise click.UsageError("--upstream: a proxy needs one")
    try:
        [listener] = from_flags(
            engine="nonblocking", service=service, listen=[listen], upstreams=upstreams, faults=faults
        ).listeners
    except ConfigError as error:
        raise click.UsageError("; ".join(error.faults)) from error
    if listener.address.transport != "tcp":
        raise click.UsageError(f"--listen: {listen}: only connections to a HOST:PORT can be dealt")
    return listener.address


def _arms(control: str, weights: Sequence[str], faults: Sequence[str]) -> list[Arm]:
    shares = dict.fromkeys((*ENGINES, CONTROL), 1)
    for text in weights:
        name, _, number = text.partition("=")
        _known("--weight", text, name, shares)
        if not (number.isascii() and number.isdecimal() and int(number) <= MOST_SHARES):
            raise click.UsageError(f"--weight: {text}: expected {name}=N, N from 0 to {MOST_SHARES}")
        shares[name] = int(number)
    if not (shares[control] and shares[CONTROL]):
        raise click.UsageError(
            f"--weight: all is compared with {control} and its control, so neither may be left out"
        )
    specified: dict[str, list[str]] = {name: [] for name in shares}
    for text in faults:
        name, _, spec = text.partition(":")
        _known("--fault", text, name, shares)
        if not shares[name]:
            raise click.UsageError(f"--fault: {text}: {name} is left out by its weight")
        specified[name].append(spec)
    return [
        Arm(
            name=name,
            engine=control if name == CONTROL else name,
            weight=weight,
            faults=tuple(specified[name]),
        )
        for name, weight in shares.items()
        if weight
    ]


def _known(flag: str, text: str, name: str, names: Mapping[str, int]) -> None:
    if name not in names:
        raise click.UsageError(f"{flag}: {text}: {name!r} is none of {', '.join(names)}")


def _directory(keep: Path | None, stack: contextlib.ExitStack) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-split-")))
    try:
        keep.mkdir(parents=True)
    except FileExistsError as error:
        raise click.UsageError(f"--keep: {keep} exists already; name a new folder") from error
    return keep.absolute()


@click.command("split")
@click.option("--listen", metavar="ADDR", required=True, help="HOST:PORT, where your clients connect.")
@click.option("--upstream", "upstreams", metavar="ADDR", multiple=True, help="HOST:PORT or unix:/PATH.")
@click.option("--service", type=click.Choice(["proxy", "echo"]), default="proxy", show_default=True)
@click.option(
    "--deal",
    type=click.Choice(["random", "sticky"]),
    default="random",
    show_default=True,
    help="By chance, or by the client's address.",
)
@click.option(
    "--weight",
    "weights",
    metavar="ENGINE=N",
    multiple=True,
    help="Shares of the sessions, 1 each by default; 0 leaves an engine out. ENGINE may be control.",
)
@click.option(
    "--control",
    type=click.Choice(ENGINES),
    default="nonblocking",
    show_default=True,
    help="The engine that runs twice, and that all are compared with.",
)
@click.option("--fault", "faults", metavar="ENGINE:SPEC", multiple=True, help="As --fault of `proxy`.")
@click.option("--sessions", type=click.IntRange(1), help="End when so many have ended.")
@click.option("--time", "limit", type=duration, metavar="DURATION", help="End after 90s, 10m, 2h.")
@click.option(
    "--keep", metavar="DIR", type=click.Path(path_type=Path), help="Keep the daemons' logs, in a new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results instead of the tables.")
def command(
    *,
    listen: str,
    upstreams: tuple[str, ...],
    service: str,
    deal: Deal,
    weights: tuple[str, ...],
    control: str,
    faults: tuple[str, ...],
    sessions: int | None,
    limit: float | None,
    keep: Path | None,
    as_json: bool,
) -> int:
    """Deal the sessions of one port to the three engines, and tell which does better.

    Runs until Ctrl-C, --sessions or --time; sessions that are open then may end by themselves, and a
    second Ctrl-C cuts them.
    """
    arms = _arms(control, weights, faults)
    address = _address(service, listen, upstreams, [spec for arm in arms for spec in arm.faults])
    with contextlib.ExitStack() as stack:
        directory = _directory(keep, stack)
        try:
            group = Group(address, [arm.weight for arm in arms], deal)
            stack.callback(group.close)
            reached = [address for text in upstreams for address in resolve(Address.parse(text))]
            refuse_loops([Route("--upstream", group.addresses, reached)])
        except EndpointError as error:
            raise Failed(error.message, error.exit_code) from error
        split = Split(arms, group, directory, stack.enter_context(Signals()))
        stack.callback(split.kill)
        split.start(service, upstreams)
        systemd.notify("READY=1")
        where = ", ".join(map(str, group.addresses))
        names = ", ".join(arm.name for arm in arms)
        how = "at random" if deal == "random" else "by the client's address"
        click.echo(f"triptych: {where} is dealt {how} to {names} (another {control})", err=True)
        begun = time.monotonic()
        failure = split.run(sessions, limit)
        systemd.notify("STOPPING=1")
        results = Results(
            addresses=list(map(str, group.addresses)),
            deal=deal,
            seconds=round(time.monotonic() - begun, 1),
            base=control,
            arms=[_told(arm, account) for arm, account in split.accounts.items()],
            findings=compare(control, split.accounts),
        )
    if as_json:
        click.echo(msgspec.json.encode(results))
    else:
        _print(results, split.accounts)
    if failure is not None:
        raise Failed(failure, UNAVAILABLE)
    return 0
