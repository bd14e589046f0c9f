"""The listeners of a running engine: what a reload and the control interface add, change and remove.

A change belongs to one thread at a time (`changing`) and is whole when it returns: a listener that was
closed is closed in the kernel, so that its port can be bound again at once. What touches the engine's
state is posted to it. Nothing changes once the engine was told to stop: the last listeners are the
engine's own to close.

This module decides nothing about what is wanted: that is the configuration's, or the client's of
`toxiproxy.py`.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from socket import socket
from typing import NamedTuple, TypeVar

from services import vocabulary
from services.config import ConfigError, ListenerConfig
from services.core.addresses import Address
from services.core.faults import AnyFault
from services.core.service import Policy, Service
from services.core.session import Actions
from services.core.upstreams import Pool
from services.endpoints import (
    CONFIGURATION,
    EndpointError,
    Listener,
    Route,
    close_listeners,
    exposure,
    open_again,
    open_listeners,
    refuse_loops,
)
from services.engines import sockets
from services.engines.base import Engine, Listening

T = TypeVar("T")
Key = tuple[str, Address]

# Whoever asks the engine waits this long; Prometheus' own patience is longer.
PATIENCE = 2.0
# close(2) in another thread may return a little later than its socket says that it is closed.
CLOSING = 0.25


class DrainingError(Exception):
    """The engine was told to stop: nothing changes any more."""


@dataclass(eq=False, slots=True)
class Held:
    """A listener that the daemon has. `listening` is what the engine serves of it: nothing while it is
    disabled. `pool` is what its policy has, or gets with the engine's next step.
    """

    key: Key
    listener: Listener
    policy: Policy
    pool: Pool | None
    by_control: bool = False
    listening: list[Listening] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.listener.name


class Difference(NamedTuple):
    """Between a configuration and the listeners that there are."""

    kept: Sequence[tuple[Held, ListenerConfig]]
    removed: Sequence[Held]
    missing: Sequence[ListenerConfig]


class Listeners:
    """Args:
    opened: bound already; kept up to date, so that the caller can close what is left in the end.
    engine: its class; the instance is `engine`.

    """

    def __init__(
        self,
        opened: list[Listener],
        pools: Mapping[str, Pool],
        service: Service,
        engine: type[Engine],
        emit: Callable[[vocabulary.Event], None],
    ) -> None:
        self._lock = threading.Lock()
        self._stopping = False
        self._service = service
        self._emit = emit
        self._opened = opened
        self._held = [_hold(listener, pools) for listener in opened]
        for held in self._held:
            self._take_up(held)
            self._begin_tally(held.policy)
        self.engine = engine(
            [each for held in self._held for each in held.listening], service, time.monotonic
        )

    def addresses(self) -> list[str]:
        return [str(each.address) for held in self._held for each in held.listening]

    def all(self) -> list[Held]:
        """From any thread."""
        return list(self._held)

    def stop(self, reason: str) -> None:
        with self._lock:
            self._stopping = True
            self.engine.stop(reason)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """What changes anything below happens inside of this. DrainingError once it is too late."""
        with self._lock:
            if self._stopping:
                raise DrainingError
            yield

    def ask(self, function: Callable[[], T]) -> T:
        """What `function` returns where the engine's state may be touched. TimeoutError where the engine
        does not come to it.
        """
        answer: SimpleQueue[T] = SimpleQueue()
        self.engine.post(lambda: answer.put(function()))
        try:
            return answer.get(timeout=PATIENCE)
        except Empty:
            raise TimeoutError from None

    # For a reload -------------------------------------------------------------------------------

    def compare(self, wanted: Sequence[ListenerConfig]) -> Difference:
        """What a configuration means for what is here. ConfigError where a name is taken."""
        configs = {key_of(each): each for each in wanted}
        own = {held.name for held in self._held if held.by_control}
        if taken := sorted(own & {each.name for each in wanted}):
            raise ConfigError(
                [
                    f"listener: {name!r} was made over the control interface; delete it there or choose "
                    "another name"
                    for name in taken
                ]
            )
        here = {held.key for held in self._held}
        return Difference(
            [(held, configs[held.key]) for held in self._held if held.key in configs],
            [held for held in self._held if held.key not in configs and not held.by_control],
            [each for key, each in configs.items() if key not in here],
        )

    def open(
        self,
        difference: Difference,
        pools: Mapping[str, Pool],
        inherited: Mapping[str, Sequence[socket]],
    ) -> list[Listener]:
        """Bind what is missing, and see that nothing would lead back here. EndpointError, and then
        nothing is left open.
        """
        opened = open_listeners(difference.missing, inherited)
        try:
            _refuse_loops(
                [
                    *((held.listener, pools.get(config.pool or "")) for held, config in difference.kept),
                    *((each, pools.get(each.pool or "")) for each in opened),
                    *((held.listener, held.pool) for held in self._held if held.by_control),
                ]
            )
        except EndpointError:
            close_listeners(opened)
            raise
        return opened

    def take_over(
        self,
        difference: Difference,
        pools: Mapping[str, Pool],
        opened: Iterable[Listener],
        old_faults: Mapping[Key, tuple[AnyFault, ...]],
    ) -> None:
        """With what was `opened` for it. Nothing of this can fail."""
        for held, config in difference.kept:
            held.pool = pools.get(config.pool or "")
            self.engine.post(partial(self._update, held, config))
            # those that the control interface set stay, unless the file has others now
            if config.faults != old_faults.get(held.key):
                self.engine.post(partial(self._change_faults, [held.policy], config.faults))
        for held in difference.removed:
            self._held.remove(held)
            with contextlib.suppress(TimeoutError):  # then it is closed in the end
                self._close(held)
        for listener in opened:
            self._opened.append(listener)
            held = _hold(listener, pools)
            self._held.append(held)
            self._serve(held)
        with contextlib.suppress(TimeoutError):  # whoever changes something next finds it done
            self.ask(lambda: None)

    # For the control interface ------------------------------------------------------------------

    def streams(self) -> list[Held]:
        """Those that the control interface knows: one of each name, and no datagrams."""
        found: dict[str, Held] = {}
        for held in self.all():
            if held.policy.transport != "udp":
                found.setdefault(held.name, held)
        return list(found.values())

    def create(self, name: str, requested: Address, pool: Pool) -> Held:
        """A proxy, disabled."""
        pool.emit = self._emit
        if any(held.name == name for held in self._held):
            raise EndpointError(f"{name}: there is a listener of this name already", CONFIGURATION)
        listener = Listener(
            name=name,
            service="proxy",
            transport="tcp",
            pool=pool.name,
            answer_low_ports=False,
            lists=None,
            proxy_protocol=False,
            faults=(),
            sockets=[],
            inherited=False,
            requested=requested,
        )
        held = _hold(listener, {pool.name: pool})
        held.by_control = True
        self._held.append(held)
        return held

    def enable(self, held: Held) -> None:
        """EndpointError where its address cannot be had, or its upstreams lead back here."""
        if held.listening:
            return
        listener = _open_at_once(held.listener)
        try:
            _refuse_loops([(listener, held.pool), *self._others(held)])
        except EndpointError:
            close_listeners([listener])
            raise
        held.listener = listener
        self._opened.append(listener)
        self._serve(held)

    def disable(self, held: Held) -> None:
        """Nobody is accepted any more, and open sessions are cut."""
        if held.listening:
            if held.listener.inherited:
                raise EndpointError(
                    f"{held.name}: its socket is the service manager's, and would stay open", CONFIGURATION
                )
            self._close(held)
            self._cut(held)

    def remove(self, held: Held) -> None:
        self.disable(held)
        self._held.remove(held)

    def move(self, held: Held, requested: Address) -> None:
        """Another address from now on. It is disabled then."""
        self.disable(held)
        held.listener = replace(held.listener, sockets=[], requested=requested)

    def redirect(self, held: Held, pool: Pool) -> None:
        """Other upstreams from now on; open sessions are cut."""
        _refuse_loops([(held.listener, pool), *self._others(held)])
        held.pool = pool
        pool.emit = self._emit
        self.engine.post(partial(setattr, held.policy, "pool", pool))
        self._cut(held)

    def change_faults(self, held: Held, faults: tuple[AnyFault, ...]) -> None:
        """For open sessions too."""
        policies = [
            each.policy for each in self._held if each.key == held.key and each.policy.transport != "udp"
        ]
        self._do(partial(self._change_faults, policies, faults))

    # Where the engine's state may be touched ----------------------------------------------------

    def _begin_tally(self, policy: Policy) -> None:
        """A series that Prometheus first sees at one has not risen."""
        self._service.tally(policy.name, policy.service, policy.transport)

    def _update(self, held: Held, config: ListenerConfig) -> None:
        _describe(held.policy, config, held.pool)
        for each in held.listening:
            sockets.set_options(each.socket, self._service.dead_peer)

    def _change_faults(self, policies: Iterable[Policy], faults: tuple[AnyFault, ...]) -> Actions:
        now = time.monotonic()
        return [action for policy in policies for action in self._service.change_faults(policy, faults, now)]

    # Steps --------------------------------------------------------------------------------------

    def _take_up(self, held: Held) -> None:
        """What the engine is to serve, and the lines that say so."""
        listener, policy = held.listener, held.policy
        held.listening = [
            Listening(policy, sock, address)
            for sock, address in zip(listener.sockets, listener.addresses, strict=True)
        ]
        for each in held.listening:
            sockets.set_options(each.socket, self._service.dead_peer)
            self._emit(
                vocabulary.ListenerOpened(
                    listener=policy.name,
                    service=policy.service,
                    transport=policy.transport,
                    address=str(each.address),
                    inherited=listener.inherited,
                )
            )
            risk = exposure(policy.service, each.address)
            if risk is not None:
                self._emit(
                    vocabulary.ListenerExposed(listener=policy.name, address=str(each.address), risk=risk)
                )

    def _serve(self, held: Held) -> None:
        self._take_up(held)
        self.engine.post(partial(self._begin_tally, held.policy))
        for each in held.listening:
            self.engine.listen(each)

    def _close(self, held: Held) -> None:
        """TimeoutError where the engine does not come to it."""
        closing, held.listening = held.listening, []
        for each in closing:
            self.engine.unlisten(each)
        deadline = time.monotonic() + PATIENCE
        # each engine closes them in a thread of its own, after the last client in the backlog
        while any(each.socket.fileno() != -1 for each in closing):
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.001)
        for each in closing:
            self._emit(vocabulary.ListenerClosed(listener=held.name, address=str(each.address)))
        if held.listener in self._opened:
            self._opened.remove(held.listener)
            close_listeners([held.listener])

    def _cut(self, held: Held) -> None:
        self._do(lambda: self._service.cut(held.policy, time.monotonic()))

    def _do(self, function: Callable[[], Actions]) -> None:
        """Have the engine do what `function` says, and wait until it has."""
        self.engine.post(function)
        self.ask(lambda: None)

    def _others(self, held: Held) -> list[tuple[Listener, Pool | None]]:
        return [(each.listener, each.pool) for each in self._held if each is not held]


def key_of(listener: ListenerConfig) -> Key:
    """What makes a listener the same one after a reload: its name and its address as configured."""
    return listener.name, listener.address


def route(listener: Listener, pool: Pool) -> Route:
    upstreams = [address for upstream in pool.upstreams for address in upstream.addresses]
    return Route(listener.name, listener.addresses, upstreams)


def _refuse_loops(proxies: Iterable[tuple[Listener, Pool | None]]) -> None:
    refuse_loops([route(listener, pool) for listener, pool in proxies if pool])


def _hold(listener: Listener, pools: Mapping[str, Pool]) -> Held:
    policy = Policy(listener.name, listener.service, listener.transport, faults=listener.faults)
    pool = pools.get(listener.pool or "")
    _describe(policy, listener, pool)
    return Held((listener.name, listener.requested), listener, policy, pool)


def _describe(policy: Policy, listener: Listener | ListenerConfig, pool: Pool | None) -> None:
    policy.service = listener.service
    policy.pool = pool
    policy.answer_low_ports = listener.answer_low_ports
    policy.lists = listener.lists
    policy.proxy_protocol = listener.proxy_protocol


def _open_at_once(listener: Listener) -> Listener:
    """`open_again`, also where the socket before is being closed just now."""
    deadline = time.monotonic() + CLOSING
    while True:
        try:
            return open_again(listener)
        except EndpointError as error:
            cause = error.__cause__
            taken = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
            if not taken or time.monotonic() > deadline:
                raise
        time.sleep(0.005)
