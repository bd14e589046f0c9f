"""A service on a clock of the test's own, and what it logged."""

from collections.abc import Sequence
from typing import Any

import msgspec

from services import vocabulary
from services.core.addresses import Address
from services.core.admission import Limits
from services.core.faults import AnyFault
from services.core.record import Side
from services.core.relay import Relay
from services.core.service import Gauges, Policy, Service
from services.core.session import Action, Actions, Dial, Dialled, Event, Finished, Timeouts
from services.core.upstreams import Pool, Upstream

CLIENT_ADDRESS = Address("tcp", "192.0.2.1", 40_000)
LOCAL_ADDRESS = Address("tcp", "192.0.2.2", 7)


def upstream(number: int, *ports: int) -> Upstream:
    return Upstream(
        f"upstream-{number}", tuple(Address("tcp", f"198.51.100.{number}", port) for port in ports or (80,))
    )


class Stage:
    """`now` moves only when the test says so; `events` are what was logged."""

    def __init__(
        self,
        *,
        buffer: int = 100,
        limits: Limits | None = None,
        upstreams: int = 1,
        stats: float = 60.0,
        descriptors: float = float("inf"),
        **timeouts: float,
    ) -> None:
        self.now = 1000.0
        self.events: list[vocabulary.Event] = []
        self.pool = Pool("pool", [upstream(number) for number in range(1, upstreams + 1)])
        self.service = Service(
            instruments=self,
            timeouts=Timeouts(**timeouts),
            limits=limits or Limits(buffer=buffer),
            stats=stats,
            epoch=1_700_000_000.0,
            now=self.now,
            descriptors=descriptors,
        )

    def emit(self, event: vocabulary.Event, /) -> None:
        self.events.append(event)

    def gauges(self) -> Gauges:
        return Gauges(threads=1)

    def lines_dropped(self) -> int:
        return 0

    def logged(self, kind: type[vocabulary.Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


class Play:
    """One session, driven as an engine would drive it; `actions` are those of the last event."""

    def __init__(
        self,
        stage: Stage,
        service: str = "proxy",
        faults: Sequence[AnyFault] = (),
        *,
        proxy_protocol: bool = False,
    ) -> None:
        self.stage = stage
        pool = stage.pool if service == "proxy" else None
        self.policy = Policy("front", service, "tcp", pool, faults=tuple(faults))  # type: ignore[arg-type]
        self.policy.proxy_protocol = proxy_protocol
        admitted = stage.service.accept(self.policy, CLIENT_ADDRESS, LOCAL_ADDRESS, 0.004, stage.now)
        assert admitted is not None
        self.session, actions = admitted
        self.actions = self._mine(actions)
        self.history = list(self.actions)

    def tell(self, event: Event, after: float = 0.001) -> list[Action]:
        self.stage.now += after
        return self._note(self.session.handle(event, self.stage.now))

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass without any event, and see what is due."""
        self.stage.now += seconds
        return self._note(self.stage.service.expire_session(self.session, self.stage.now))

    def connect(self) -> None:
        dial = next(action for action in self.actions if isinstance(action, Dial))
        self.tell(Dialled(dial.attempt))

    def relay(self, source: Side) -> Relay:
        return self.session.relay_from(source)

    def move(self, source: Side, n: int, after: float = 0.001) -> None:
        """`n` bytes from `source` all the way."""
        self.read(source, n, after)
        self.relay(source).sent(n, self.stage.now)

    def read(self, source: Side, n: int, after: float = 0.001) -> None:
        self.stage.now += after
        self.relay(source).received(n, self.stage.now)

    def end(self, source: Side, after: float = 0.001) -> list[Action]:
        """`source` sends FIN; nothing waits before it."""
        self.stage.now += after
        relay = self.relay(source)
        relay.ended(self.stage.now)
        return self.tell(Finished(relay), 0.0)

    def line(self) -> vocabulary.SessionClosed:
        """The session's log line; its legs are closed."""
        self.stage.service.retire(self.session, self.stage.now)
        line = self.stage.logged(vocabulary.SessionClosed)[-1]
        # what was logged satisfies its own types
        return msgspec.convert(msgspec.structs.asdict(line), vocabulary.SessionClosed)

    def ended(self) -> tuple[str, str, str, str, str | None]:
        line = self.line()
        return line.state, line.history, line.termination, line.closed_by, line.error

    def _mine(self, actions: Actions) -> list[Action]:
        assert all(session is self.session for session, _ in actions)
        return [action for _, action in actions]

    def _note(self, actions: Actions) -> list[Action]:
        self.actions = self._mine(actions)
        self.history += self.actions
        return self.actions
