"""UDP echo: boundaries (rule 20) and the ports that get no answer (rule 19)."""

import errno
import select
import socket
from contextlib import ExitStack

from comparisons.scenarios.wire import Observation, Subject, family, payload, target

SIZES = (1, 0, 2, 512, 1_472, 9_000, 0, 65_507, 64)  # 65,507: the most that UDP over IPv4 carries
WORD = payload(32, seed=51)


def datagrams_come_back_whole(subject: Subject) -> Observation:
    """Datagrams of many sizes, empty ones and the largest too, each alone."""
    with _client(subject) as client:
        whole = sum(_asked(subject, client, payload(size, seed=size)) for size in SIZES)
        return Observation(figures={"whole": whole})


def datagrams_keep_their_boundaries(subject: Subject, *, count: int = 20) -> Observation:
    """Several datagrams sent at once come back as so many, in their order."""
    sent = [payload(size, seed=size) for size in range(count)]
    with _client(subject) as client:
        for data in sent:
            client.send(data)
        return Observation(
            figures={"in_place": sum(_next(client, subject.patience()) == data for data in sent)}
        )


def many_datagram_clients(subject: Subject, *, clients: int = 100) -> Observation:
    """Each of many clients hears its own datagram and no other."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(_client(subject)) for _ in range(clients)]
        for index, client in enumerate(sockets):
            client.send(payload(40, seed=index))
        own = sum(
            _next(client, subject.patience()) == payload(40, seed=index)
            for index, client in enumerate(sockets)
        )
        return Observation(figures={"own": own})


def low_ports_get_no_answer(subject: Subject, *, silence: float = 0.3) -> Observation:
    """A datagram from a port below 1024 could come from another echo service, and two of them
    would answer each other for ever. Other clients are answered before and after it.
    """
    with _client(subject) as client, _client(subject, low=True) as low:
        answered = int(_asked(subject, client, WORD))
        low.send(WORD)
        low_answers = int(_next(low, silence) is not None)
        answered += _asked(subject, client, WORD)
        return Observation(figures={"answered": answered, "low_port_answers": low_answers})


def _client(subject: Subject, *, low: bool = False) -> socket.socket:
    client = socket.socket(family(subject.address), socket.SOCK_DGRAM)
    client.setblocking(False)
    for port in range(1023, 511, -1) if low else ():
        try:
            client.bind((subject.address.host, port))
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # if it is, any other one of them does
                raise
    client.connect(target(subject.address))
    return client


def _asked(subject: Subject, client: socket.socket, data: bytes) -> bool:
    client.send(data)
    return _next(client, subject.patience()) == data


def _next(client: socket.socket, within: float) -> bytes | None:
    """The next datagram, or None."""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    return client.recv(1 << 17) if poll.poll(within * 1000) else None
