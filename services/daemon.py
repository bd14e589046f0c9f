"""One process's life: sockets, log, service, engine, signals, drain.

The order is the point: sockets are bound before an engine is imported, so that a fault of the set-up
is told at once and an engine never meets a name; the log is opened before the first session; the
engine runs in the main thread, where Python delivers signals, until it is drained.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from services import vocabulary
from services.config import Config
from services.core.service import Gauges, Policy, Service
from services.core.upstreams import Pool, Upstream
from services.endpoints import EndpointError, Listener, close_listeners, exposure, open_listeners, resolve
from services.engines.base import Listening, load
from services.logs import Log

_STAT = Path("/proc/self/stat")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


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


def run(config: Config) -> int:
    """Serve as `config` says until told to stop. Returns the exit code.

    Raises:
        EndpointError: an address cannot be bound, an upstream's name means nothing, or this is not Linux.
        OSError: the log cannot be opened.

    """
    if sys.platform != "linux":
        # TCP_INFO, TCP_USER_TIMEOUT, SIOCOUTQ and eventfd: what the behaviour table rests on
        raise EndpointError(f"the daemons need Linux, and this is {sys.platform}", 71)
    listeners = open_listeners(config)
    try:
        pools = {name: _pool(config, name) for name in config.pools}
        log = Log(config.log.path, config.log.level, config.engine)
        try:
            _serve(config, listeners, pools, log)
        finally:
            log.close()
    finally:
        close_listeners(listeners)
    return 0


def _pool(config: Config, name: str) -> Pool:
    upstreams = config.pools[name].upstreams
    return Pool(name, [Upstream(str(each.address), tuple(resolve(each.address))) for each in upstreams])


def _serve(config: Config, listeners: list[Listener], pools: dict[str, Pool], log: Log) -> None:
    clock = time.monotonic
    service = Service(
        instruments=_Instruments(log),
        timeouts=config.timeouts,
        buffer=config.limits.buffer,
        stats=config.log.stats,
        epoch=time.time() - clock(),
        now=clock(),
    )
    listening = []
    for listener in listeners:
        policy = Policy(
            listener.name,
            listener.service,
            listener.transport,
            pools[listener.pool] if listener.pool else None,
            listener.answer_low_ports,
        )
        listening += [
            Listening(policy, sock, address)
            for sock, address in zip(listener.sockets, listener.addresses, strict=True)
        ]
        _announce(listener, log)
    if config.engine != "blocking" and not hasattr(select, "epoll"):
        log.emit(vocabulary.EngineDegraded(lacking="epoll", instead="poll"))
    engine = load(config.engine)(listening, service, clock)

    def stop(number: int, _frame: FrameType | None) -> None:
        engine.post(lambda: engine.stop(signal.Signals(number).name))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log.emit(
        vocabulary.ServiceReady(
            addresses=[str(each.address) for each in listening], start_us=_since_process_start()
        )
    )
    engine.run()
    service.stopped(clock())


def _announce(listener: Listener, log: Log) -> None:
    for address in listener.addresses:
        log.emit(
            vocabulary.ListenerOpened(
                listener=listener.name,
                service=listener.service,
                transport=listener.transport,
                address=str(address),
                inherited=listener.inherited,
            )
        )
        risk = exposure(listener.service, address)
        if risk is not None:
            log.emit(vocabulary.ListenerExposed(listener=listener.name, address=str(address), risk=risk))


def _since_process_start() -> int:
    """Microseconds since the kernel started this process (in steps of a clock tick)."""
    started = int(_STAT.read_bytes().rpartition(b")")[2].split()[19]) / _TICKS
    return max(0, int((time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1e6))
