"""Real programs through each engine's proxy: a Redis server with its own client and benchmark, nginx
with curl. What the client prints or saves must be what it prints or saves without a proxy, and the
log must say that every session ended as it should.
"""

import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from daemons import PATIENCE, Daemon

from services.core.addresses import Address

Transport = Literal["tcp", "unix"]
StartDaemon = Callable[..., Daemon]

TRANSPORTS = pytest.mark.parametrize("transport", ["tcp", "unix"])


class Server(NamedTuple):
    """A server's address of either transport, and its directory, short enough for UNIX sockets."""

    tcp: Address
    unix: Address
    directory: Path


@contextmanager
def served(name: str, command: Callable[[Server], Sequence[str]]) -> Iterator[Server]:
    """The server while it runs; ready when this yields."""
    directory = Path(tempfile.mkdtemp(prefix=f"triptych-{name}-"))
    server = Server(
        Address("tcp", "127.0.0.1", free_port()), Address("unix", f"{directory}/{name}.sock"), directory
    )
    output = directory / "output.txt"
    with output.open("wb") as said:
        process = subprocess.Popen(command(server), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(server):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.01)
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE)
        shutil.rmtree(directory)


def free_port() -> int:
    """A port below those that the kernel gives to clients, so that none of them is on it by the time
    the server binds it.
    """
    while True:
        port = random.randrange(20_000, 30_000)  # noqa: S311 -- any will do
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def answers(server: Server) -> bool:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        return not unix.connect_ex(server.unix.host) and not tcp.connect_ex(
            (server.tcp.host, server.tcp.port)
        )


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    def command(server: Server) -> Sequence[str]:
        listening = [
            "--bind",
            server.tcp.host,
            "--port",
            str(server.tcp.port),
            "--unixsocket",
            server.unix.host,
        ]
        return [
            "redis-server",
            *listening,
            "--dir",
            str(server.directory),
            "--save",
            "",
            "--appendonly",
            "no",
        ]

    with served("redis", command) as server:
        yield server


FILES = {
    "page.html": b"<!doctype html><title>hello</title>\n",
    "large.bin": random.Random(1).randbytes(8 << 20),  # noqa: S311 -- data, not a secret
}


