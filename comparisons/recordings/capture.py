"""How the shipped recordings were made, and can be made again:

    apt-get install redis-server redis-tools nginx curl
    python -m comparisons.recordings.capture DIRECTORY

Real servers run on free loopback ports in a temporary folder, real clients talk to them through the
recorder, and DIRECTORY gets `redis.recording` and `http.recording`. Nothing is asked of a server that
would answer with a path or a host name of this machine. What is said is the same each time up to
dates and random keys; the timing is that of the machine.
"""

import io
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comparisons.recordings.format import SUFFIX, VERSION, Header, decode
from comparisons.recordings.keeper import Keeper
from comparisons.recordings.recorder import Recorder
from services.core.addresses import Address

PATIENCE = 10.0  # seconds for a server to start, and for a client to finish

PROMPT = (
    "PING",
    "SET greeting hello",
    "APPEND greeting ', world'",
    "GET greeting",
    "GET nothing",
    "HSET user:1 name Ada born 1815",
    "HGETALL user:1",
    "HINCRBY user:1 visits 1",
    "EXPIRE user:1 100",
    "TTL user:1",
    "RPUSH queue a b c d",
    "LRANGE queue 0 -1",
    "LPOP queue 2",
    "NOTACOMMAND",
    "HGET queue x",
    "ZADD scores 3 c 1 a 2 b",
    "ZRANGE scores 0 -1 WITHSCORES",
    "SADD colours red green",
    "SMEMBERS colours",
    "MULTI",
    "INCR count",
    "INCR count",
    "EXEC",
    "MULTI",
    "SET count x",
    "DISCARD",
    "EVAL \"return {KEYS[1], ARGV[1], redis.call('GET', 'greeting')}\" 1 key value",
    "SCAN 0 COUNT 5",
    "DBSIZE",
)


def redis(folder: Path) -> bytes:
    """redis-cli as people use it, and redis-benchmark with few connections, plain and pipelined."""
    port = _free_port()
    server = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    header = Header(
        VERSION,
        "redis-cli sessions and redis-benchmark runs",
        _version("redis-cli"),
        " ".join(_version("redis-server").split()[:3]),
    )
    with (
        _running([*server, "--save", "", "--appendonly", "no"], port),
        _recording(port, header) as (file, front),
    ):
        cli = ["redis-cli", "-h", "127.0.0.1", "-p", str(front)]

        # a session at the prompt begins with the documentation of every command: 170 KB, so it is asked once
        _run(cli, "\n".join(PROMPT).encode())
        _run([*cli, "-3", "HGETALL", "user:1"])
        _run([*cli, "-r", "12", "-i", "0.02", "INCR", "ticks"])
        # big values, both ways; and one that no chunk holds
        _run([*cli, "-x", "SET", "essay"], prose(40_000, seed=1))
        _run([*cli, "GET", "essay"])
        _run([*cli, "SETBIT", "sparse", "4000000", "1"])
        _run([*cli, "GETRANGE", "sparse", "0", "300000"])
        mass = b"".join(
            b"*3\r\n$3\r\nSET\r\n$8\r\nmass:%03d\r\n$%d\r\n%s\r\n" % (number, len(value), value)
            for number, value in enumerate(prose(size, seed=size) for size in range(20, 220))
        )
        _run([*cli, "--pipe"], mass)
        # the server speaks on its own: a subscriber, and one that waits for a queue
        listening = subprocess.Popen([*cli, "SUBSCRIBE", "news", "weather"], stdout=subprocess.DEVNULL)
        waiting = subprocess.Popen([*cli, "BLPOP", "jobs", "5"], stdout=subprocess.DEVNULL)
        time.sleep(0.2)
        for number in range(8):
            _run([*cli, "PUBLISH", "news" if number % 2 else "weather", f"bulletin {number}"])
        _run([*cli, "LPUSH", "jobs", "first"])
        waiting.wait(PATIENCE)
        listening.terminate()
        listening.wait(PATIENCE)
        benchmark = ["redis-benchmark", "-q", "-h", "127.0.0.1", "-p", str(front), "-r", "1000"]
        _run([*benchmark, "-c", "8", "-n", "400", "-t", "ping,set,get,incr,lpush,lrange_100"])
        _run([*benchmark, "-c", "4", "-n", "2000", "-P", "16", "-t", "set,get"])
        _run([*benchmark, "-c", "2", "-n", "40", "-d", "4096", "-t", "set,get"])
        time.sleep(0.2)
    return file.getvalue()


