"""Rule 16: a PROXY header is read in bounded time and size, split at any byte, and any fault in it is
refused with a line that names it; and what an upstream is told is what it was.
"""

import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon

from comparisons.scenarios.wire import bound, listen
from services.core.addresses import Address
from services.core.preface import PAIR, Preface, header

CLIENT = Address("tcp", "203.0.113.9", 999)
HERE = Address("tcp", "192.0.2.2", 443)
TLVS = struct.pack("!BH", 0xE4, 5) + b"extra"


def echo(daemon: StartDaemon, engine: str, **settings: object) -> Daemon:
    front = {"name": "front", "address": "127.0.0.1:0", "service": "echo", "proxy_protocol": True}
    return daemon(engine, [front], settings=settings)


def connect(service: Daemon) -> socket.socket:
    (address,) = service.addresses
    return socket.create_connection((address.host, address.port), PATIENCE)


def hear(client: socket.socket) -> bytes | None:
    """All that comes until the end; None where that is a reset."""
    heard = b""
    try:
        while data := client.recv(65_536):
            heard += data
    except ConnectionResetError:
        return None
    return heard


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("piece", [1, 1000])
def test_a_header_split_anywhere_says_who_the_client_is(
    engine: str, daemon: StartDaemon, version: str, piece: int
) -> None:
    service = echo(daemon, engine)
    data = header(version, CLIENT, HERE, TLVS) + b"hello"  # type: ignore[arg-type]
    with connect(service) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), piece):
            client.sendall(data[at : at + piece])
            time.sleep(0.0005)  # so that most pieces are read by themselves
        client.shutdown(socket.SHUT_WR)
        assert hear(client) == b"hello"
    (line,) = service.wait_for("session_closed")
    assert (line["client_ip"], line["client_port"]) == ("203.0.113.9", 999)
    assert (line["local_ip"], line["local_port"]) == ("192.0.2.2", 443)
    assert (line["via_ip"], line["bytes_c2s"], line["termination"]) == ("127.0.0.1", 5, "--")


def test_what_comes_behind_a_header_is_relayed_whole(engine: str, daemon: StartDaemon) -> None:
    service = echo(daemon, engine, **{"limits.buffer": "1B"})
    text = bytes(range(256)) * 20
    with connect(service) as client:
        client.sendall(header("v2", CLIENT, HERE) + text)
        client.shutdown(socket.SHUT_WR)
        assert hear(client) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", "it does not begin as a PROXY header does", id="none"),
        pytest.param(b"PROXY TCP4 1.2.3.4\r\n", "the line is not", id="cut"),
        pytest.param(b"PROXY UNKNOWN " + b"x" * 200, "no line end within 107 bytes", id="too long"),
        pytest.param(header("v2", CLIENT, HERE)[:-1] + b"", "it ended before it was whole", id="ended"),
        pytest.param(b"", "it ended before it was whole", id="nothing"),
    ],
)
def test_a_header_that_is_wrong_is_reset_and_named(
    engine: str, daemon: StartDaemon, data: bytes, reason: str
) -> None:
    service = echo(daemon, engine)
    with connect(service) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert hear(client) is None
    (told,) = service.wait_for("introduction_refused")
    assert reason in told["reason"]
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["state"], line["session"]) == ("PQ", "RSTR", told["session"])
    with connect(service) as client:  # nothing else is disturbed
        client.sendall(b"PROXY UNKNOWN\r\nhello")
        assert client.recv(5) == b"hello"


def test_a_header_that_trickles_is_reset_when_its_time_is_over(engine: str, daemon: StartDaemon) -> None:
    service = echo(daemon, engine, **{"timeouts.header": "400ms"})
    began = time.monotonic()
    with connect(service) as client:
        client.sendall(b"PROXY TC")
        assert hear(client) is None
    assert time.monotonic() - began >= 0.4
    (told,) = service.wait_for("introduction_refused")
    assert told["reason"] == "PROXY header: it was not whole within 0.4 s"
    assert service.wait_for("session_closed")[0]["termination"] == "cQ"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_upstream_is_told_of_the_client_before_its_first_byte(
    engine: str, daemon: StartDaemon, version: str
) -> None:
    pair = "0" * 26
    with listen(Address("tcp", "127.0.0.1")) as upstream:
        pool = [{"address": str(bound(upstream)), "proxy_protocol": version}]
        front = {"address": "127.0.0.1:0", "service": "proxy", "pool": "pool"}
        service = daemon(
            engine,
            [{"name": "plain", **front}, {"name": "behind", **front, "proxy_protocol": True}],
            settings={"pool.pool.upstreams": pool},
        )
        plain, behind = service.addresses
        expected = {
            plain: (None, b""),
            behind: (CLIENT, TLVS + struct.pack("!BH", PAIR, 26) + pair.encode() if version == "v2" else b""),
        }
        for address, (name, tlvs) in expected.items():
            with socket.create_connection((address.host, address.port), PATIENCE) as client:
                first = header("v2", CLIENT, HERE, TLVS, pair) if name else b""
                client.sendall(first + b"hello")
                client.shutdown(socket.SHUT_WR)
                server, _ = upstream.accept()
                server.settimeout(PATIENCE)
                with server:
                    told = Preface().feed(hear(server) or b"")
                    assert told is not None
                    assert told.client == name or name is None
                    if name is None:
                        assert told.client == Address("tcp", *client.getsockname())
                        assert told.local == address
                    assert (told.tlvs, told.rest) == (tlvs, b"hello")
    # in the order of their accept
    lines = sorted(service.wait_for("session_closed", 2), key=lambda line: str(line["session"]))
    assert [line["pair"] for line in lines] == [None, pair]
    assert [line["bytes_c2s"] for line in lines] == [5, 5]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_between_two_haproxies_the_last_one_knows_the_first_client(
    engine: str, daemon: StartDaemon, tmp_path: Path, version: str
) -> None:
    first, last = free_port(), free_port()
    behind = {
        "name": "front",
        "address": "127.0.0.1:0",
        "service": "proxy",
        "pool": "pool",
        "proxy_protocol": True,
    }
    pool = [{"address": f"127.0.0.1:{last}", "proxy_protocol": version}]
    service = daemon(engine, [behind], settings={"pool.pool.upstreams": pool})
    (address,) = service.addresses
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"""
defaults
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen first
    mode tcp
    bind 127.0.0.1:{first}
    server s {address.host}:{address.port} send-proxy{"-v2" if version == "v2" else ""}
frontend last
    mode http
    bind 127.0.0.1:{last} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src]:%[src_port] to port %[dst_port]"
""")
    said = tmp_path / "haproxy.txt"
    with said.open("wb") as output:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", first)):
                    name = f"127.0.0.1:{client.getsockname()[1]}"
                    client.settimeout(PATIENCE)
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    answer = (hear(client) or b"").decode()
                    break
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert answer.endswith(f"{name} to port {first}")
    (line,) = service.wait_for("session_closed")
    assert f"{line['client_ip']}:{line['client_port']}" == name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
