"""Out of descriptors: no spin, no dead listener, open sessions go on, and accepting resumes."""

import socket

from conftest import StartDaemon
from daemons import PATIENCE

CLIENTS = 80
DESCRIPTORS = 50


def test_what_does_not_fit_waits_in_the_backlog_and_is_served_later(engine: str, daemon: StartDaemon) -> None:
    service = daemon(
        engine,
        [{"name": "echo", "address": "127.0.0.1:0", "service": "echo"}],
        prefix=["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"],
    )
    (address,) = service.addresses
    clients = [socket.create_connection((address.host, address.port), PATIENCE) for _ in range(CLIENTS)]
    try:
        for client in clients:
            client.sendall(b"hello")
        (paused, *_) = service.wait_for("listener_paused")
        assert paused["error"] == "EMFILE"
        # those that were accepted go on; as they leave, every other is served
        for client in clients:
            assert client.recv(5) == b"hello"
            client.close()
    finally:
        for client in clients:
            client.close()
    closed = service.wait_for("session_closed", CLIENTS)
    assert {line["termination"] for line in closed} == {"--"}
    stopped = service.stop()
    # a pause is a tenth of a second: what spins would fill a second of processor time
    assert stopped["cpu_us"] < 1_500_000
