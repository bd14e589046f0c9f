"""The proxies that others use, started for a test: HAProxy, nginx and socat, as Debian ships them."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comparisons.scenarios.wire import Subject, bound, listen
from services.core.addresses import Address

LOOPBACK = Address("tcp", "127.0.0.1")
PATIENCE = 10.0


def _haproxy(directory: Path, port: int, upstream: int) -> list[str]:
    config = directory / "haproxy.cfg"
    config.write_text(
        f"""
global
    maxconn 1000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen proxy
    bind 127.0.0.1:{port}
    server upstream 127.0.0.1:{upstream}
"""
    )
    return ["haproxy", "-db", "-f", str(config)]


def _nginx(directory: Path, port: int, upstream: int, more: str = "") -> list[str]:
    config = directory / "nginx.conf"
    config.write_text(
        f"""
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
stream {{
    server {{
        listen 127.0.0.1:{port};
        {more}
        proxy_pass 127.0.0.1:{upstream};
    }}
}}
"""
    )
    return ["nginx", "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(config)]


def _nginx_half_close(directory: Path, port: int, upstream: int) -> list[str]:
    return _nginx(directory, port, upstream, "proxy_half_close on;")


def _socat(_directory: Path, port: int, upstream: int) -> list[str]:
    return ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", f"TCP:127.0.0.1:{upstream}"]


PEERS = {"haproxy": _haproxy, "nginx": _nginx, "nginx half-close": _nginx_half_close, "socat": _socat}


@contextmanager
def peer(name: str, directory: Path) -> Iterator[Subject]:
    """The proxy called `name` before an upstream of ours. A tool that is missing is a failure."""
    with listen(LOOPBACK) as upstream:
        with socket.socket() as chooser:
            chooser.bind(("127.0.0.1", 0))
            port = bound(chooser).port
        process = subprocess.Popen(PEERS[name](directory, port, bound(upstream).port))
        try:
            subject = Subject(Address("tcp", "127.0.0.1", port), (upstream,), process.pid)
            _wait_until_it_listens(subject, process)
            yield subject
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _wait_until_it_listens(subject: Subject, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with subject.session():
                return
        except ConnectionRefusedError:
            assert process.poll() is None, f"exit code {process.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.02)
