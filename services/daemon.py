"""One process's life: sockets, log, service, engine, signals, reload, drain.

The order is the point. Signals are blocked before there is any second thread, and one thread waits
for them: one that another thread's wait swallows would be seen by nobody. Sockets are bound before an
engine is imported, so that a fault of the set-up is told at once and an engine never meets a name. The
log is opened before the first session. The engine runs in the main thread until it is drained.

Beside the engine there are a few threads, which touch nothing of it but its public methods: one waits
for signals, one reloads, one resolves names, one tells the service manager how it goes, and one each
answers Prometheus, those who control its faults, and its operator. Its listeners come and go by
`listeners.py`.
"""

import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from services import control, status, systemd, vocabulary
from services.config import Config, ConfigError, Source
from services.core.addresses import Address
from services.core.service import Gauges, Service
from services.core.upstreams import Pool
from services.endpoints import (
    EndpointError,
    Listener,
    Route,
    bound_address,
    close_listeners,
    exposure,
    open_interface,
    open_listeners,
    refuse_loops,
)
from services.engines.base import load
from services.health import Checker
from services.listeners import DrainingError, Listeners, key_of, route
from services.logs import Log
from services.resolver import Name, Resolver, build_pools
from services.web import Server, WebServer

_STAT = Path("/proc/self/stat")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# For the engine's own, a log opened anew, names that are looked up, and clients of the interfaces
OWN_DESCRIPTORS = 60
Interface = Literal["metrics", "faults", "control"]
INTERFACES: tuple[Interface, ...] = get_args(Interface)
SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
# The service manager hears of us this often where it has no watchdog.
REPORT_INTERVAL = 10.0


