"""The listeners of a command that stands between clients and their server: bound as a daemon binds its
own, refused where they would lead back to themselves, and warned about where other hosts reach them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from socket import socket

from services.config import ListenerConfig
from services.core.addresses import Address
from services.endpoints import Listener, Route, close_listeners, exposure, open_listeners, refuse_loops


@contextmanager
def listening(
    address: Address,
    upstreams: Sequence[Address],
    say: Callable[[str], object],
    inherited: Mapping[str, Sequence[socket]] | None = None,
) -> Iterator[list[Listener]]:
    """Open until the end. EndpointError, also where one of `upstreams` (resolved) leads back.

    Args:
        say: told of each address that other hosts can reach.
        inherited: the service manager's sockets, by name.

    """
    wanted = ListenerConfig(name="front", address=address, service="proxy")
    listeners = open_listeners([wanted], inherited or {})
    try:
        own = [each for listener in listeners for each in listener.addresses]
        refuse_loops([Route("--listen", own, upstreams)])
        for each in own:
            risk = exposure("proxy", each)
            if risk is not None:
                say(f"{each} can be reached from other hosts: {risk}")
        yield listeners
    finally:
        close_listeners(listeners)
