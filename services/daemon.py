"""One process's life: sockets, log, service, engine, signals, reload, drain.

The order is the point. Signals are blocked before there is any second thread, and one thread waits
for them: one that another thread's wait swallows would be seen by nobody. Sockets are bound before an
engine is imported, so that a fault of the set-up is told at once and an engine never meets a name. The
log is opened before the first session. The engine runs in the main thread until it is drained.

Beside the engine there are a few threads, which touch nothing of it but its public methods: one waits
for signals, one reloads (it resolves names), one tells the service manager how it goes, and one answers
Prometheus.
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
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from services import systemd, vocabulary
from services.config import Config, ConfigError, ListenerConfig, Source
from services.core.addresses import Address
from services.core.faults import AnyFault
from services.core.service import Gauges, Policy, Service, Snapshot
from services.core.session import Actions
from services.core.upstreams import Pool, Upstream
from services.endpoints import (
    EndpointError,
    Listener,
    Route,
    bound_address,
    close_listeners,
    exposure,
    open_listeners,
    open_metrics,
    refuse_loops,
    resolve,
)
from services.engines import sockets
from services.engines.base import Engine, Listening, load
from services.health import Checker
from services.logs import Log

if TYPE_CHECKING:
    from services.metrics import MetricsServer

_STAT = Path("/proc/self/stat")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# For the engine's own, a log opened anew, names that are looked up, and clients of Prometheus
OWN_DESCRIPTORS = 40
# A scrape waits this long for the engine; Prometheus' own patience is longer.
PATIENCE = 2.0
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
        EndpointError: an address cannot be bound, an upstream's name means nothing, or this is not Linux.
        OSError: the log cannot be opened.

    """
    if sys.platform != "linux":
        # TCP_INFO, TCP_USER_TIMEOUT, SIOCOUTQ and eventfd: what the behaviour table rests on
        raise EndpointError(f"the daemons need Linux, and this is {sys.platform}", 71)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    inherited = systemd.claim()
    listeners = open_listeners(config.listeners, inherited)
    try:
        pools = _pools(config)
        refuse_loops([_route(each, each.pool, pools) for each in listeners if each.pool])
        metrics = open_metrics(config.metrics.address, inherited) if config.metrics else []
        log = Log(config.log.path, config.log.level, config.engine, instance)
        try:
            _Daemon(config, instance, source, inherited, listeners, log).serve(pools, metrics)
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
        listeners: list[Listener],
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
        # all that were ever opened: `run` closes them, and removes what they left, in the end
        self._listeners = listeners
        self._listening: dict[tuple[str, Address], list[Listening]] = {}
        self._pools: Mapping[str, Pool] = {}
        self._reloading = threading.Lock()
        self._reloads = {"accepted": 0, "refused": 0}

    def _add(self, listener: Listener, pools: Mapping[str, Pool]) -> list[Listening]:
        """Take up a listener, and say so. One handed over may be several, of one name."""
        policy = Policy(listener.name, listener.service, listener.transport)
        _update(policy, listener, pools)
        policy.faults = listener.faults
        added = [
            Listening(policy, sock, address)
            for sock, address in zip(listener.sockets, listener.addresses, strict=True)
        ]
        self._listening.setdefault(_key(listener), []).extend(added)
        for each in added:
            sockets.set_options(each.socket, self._service.dead_peer)
            self._log.emit(
                vocabulary.ListenerOpened(
                    listener=listener.name,
                    service=listener.service,
                    transport=listener.transport,
                    address=str(each.address),
                    inherited=listener.inherited,
                )
            )
            risk = exposure(listener.service, each.address)
            if risk is not None:
                self._log.emit(
                    vocabulary.ListenerExposed(listener=listener.name, address=str(each.address), risk=risk)
                )
        return added

    def serve(self, pools: Mapping[str, Pool], metrics: Sequence[socket.socket]) -> None:
        self._adopt(pools)
        listening = [each for listener in self._listeners for each in self._add(listener, pools)]
        self._engine: Engine = load(self._config.engine)(listening, self._service, time.monotonic)
        self._begin_tallies(self._listeners)
        server = self._answer_prometheus(metrics) if metrics else None
        if self._config.engine != "blocking" and not hasattr(select, "epoll"):
            self._log.emit(vocabulary.EngineDegraded(lacking="epoll", instead="poll"))
        threading.Thread(target=self._await_signals, name="signals", daemon=True).start()
        self._checker = Checker(pools.values(), self._found)
        self._log.emit(vocabulary.ServiceReady(addresses=self._addresses(), start_us=_since_process_start()))
        systemd.notify("READY=1", self._status())
        if systemd.listens():
            threading.Thread(target=self._keep_reporting, name="reporter", daemon=True).start()
        self._engine.run()
        if server is not None:
            server.close()
            if self._config.metrics and self._config.metrics.address.transport == "unix":
                Path(self._config.metrics.address.host).unlink(missing_ok=True)
        self._service.stopped(time.monotonic())

    # Upstreams ----------------------------------------------------------------------------------

    def _adopt(self, pools: Mapping[str, Pool]) -> None:
        """These from now on. What is known of an upstream of one that was there before stays known."""
        for name, pool in pools.items():
            pool.emit = self._log.emit
            if name in self._pools:
                pool.succeed(self._pools[name])
        self._pools = pools

    def _found(self, pool: Pool, upstream: str, error: str | None) -> None:
        """By a health check, in its thread."""
        self._engine.post(lambda: pool.checked(upstream, error))

    # Signals ------------------------------------------------------------------------------------

    def _await_signals(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            if number == signal.SIGHUP:
                threading.Thread(target=self._reload, name="reload", daemon=True).start()
            else:
                systemd.notify("STOPPING=1")
                self._engine.stop(signal.Signals(number).name)

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
            except OSError as error:
                self._refuse([f"log.path: {error.strerror or error}"])
            systemd.notify("READY=1", self._status())

    def _refuse(self, faults: list[str]) -> None:
        self._reloads["refused"] += 1
        path = str(self._source.path) if self._source else "-"
        self._log.emit(vocabulary.ConfigRefused(path=path, faults=faults))

    def _take_over(self, config: Config) -> None:
        """Everything that can fail comes first; then nothing does."""
        if self._service.draining:
            raise ConfigError(["this daemon is draining; its successor reads the file"])
        if config.engine != self._config.engine:
            raise ConfigError([f"engine: {self._config.engine} is running, and only a restart changes that"])
        if config.metrics != self._config.metrics:
            raise ConfigError(["metrics.address: only a restart changes that"])
        wanted = {_key(each): each for each in config.listeners}
        pools = _pools(config)
        opened = open_listeners(
            [wanted[key] for key in wanted if key not in self._listening], self._inherited
        )
        try:
            self._refuse_loops(wanted, opened, pools)
            self._log.reopen(config.log.path, config.log.level)
        except (OSError, EndpointError):
            close_listeners(opened)
            raise
        self._reloads["accepted"] += 1
        kept = [key for key in wanted if key in self._listening]
        removed = [key for key in self._listening if key not in wanted]
        before = {_key(each): each.faults for each in self._config.listeners}
        self._config = config
        self._log.emit(
            vocabulary.ConfigReloaded(
                path=str(self._source.path) if self._source else "-",
                added=sorted({listener.name for listener in opened}),
                removed=sorted(name for name, _ in removed),
                kept=sorted(name for name, _ in kept),
            )
        )
        updates = [(each, wanted[key]) for key in kept for each in self._listening[key]]
        # those that the control interface set stay, unless the file has others now
        refaulted = {
            each.policy: wanted[key].faults
            for key in kept
            for each in self._listening[key]
            if wanted[key].faults != before.get(key)
        }
        self._checker.stop()
        self._engine.post(lambda: self._apply(config, pools, updates, opened, refaulted))
        self._checker = Checker(pools.values(), self._found)
        for key in removed:
            for each in self._listening.pop(key):
                self._engine.unlisten(each)
        for listener in opened:
            self._listeners.append(listener)
            for each in self._add(listener, pools):
                self._engine.listen(each)

    def _apply(
        self,
        config: Config,
        pools: Mapping[str, Pool],
        updates: Sequence[tuple[Listening, ListenerConfig]],
        opened: Sequence[Listener],
        refaulted: Mapping[Policy, tuple[AnyFault, ...]],
    ) -> Actions:
        """Where the engine's state may be touched."""
        self._adopt(pools)
        now = time.monotonic()
        self._service.reconfigure(config.timeouts, config.limits, config.log.stats, now)
        self._begin_tallies(opened)
        for listening, listener in updates:
            _update(listening.policy, listener, pools)
            sockets.set_options(listening.socket, self._service.dead_peer)
        return [
            action
            for policy, faults in refaulted.items()
            for action in self._service.change_faults(policy, faults, now)
        ]

    def _refuse_loops(
        self,
        wanted: Mapping[tuple[str, Address], ListenerConfig],
        opened: Sequence[Listener],
        pools: Mapping[str, Pool],
    ) -> None:
        """Of those that would listen with the new configuration: one kept may have another pool now."""
        listening = [*opened, *(each for each in self._listeners if _key(each) in self._listening)]
        proxies = [(each, wanted[_key(each)].pool) for each in listening if _key(each) in wanted]
        refuse_loops([_route(each, pool, pools) for each, pool in proxies if pool])

    def _begin_tallies(self, listeners: Sequence[Listener]) -> None:
        """A series that Prometheus first sees at one has not risen."""
        for listener in listeners:
            self._service.tally(listener.name, listener.service, listener.transport)

    # Prometheus ---------------------------------------------------------------------------------

    def _answer_prometheus(self, listening: Sequence[socket.socket]) -> "MetricsServer":
        # loaded only by a daemon that is asked for metrics
        from services.metrics import MetricsServer  # noqa: PLC0415

        for each in listening:
            address = bound_address(each)
            risk = exposure("metrics", address)
            if risk is not None:
                self._log.emit(
                    vocabulary.ListenerExposed(listener="metrics", address=str(address), risk=risk)
                )
        server = MetricsServer(
            listening,
            self._collect,
            emit=self._log.emit,
            engine=self._config.engine,
            instance=self._instance,
            started=time.time() - _since_process_start() / 1e6,
            reloads=self._reloads,
        )
        server.start()
        return server

    def _collect(self) -> Snapshot:
        """Ask the engine. TimeoutError where it does not answer."""
        answer: SimpleQueue[Snapshot] = SimpleQueue()
        self._engine.post(lambda: answer.put(self._service.snapshot(time.monotonic())))
        try:
            return answer.get(timeout=PATIENCE)
        except Empty:
            raise TimeoutError from None

    # The service manager ------------------------------------------------------------------------

    def _keep_reporting(self) -> None:
        """Has the engine itself report: one that hangs does not, and the manager's watchdog ends it."""
        interval = min(REPORT_INTERVAL, (systemd.watchdog() or 3 * REPORT_INTERVAL) / 3)
        while True:
            self._engine.check(self._report)
            time.sleep(interval)

    def _report(self) -> None:
        report = ["WATCHDOG=1", self._status()]
        if self._service.draining:
            # until the next report and two more
            report.append(f"EXTEND_TIMEOUT_USEC={int(3e6 * REPORT_INTERVAL)}")
        systemd.notify(*report)

    def _status(self) -> str:
        doing = "draining" if self._service.draining else f"on {', '.join(self._addresses())}"
        return f"STATUS={self._config.engine} {doing}; {self._service.open_sessions} sessions"

    def _addresses(self) -> list[str]:
        return [str(each.address) for group in self._listening.values() for each in group]


def _key(listener: Listener | ListenerConfig) -> tuple[str, Address]:
    """What makes a listener the same one after a reload: its name and its address as configured."""
    return listener.name, listener.requested if isinstance(listener, Listener) else listener.address


def _update(policy: Policy, listener: Listener | ListenerConfig, pools: Mapping[str, Pool]) -> None:
    policy.service = listener.service
    policy.pool = pools[listener.pool] if listener.pool else None
    policy.answer_low_ports = listener.answer_low_ports
    policy.lists = listener.lists
    policy.proxy_protocol = listener.proxy_protocol


def _pools(config: Config) -> dict[str, Pool]:
    return {
        name: Pool(
            name,
            [
                Upstream(
                    str(each.address),
                    tuple(resolve(each.address)),
                    weight=each.weight,
                    backup=each.backup,
                    limit=each.sessions,
                    proxy_protocol=each.proxy_protocol,
                )
                for each in pool.upstreams
            ],
            pool,
        )
        for name, pool in config.pools.items()
    }


def _route(listener: Listener, pool: str, pools: Mapping[str, Pool]) -> Route:
    upstreams = [address for upstream in pools[pool].upstreams for address in upstream.addresses]
    return Route(listener.name, listener.addresses, upstreams)


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