class _Instruments:
    """What the core asks of the process it runs in."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.emit = log.emit

    def lines_dropped(self) -> int:
        return self._log.dropped

    def gauges(self) -> Gauges:
        """From /proc/self (proc(5)); a system without it is told as null."""
        try:
            fields = _STAT.read_bytes().rpartition(b")")[2].split()
            descriptors = len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208  one is the listing itself
        except OSError:
            return Gauges()
        utime, stime, threads, rss = (int(fields[index]) for index in (11, 12, 17, 21))
        return Gauges(threads, descriptors, rss * _PAGE, (utime + stime) * 1_000_000 // _TICKS)


def run(config: Config, *, instance: str = "-", source: Source | None = None) -> int:
    """Serve as `config` says until told to stop. Returns the exit code.

    Args:
        instance: of the unit that runs us; in every log line.
        source: where SIGHUP reads the configuration again; None where it came from flags, and SIGHUP
            just opens the log anew.

    Raises:
        EndpointError: an address cannot be bound, an upstream's name in the flags means nothing, or this
            is not Linux.
        OSError: the log cannot be opened.

    """
    if sys.platform != "linux":
        # TCP_INFO, TCP_USER_TIMEOUT, SIOCOUTQ and eventfd: what the behaviour table rests on
        raise EndpointError(f"the daemons need Linux, and this is {sys.platform}", 71)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    inherited = systemd.claim()
    listeners = open_listeners(config.listeners, inherited)
    try:
        pools, unresolved = build_pools(config)
        if source is None:
            for error in unresolved.values():
                raise error
        refuse_loops([route(each, pools[each.pool]) for each in listeners if each.pool])
        interfaces: dict[Interface, Sequence[socket.socket]] = {
            "metrics": open_interface(config.metrics.address, inherited) if config.metrics else [],
            "faults": open_interface(config.faults.address, inherited) if config.faults else [],
        }
        uncontrolled = None
        try:
            interfaces["control"] = control.open_socket(
                config.control.address if config.control else None, os.environ
            )
        except EndpointError as error:
            if config.control:
                raise
            uncontrolled = error.message
        log = Log(config.log.path, config.log.level, config.engine, instance)
        try:
            if uncontrolled is not None:
                log.emit(vocabulary.EngineDegraded(lacking=uncontrolled, instead="no control socket"))
            _Daemon(config, instance, source, inherited, log).serve(listeners, pools, unresolved, interfaces)
        finally:
            log.close()
    finally:
        close_listeners(listeners)
    return 0


class _Daemon:
    """What a running daemon has, and what a reload changes of it."""

    def __init__(
        self,
        config: Config,
        instance: str,
        source: Source | None,
        inherited: Mapping[str, Sequence[socket.socket]],
        log: Log,
    ) -> None:
        self._config = config
        self._instance = instance
        self._source = source
        self._inherited = inherited
        self._log = log
        self._service = Service(
            instruments=_Instruments(log),
            timeouts=config.timeouts,
            limits=config.limits,
            stats=config.log.stats,
            epoch=time.time() - time.monotonic(),
            now=time.monotonic(),
            descriptors=_spare_descriptors(),
        )
        self._pools: Mapping[str, Pool] = {}
        self._reloading = threading.Lock()
        self._reloads = {"accepted": 0, "refused": 0}

    def serve(
        self,
        opened: list[Listener],
        pools: Mapping[str, Pool],
        unresolved: Mapping[Name, EndpointError],
        interfaces: Mapping[Interface, Sequence[socket.socket]],
    ) -> None:
        self._adopt(pools)
        engine = load(self._config.engine)
        self._listeners = Listeners(opened, pools, self._service, engine, self._log.emit)
        files = [
            Path(address.host)
            for name, sockets in interfaces.items()
            for address in map(bound_address, sockets)
            if address.transport == "unix" and self._is_ours(name)
        ]
        servers = [self._answer(name, sockets) for name, sockets in interfaces.items() if sockets]
        if self._config.engine != "blocking" and not hasattr(select, "epoll"):
            self._log.emit(vocabulary.EngineDegraded(lacking="epoll", instead="poll"))
        threading.Thread(target=self._await_signals, name="signals", daemon=True).start()
        self._look_after(unresolved)
        self._log.emit(
            vocabulary.ServiceReady(addresses=self._listeners.addresses(), start_us=_since_process_start())
        )
        systemd.notify("READY=1", self._status())
        if systemd.listens():
            threading.Thread(target=self._keep_reporting, name="reporter", daemon=True).start()
        self._listeners.engine.run()
        for server in servers:
            server.close()
        for file in files:
            file.unlink(missing_ok=True)
        self._service.stopped(time.monotonic())

    # Upstreams ----------------------------------------------------------------------------------

    def _adopt(self, pools: Mapping[str, Pool]) -> None:
        """These from now on. What is known of an upstream of one that was there before stays known."""
        for name, pool in pools.items():
            pool.emit = self._log.emit
            if name in self._pools:
                pool.succeed(self._pools[name])
        self._pools = pools

    def _look_after(self, unresolved: Mapping[Name, EndpointError]) -> None:
        """The pools that were adopted, from now on."""
        self._checker = Checker(self._pools.values(), self._found)
        self._resolver = Resolver(
            self._config,
            self._pools,
            unresolved,
            vet=self._vet,
            moved=self._moved,
            emit=self._log.emit,
        )

    def _vet(self, name: Name, addresses: Sequence[Address]) -> None:
        """EndpointError where an upstream with these addresses would lead back here."""
        refuse_loops(
            [
                Route(
                    held.name,
                    held.listener.addresses,
                    [
                        address
                        for upstream in held.pool.upstreams
                        for address in (
                            addresses if (held.pool.name, upstream.name) == name else upstream.addresses
                        )
                    ],
                )
                for held in self._listeners.all()
                if held.pool
            ]
        )

    def _moved(self, name: Name, addresses: Sequence[Address]) -> None:
        """By the resolver, in its thread."""
        self._listeners.engine.post(lambda: self._pools[name.pool].moved(name.upstream, addresses))

    def _found(self, pool: Pool, upstream: str, error: str | None) -> None:
        """By a health check, in its thread."""
        self._listeners.engine.post(lambda: pool.checked(upstream, error))

    # Signals ------------------------------------------------------------------------------------

    def _await_signals(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            if number == signal.SIGHUP:
                threading.Thread(target=self._reload, name="reload", daemon=True).start()
            else:
                systemd.notify("STOPPING=1")
                self._listeners.stop(signal.Signals(number).name)

    # Reload -------------------------------------------------------------------------------------

    def _reload(self) -> None:
        """Rule 18: a good file holds for new sessions, a bad one is refused and the old one stays."""
        with self._reloading:
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                self._take_over(self._config if self._source is None else self._source.read())
            except ConfigError as error:
                self._refuse(error.faults)
            except EndpointError as error:
                self._refuse([error.message])
            except DrainingError:
                self._refuse(["this daemon is draining; its successor reads the file"])
            except OSError as error:
                self._refuse([f"log.path: {error.strerror or error}"])
            systemd.notify("READY=1", self._status())

    def _refuse(self, faults: list[str]) -> None:
        self._reloads["refused"] += 1
        path = str(self._source.path) if self._source else "-"
        self._log.emit(vocabulary.ConfigRefused(path=path, faults=faults))

    def _take_over(self, config: Config) -> None:
        """Everything that can fail comes first; then nothing does."""
        if config.engine != self._config.engine:
            raise ConfigError([f"engine: {self._config.engine} is running, and only a restart changes that"])
        for interface in INTERFACES:
            if getattr(config, interface) != getattr(self._config, interface):
                raise ConfigError([f"{interface}.address: only a restart changes that"])
        pools, unresolved = build_pools(config)
        listeners = self._listeners
        with listeners.changing():
            difference = listeners.compare(config.listeners)
            opened = listeners.open(difference, pools, self._inherited)
            try:
                self._log.reopen(config.log.path, config.log.level)
            except OSError:
                close_listeners(opened)
                raise
            self._reloads["accepted"] += 1
            old_faults = {key_of(each): each.faults for each in self._config.listeners}
            self._config = config
            self._log.emit(
                vocabulary.ConfigReloaded(
                    path=str(self._source.path) if self._source else "-",
                    added=sorted({listener.name for listener in opened}),
                    removed=sorted({held.name for held in difference.removed}),
                    kept=sorted({held.name for held, _ in difference.kept}),
                )
            )
            self._checker.stop()
            self._resolver.stop()
            listeners.engine.post(partial(self._reconfigure, config, pools))
            listeners.take_over(difference, pools, opened, old_faults)
            self._look_after(unresolved)

    def _reconfigure(self, config: Config, pools: Mapping[str, Pool]) -> None:
        """Where the engine's state may be touched."""
        self._adopt(pools)
        self._service.reconfigure(config.timeouts, config.limits, config.log.stats, time.monotonic())

    # Interfaces ---------------------------------------------------------------------------------

    def _is_ours(self, name: Interface) -> bool:
        """Or did the service manager bind its socket?"""
        configured = getattr(self._config, name)
        return configured is None or configured.address.transport != "systemd"

    def _answer(self, name: Interface, listening: Sequence[socket.socket]) -> Server:
        for each in listening:
            address = bound_address(each)
            self._log.emit(vocabulary.InterfaceOpened(interface=name, address=str(address)))
            risk = exposure(name, address)
            if risk is not None:
                self._log.emit(vocabulary.ListenerExposed(listener=name, address=str(address), risk=risk))
        server = self._server(name, listening)
        server.start()
        return server

    def _server(self, name: Interface, listening: Sequence[socket.socket]) -> Server:
        """What only some daemons are asked for is loaded only by those."""
        if name == "control":
            return control.Control(
                listening,
                engine=self._listeners.engine,
                service=self._service,
                held=self._listeners.all,
                pools=lambda: self._pools,
                identity={
                    "triptych": version("triptych"),
                    "engine": self._config.engine,
                    "instance": self._instance,
                },
                uptime_us=_since_process_start,
                clock=time.monotonic,
                emit=self._log.emit,
            )
        if name == "faults":
            from services.toxiproxy import Toxiproxy  # noqa: PLC0415

            return WebServer(name, listening, Toxiproxy(self._listeners).respond, self._log.emit)
        from services.metrics import Metrics  # noqa: PLC0415

        metrics = Metrics(
            lambda: self._listeners.ask(self._counted),
            engine=self._config.engine,
            instance=self._instance,
            started=time.time() - _since_process_start() / 1e6,
            reloads=self._reloads,
        )
        return WebServer(name, listening, metrics.respond, self._log.emit)

    def _counted(self) -> status.Counted:
        """Where the engine's state may be touched."""
        now = time.monotonic()
        return status.Counted(
            self._service.snapshot(now),
            [status.of_pool(pool, now) for pool in self._pools.values()],
            status.of_admission(self._service.admission, self._service.open_sessions, now),
        )

    # The service manager ------------------------------------------------------------------------

    def _keep_reporting(self) -> None:
        """Has the engine itself report: one that hangs does not, and the manager's watchdog ends it."""
        interval = min(REPORT_INTERVAL, (systemd.watchdog() or 3 * REPORT_INTERVAL) / 3)
        while True:
            self._listeners.engine.check(self._report)
            time.sleep(interval)

    def _report(self) -> None:
        report = ["WATCHDOG=1", self._status()]
        if self._service.draining:
            # until the next report and two more
            report.append(f"EXTEND_TIMEOUT_USEC={int(3e6 * REPORT_INTERVAL)}")
        systemd.notify(*report)

    def _status(self) -> str:
        doing = "draining" if self._service.draining else f"on {', '.join(self._listeners.addresses())}"
        return f"STATUS={self._config.engine} {doing}; {self._service.open_sessions} sessions"


def _spare_descriptors() -> int:
    """Left for sessions: of all that the kernel allows (RLIMIT_NOFILE), without those that are open
    already and some for what else a daemon opens.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  names are all it takes
    return allowed - open_now - min(OWN_DESCRIPTORS, allowed // 8)


def _since_process_start() -> int:
    """Microseconds since the kernel started this process (in steps of a clock tick)."""
    started = int(_STAT.read_bytes().rpartition(b")")[2].split()[19]) / _TICKS
    return max(0, int((time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1e6))
