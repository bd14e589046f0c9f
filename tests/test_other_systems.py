"""What a system that lacks something gets: one line, or the same service with less."""

import json
import signal
import socket
import subprocess
import sys

import pytest
from daemons import PATIENCE

RUN = "import sys; {lack}; from services.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("engine", ["blocking", "nonblocking", "twisted"])
def test_another_system_than_linux_is_told_so_in_one_line(engine: str) -> None:
    run = [sys.executable, "-c", RUN.format(lack="sys.platform = 'beos'")]
    done = subprocess.run(
        [*run, "echo", "--engine", engine, "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 71
    assert done.stderr == "triptych: the daemons need Linux, and this is beos\n"
    assert done.stdout == ""


@pytest.mark.parametrize("engine", ["blocking", "nonblocking", "twisted"])
def test_without_epoll_the_loops_poll_and_say_so(engine: str) -> None:
    run = [sys.executable, "-c", RUN.format(lack="import select; del select.epoll")]
    command = [*run, "echo", "--engine", engine, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        lines = []
        for text in daemon.stdout:
            lines.append(json.loads(text))
            if lines[-1]["event"] == "service_ready":
                break
        host, port = lines[-1]["addresses"][0].rsplit(":", 1)
        with socket.create_connection((host, int(port)), PATIENCE) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
        daemon.send_signal(signal.SIGTERM)
        lines += [json.loads(text) for text in daemon.stdout]
        assert daemon.wait(PATIENCE) == 0
    degraded = [(line["lacking"], line["instead"]) for line in lines if line["event"] == "engine_degraded"]
    assert degraded == ([] if engine == "blocking" else [("epoll", "poll")])
    assert [line["state"] for line in lines if line["event"] == "session_closed"] == ["SF"]