@pytest.fixture(scope="module")
def nginx() -> Iterator[Server]:
    def command(server: Server) -> Sequence[str]:
        here = server.directory
        for name, content in FILES.items():
            (here / name).write_bytes(content)
        temporary = "".join(
            f"{each}_temp_path {here}/{each};\n"
            for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # one process, as whoever runs the tests, so that it may read its directory
        (here / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {here}/pid;\nevents {{}}\n"
            f"http {{\n{temporary}access_log off;\nserver {{ listen {server.tcp}; listen {server.unix}; root {here}; }}\n}}\n"
        )
        return ["nginx", "-p", str(here), "-c", str(here / "nginx.conf"), "-e", "stderr"]

    with served("nginx", command) as server:
        yield server


def proxy(daemon: StartDaemon, engine: str, upstream: Address) -> Daemon:
    """A daemon that proxies to `upstream` from a listener of the same transport."""
    address = "127.0.0.1:0" if upstream.transport == "tcp" else f"{upstream}.{engine}"
    listener = {"name": "front", "address": address, "service": "proxy", "pool": "peer"}
    return daemon(engine, [listener], {"peer": [upstream]})


def redis_options(address: Address) -> list[str]:
    return (
        ["-s", address.host] if address.transport == "unix" else ["-h", address.host, "-p", str(address.port)]
    )


def run(*command: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout


def every_session_ended_well(through: Daemon, count: int) -> None:
    """`count` sessions, and the totals of the last line are theirs (`Daemon.stop` adds them up)."""
    lines = through.wait_for("session_closed", count)
    assert len(lines) == count
    assert {(line["state"], line["termination"], line["error"]) for line in lines} == {("SF", "--", None)}
    last = through.stop()
    assert last["closed"] == count
    assert min(last["bytes_c2s"], last["bytes_s2c"]) > 0


def as_sent(*parts: bytes) -> bytes:
    """A command in Redis's protocol, binary-safe."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


EVERY_BYTE = bytes(range(256)) + b"\r\n+OK\r\n\0"
LARGE = random.Random(2).randbytes(5 << 20)  # noqa: S311 -- data, not a secret
PIPELINE = b"".join(
    [
        as_sent(b"FLUSHALL"),
        as_sent(b"SET", b"every byte", EVERY_BYTE),
        as_sent(b"SET", b"large", LARGE),
        as_sent(b"SET", b"empty", b""),
        *(as_sent(b"RPUSH", b"list", b"%d" % number, EVERY_BYTE) for number in range(2000)),
    ]
)
SCRIPT = b"""PING
SET greeting "hello \\x00 world"
GET greeting
GET "every byte"
STRLEN large
GET empty
GET nothing
INCR greeting
LRANGE list 0 -1
MULTI
INCRBY counter 41
INCR counter
EXEC
GET large
QUIT
"""


def redis_session(address: Address) -> list[bytes]:
    """What redis-cli prints of a pipelined load and a long session; two connections."""
    cli = ["redis-cli", *redis_options(address)]
    return [run(*cli, "--pipe", stdin=PIPELINE), run(*cli, "--raw", stdin=SCRIPT)]


@TRANSPORTS
def test_redis_cli_prints_the_same_through_the_proxy_as_without(
    engine: str, transport: Transport, redis: Server, daemon: StartDaemon
) -> None:
    upstream: Address = getattr(redis, transport)
    through = proxy(daemon, engine, upstream)
    directly = redis_session(upstream)
    assert LARGE in directly[1]
    assert b"errors: 0, replies: 2004" in directly[0]
    assert redis_session(through.addresses[0]) == directly
    every_session_ended_well(through, 2)


def heard(subscriber: Address, publisher: Address) -> list[bytes]:
    """What a subscriber prints of messages, some large, that arrive while it says nothing."""
    messages = [b"message %d %b" % (number, b"x" * (number * 1000)) for number in range(50)]
    cli = ["redis-cli", *redis_options(subscriber), "--raw", "SUBSCRIBE", "news"]
    with subprocess.Popen(cli, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            lines = [process.stdout.readline() for _ in ("subscribe", "news", "1")]
            stream = b"".join(as_sent(b"PUBLISH", b"news", message) for message in messages)
            run("redis-cli", *redis_options(publisher), "--pipe", stdin=stream)
            lines += [process.stdout.readline() for _ in messages for _ in ("message", "news", "the message")]
        finally:
            process.terminate()
    assert lines[-1] == messages[-1] + b"\n"
    return lines


@TRANSPORTS
def test_a_subscriber_hears_the_same_through_the_proxy_as_without(
    engine: str, transport: Transport, redis: Server, daemon: StartDaemon
) -> None:
    upstream: Address = getattr(redis, transport)
    through = proxy(daemon, engine, upstream)
    assert heard(through.addresses[0], through.addresses[0]) == heard(upstream, upstream)
    every_session_ended_well(through, 2)


@TRANSPORTS
def test_redis_benchmark_completes_through_the_proxy(
    engine: str, transport: Transport, redis: Server, daemon: StartDaemon
) -> None:
    through = proxy(daemon, engine, getattr(redis, transport))
    load = ["-n", "5000", "-c", "20", "-q", "-t", "ping,set,get", "--csv"]
    table = run("redis-benchmark", *redis_options(through.addresses[0]), *load).decode()
    measured = [line.split(",")[0].strip('"') for line in table.splitlines()]
    assert measured == ["test", "PING_INLINE", "PING_MBULK", "SET", "GET"]
    # each of the four with 20 connections, and one that asks for the server's configuration
    every_session_ended_well(through, 4 * 20 + 1)


@TRANSPORTS
def test_a_download_through_the_proxy_is_the_file(
    engine: str, transport: Transport, nginx: Server, daemon: StartDaemon, tmp_path: Path
) -> None:
    through = proxy(daemon, engine, getattr(nginx, transport))
    [address] = through.addresses
    to = ["--unix-socket", address.host] if transport == "unix" else ["--connect-to", f"::{address}"]
    wanted = [argument for name in FILES for argument in ("-o", str(tmp_path / name), f"http://peer/{name}")]
    run("curl", "--silent", "--show-error", "--fail", *to, *wanted)
    for name, content in FILES.items():
        assert sha256((tmp_path / name).read_bytes()).digest() == sha256(content).digest(), name
    # both over one connection, as curl does directly
    every_session_ended_well(through, 1)
    assert through.closed()[0]["bytes_s2c"] > sum(map(len, FILES.values()))
