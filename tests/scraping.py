"""Asking a daemon for its metrics, over TCP or a UNIX socket, and reading the answer."""

import socket
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from services.core.addresses import Address

PATIENCE = 10.0
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: triptych\r\n\r\n"
# a name and its labels
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def connect(where: Address) -> socket.socket:
    if where.transport == "unix":
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        try:
            client.connect(where.host)
        except OSError:
            client.close()
            raise
        return client
    return socket.create_connection((where.host, where.port), PATIENCE)


def ask(where: Address, request: bytes = SCRAPE) -> Response:
    with connect(where) as client:
        client.sendall(request)
        return answer(client)


def answer(client: socket.socket) -> Response:
    """All that comes until the end, which the server makes."""
    received = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = received.decode().partition("\r\n\r\n")
    status, *fields = head.split("\r\n")
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    return Response(int(status.split(" ")[1]), headers, body)


def series(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    """The sum of the series of that name that have these labels."""
    wanted = set(labels.items())
    values = [number for (each, held), number in found.items() if each == name and wanted <= held]
    assert values, f"no series {name} with {labels}"
    return sum(values)