def http(folder: Path) -> bytes:
    """Curl with kept-alive connections against static files of nginx."""
    port = _free_port()
    site = folder / "site"
    site.mkdir()
    (site / "index.html").write_text(
        f"<!doctype html><title>Home</title><p>{prose(1500, seed=3).decode()}</p>\n"
    )
    (site / "style.css").write_text("body { margin: 2rem auto; max-width: 40rem }\n")
    (site / "book.txt").write_bytes(prose(200 << 10, seed=4))
    settings = folder / "nginx.conf"
    settings.write_text(
        f"daemon off; pid {folder}/pid; error_log stderr error; events {{ }}\n"
        f"http {{ access_log off; types {{ text/html html; text/css css; text/plain txt; }}\n"
        f"  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n"
        f"  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n"
        f"  server {{ listen 127.0.0.1:{port}; root {site}; location /form {{ return 204; }} }} }}\n"
    )
    server = ["nginx", "-c", str(settings), "-e", "stderr", "-g", "master_process off;"]
    client = " ".join(_version("curl").split()[:2])
    header = Header(VERSION, "kept-alive requests for static files", client, _version("nginx"))
    with _running(server, port), _recording(port, header) as (file, front):
        home = f"http://127.0.0.1:{front}/"
        # curl keeps the connection for every address of one command line, and for what follows --next
        curl = ["curl", "--silent", "--show-error", "--output", "/dev/null"]
        quiet = ["--next", *curl[1:]]
        _run([*curl, home, *quiet, f"{home}style.css", *quiet, f"{home}missing", *quiet, f"{home}book.txt"])
        _run([*curl, "--head", f"{home}book.txt", *quiet, "--range", "1000-1999", f"{home}book.txt"])
        _run([*curl, "--data-binary", "@-", f"{home}form", *quiet, home], prose(20_000, seed=5))
        _run([*curl, "--header", "If-Modified-Since: Fri, 31 Dec 2100 00:00:00 GMT", home])
        _run([*curl, "--http1.0", home])
        _run([*curl, "--parallel", f"{home}?part=[1-3]", f"{home}style.css"])
        time.sleep(0.2)
    return file.getvalue()


def prose(size: int, seed: int) -> bytes:
    """Text of `size` bytes, the same for a seed each time, that packs about as well as prose does."""
    chance = random.Random(seed)  # noqa: S311  filler, not a secret
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(800)]
    text = ""
    while len(text) < size:
        text += chance.choice(words) + chance.choice("      .,\n")
    return text[:size].encode()


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """A server, from the moment it accepts connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def _recording(upstream: int, header: Header) -> Iterator[tuple[io.BytesIO, int]]:
    """A recorder in front of a port: what it writes, whole once the block has ended, and where it listens."""
    file = io.BytesIO()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, Keeper(file, header) as keeper:
        listener.setblocking(False)
        recorder = Recorder([listener], [Address("tcp", "127.0.0.1", upstream)], keeper)
        thread = threading.Thread(target=recorder.serve)
        thread.start()
        try:
            yield file, listener.getsockname()[1]
        finally:
            recorder.stop()
            thread.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _run(command: list[str], given: bytes = b"") -> None:
    subprocess.run(command, input=given, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)


def _version(program: str) -> str:
    """The first line of what a program says of its version; nginx says it on the error stream."""
    asked = subprocess.run(
        [program, "-v" if program == "nginx" else "--version"], capture_output=True, text=True, check=True
    )
    return (asked.stdout or asked.stderr).splitlines()[0].strip()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m comparisons.recordings.capture DIRECTORY")
    captures: dict[str, Callable[[Path], bytes]] = {"redis": redis, "http": http}
    for name, capture in captures.items():
        with tempfile.TemporaryDirectory() as folder:
            data = capture(Path(folder))
        (Path(sys.argv[1]) / f"{name}{SUFFIX}").write_bytes(data)
        print(f"{name}: {len(decode(data).conversations)} conversations, {len(data)} bytes")  # noqa: T201  the answer


if __name__ == "__main__":
    main()
