"""The contract between the core and an engine; this docstring is the specification.

An engine owns sockets and time; `services/core` owns decisions. It is given bound sockets, a service
and a monotonic clock, and runs until the service is drained::

    Engine(listeners, service, clock).run()

*Events and actions.* Whatever happens to a session's sockets becomes one event of
`core/session.py`, handed to `Session.handle(event, now)`; the actions that come back are performed in
their order, before the next event of that session. `Probe` is answered at once, `Dial` later.

*Bytes.* From `BeginRelay` on the engine moves bytes for each relay by itself, as long as the relay
`wants_read` and `wants_write`, and reports `received(n)`, `sent(n)`, `blocked()`, `pause()` and
`ended()` to the relay, not to the session. When a relay is `finished`, the engine says `Finished`,
once; the FIN follows from the session's answer, never before. A relay may carry a line (faults on
purpose): what was received is handed to it (`carry`), and what is written is what comes out of it
(`deliver`), piece by piece, no earlier than `due()`. `Deliver` asks to look again.

*The preface.* After `ReadPreface` what the client sends goes to the session as `Received`, as long as it
`reads_preface`; then the leg is left alone until `BeginRelay`, which brings back what came behind it.

*Loss.* A socket call that fails for good is `Lost(leg, loss_of(error))`. The engine keeps the leg
open until it is told to `Abort` or `Close` it: what the other direction still holds may count.

*Closing.* `Abort` resets (linger 0), `Close` is in order. When the last leg is closed, the engine
calls `Service.retire` with the TCP_INFO it took before.

*Time.* `session.deadline()` is asked for after every event and whenever a send would block; at that
time `Service.expire_session` is called. `Service.deadline` and `expire` are the same for the service.

*Other threads* and signal handlers may call the public methods, and nothing else. `post(fn)` runs
`fn` where the service's state may be touched, and performs the actions that it returns; `check(fn)` runs it once everything that accepts or
keeps time has come round since: a hung engine never does.

*Listeners* come and go: `listen(listening)`, `unlisten(listening)`. Of one that goes, what already
waits in its backlog is accepted; an inherited one is closed but never shut down: others may hold it.

*Stopping.* `stop(reason)` lets every listener go, and `run` returns when the last session has been
retired. A second SIGINT cuts what is open (`Service.drain`).

*Faults.* An exception that is not an OSError is a bug of ours: it is logged with its traceback and
costs the session it happened in (`Cut("I")`).

All engines have the same private vocabulary, in this order, so that they can be read side by side:
`run, stop, post, _accept, _dial, _perform, _read_preface, _pump, _deliver, _half_close, _expire, _close,
_drain`, and for UDP `_answer, _send_on, _return, _release, _reply`: a datagram is answered, or passed on,
in `_answer`; what an upstream sends back comes to `_return`. Both ask the core when to send
(`Datagrams.forwards`, `replies`), and `_release` closes a session's socket when told to.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from services.core.addresses import Address
from services.core.service import Policy, Service
from services.core.session import Actions

# Read at most this much at once: as much as a relay holds by default, and what Twisted reads.
CHUNK = 65_536
# A PROXY header is seldom longer, and what came behind it in the same read must be kept.
PREFACE_CHUNK = 256
# A burst of new clients must not starve the open sessions (rule 15; HAProxy's tune.maxaccept is 4).
MOST_ACCEPTS = 16
# Nor may a burst of datagrams.
MOST_DATAGRAMS = 64
# A UDP payload has at most 65,507 bytes over IPv4, 65,527 over IPv6 (RFC 768, RFC 8200): nothing is cut.
DATAGRAM = 65_536

ENGINES = {
    "blocking": "services.engines.blocking",
    "nonblocking": "services.engines.nonblocking",
    "twisted": "services.engines.twisted",
}


@dataclass(frozen=True, slots=True)
class Listening:
    """One bound socket, non-blocking, with the options of `sockets.set_options`, and listening unless
    it is UDP.
    """

    policy: Policy
    socket: socket.socket
    address: Address


class Engine(Protocol):
    """What `services/daemon.py` uses of an engine."""

    def __init__(
        self, listeners: Sequence[Listening], service: Service, clock: Callable[[], float]
    ) -> None: ...

    def run(self) -> None:
        """Serve until drained."""

    def stop(self, reason: str) -> None:
        """Drain, then let `run` return."""

    def listen(self, listening: Listening) -> None:
        """Accept its clients from now on."""

    def unlisten(self, listening: Listening) -> None:
        """Accept what waits, then close it."""

    def check(self, done: Callable[[], None]) -> None:
        """Call `done` once every thread that accepts or keeps time has come round."""

    def post(self, function: Callable[[], Actions | None]) -> None:
        """Run `function` where the service's state may be touched, and do what it says."""


def load(name: str) -> type[Engine]:
    """The engine called `name`, imported only now: sockets are bound before any engine is loaded."""
    engine: type[Engine] = import_module(ENGINES[name]).Engine
    return engine
