"""Faults on purpose do the same to the same conversation, whichever engine it is in."""

import random
import socket
import struct
import threading
import time
from collections.abc import Mapping

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon

from comparisons.scenarios.wire import bound, listen
from services.core.addresses import Address
from services.core.faults import Latency, hitting

TEXT = random.Random(7).randbytes(400_000)  # noqa: S311  the same in every run


def serve(
    daemon: StartDaemon, engine: str, *faults: Mapping[str, object], address: str = "127.0.0.1:0"
) -> Daemon:
    return daemon(engine, [{"name": "front", "address": address, "service": "echo", "faults": faults}])


def connect(service: Daemon) -> socket.socket:
    (address,) = service.addresses
    return socket.create_connection((address.host, address.port), PATIENCE)


def converse(service: Daemon, text: bytes, *, end: bool = True) -> tuple[bytes, str, float]:
    """What comes back for `text`, how it ends, and after how many seconds."""
    client = connect(service)
    began = time.monotonic()

    def send() -> None:
        try:
            client.sendall(text)
            if end:
                client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # cut while sending: what is read says so

    with client:
        sender = threading.Thread(target=send)
        sender.start()
        got = b""
        try:
            while data := client.recv(65_536):
                got += data
            ending = "FIN"
        except ConnectionResetError:
            ending = "RST"
        finally:
            sender.join()
    return got, ending, time.monotonic() - began


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        ({"type": "latency", "delay": "120ms"}, 0.12),
        ({"type": "latency", "delay": "60ms", "jitter": "50ms", "seed": 3}, 0.02),
        ({"type": "bandwidth", "rate": "1MiB"}, len(TEXT) / 2**20),
        ({"type": "slicer", "size": "9KiB", "variation": "4KiB", "delay": "4ms"}, 0.1),
        ({"type": "slow_close", "delay": "250ms"}, 0.25),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_fault_that_delays_loses_nothing(
    engine: str, daemon: StartDaemon, fault: dict[str, object], least: float
) -> None:
    service = serve(daemon, engine, fault)
    got, ending, took = converse(service, TEXT)
    assert got == TEXT
    assert ending == "FIN"
    assert took >= least
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["faults"]) == ("--", f"{fault['type']}_downstream")
    assert line["peak_buffer"] <= 128 * 1024


def test_a_limit_passes_its_bytes_and_closes(engine: str, daemon: StartDaemon) -> None:
    service = serve(daemon, engine, {"type": "limit", "bytes": "3000B"})
    got, _, _ = converse(service, TEXT[:4000], end=False)
    assert got == TEXT[:3000]
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["closed_by"], line["bytes_s2c"]) == ("KD", "service", 3000)


def test_a_black_hole_swallows_everything_and_closes_in_time(engine: str, daemon: StartDaemon) -> None:
    service = serve(daemon, engine, {"type": "blackhole", "after": "200ms"})
    got, ending, took = converse(service, TEXT[:1000])
    assert (got, ending) == (b"", "FIN")
    assert took >= 0.2
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["bytes_c2s"], line["bytes_s2c"]) == ("KL", 1000, 0)


def test_a_reset_comes_when_it_was_ordered(engine: str, daemon: StartDaemon) -> None:
    service = serve(daemon, engine, {"type": "reset", "after": "150ms"})
    got, ending, took = converse(service, TEXT[:1000], end=False)
    assert (got, ending) == (TEXT[:1000], "RST")
    assert took >= 0.15
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["state"], line["history"]) == ("KD", "RSTR", "ShDdr")


def test_the_directions_of_a_proxy_suffer_on_their_own(engine: str, daemon: StartDaemon) -> None:
    with listen(Address("tcp", "127.0.0.1")) as upstream:
        service = daemon(
            engine,
            [
                {
                    "name": "front",
                    "address": "127.0.0.1:0",
                    "service": "proxy",
                    "pool": "pool",
                    "faults": [{"type": "latency", "delay": "150ms", "direction": "upstream"}],
                }
            ],
            {"pool": [bound(upstream)]},
        )
        with connect(service) as client:
            server, _ = upstream.accept()
            with server:
                server.settimeout(PATIENCE)
                began = time.monotonic()
                client.sendall(b"question")
                server.sendall(b"greeting")
                assert client.recv(100) == b"greeting"
                assert time.monotonic() - began < 0.15, "the other direction is not slowed"
                assert server.recv(100) == b"question"
                assert time.monotonic() - began >= 0.15
                # a reset does not wait for the bytes that are on their way
                client.sendall(b"more")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                with pytest.raises(ConnectionResetError):
                    server.recv(100)
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["faults"]) == ("CD", "latency_upstream")


def test_the_same_sessions_are_hit_whichever_engine_serves_them(engine: str, daemon: StartDaemon) -> None:
    service = serve(daemon, engine, {"type": "latency", "delay": "1ms", "probability": 0.5, "seed": 11})
    for _ in range(24):
        converse(service, b"x")
    # in the order of their accept; that of their ends is up to the engine
    lines = sorted(service.wait_for("session_closed", 24), key=lambda line: str(line["session"]))
    hit = [line["faults"] is not None for line in lines]
    drawn = Latency(delay=0.001, probability=0.5, seed=11)
    assert hit == [bool(hitting([drawn], number)) for number in range(1, 25)]
    assert 0 < sum(hit) < 24


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"type": "loss", "probability": 0.3, "seed": 1}, {1, 3, 6, 8, 9, 10, 13, 14, 15, 16, 17, 18, 19}),
        ({"type": "duplicate", "probability": 1.0}, set(range(20))),
        ({"type": "reorder", "probability": 0.3, "seed": 1, "delay": "100ms"}, set(range(20))),
        ({"type": "latency", "delay": "60ms", "jitter": "20ms"}, set(range(20))),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_the_same_datagrams_are_hit_whichever_engine_answers(
    engine: str, daemon: StartDaemon, fault: dict[str, object], expected: set[int]
) -> None:
    service = serve(daemon, engine, fault, address="udp:127.0.0.1:0")
    (address,) = service.addresses
    copies = 2 if fault["type"] == "duplicate" else 1
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.connect((address.host, address.port))
        for number in range(20):
            client.send(bytes([number]))
        got = [client.recv(10)[0] for _ in range(copies * len(expected))]
    assert set(got) == expected
    if fault["type"] == "reorder":
        # those that were held back came after all others
        assert got[:2] == [2, 3]
        assert got[-1] == 15
