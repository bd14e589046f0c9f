"""The peers with an adapter: HAProxy, nginx, socat and Twisted's portforward, and our three engines.

An adapter writes the configuration that a careful user would write, and sets a timeout or a buffer only
where a rule asks for one: what is measured otherwise is the peer as it comes.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

from comparisons.peers.peer import Peer, Task
from services.config import ENGINES

# Debian builds nginx's stream part as a module; elsewhere it is built in
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

HAPROXY = """\
global
    maxconn 1000
    {drain}
defaults
    mode tcp
    option redispatch 1
    timeout connect {connect}ms
    timeout client {idle}ms
    timeout server {idle}ms
    {half_close}
listen proxy
    bind {address} {bind}
    {servers}
"""

NGINX = """\
{module}
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
{drain}
events {{}}
stream {{
    upstream servers {{
        {servers}
    }}
    server {{
        listen {address} {listen};
        {more}
        proxy_pass servers;
    }}
}}
"""


def _haproxy(task: Task) -> list[str]:
    dead_peer = task.milliseconds("timeouts.dead_peer", 0)
    # HAProxy's keepalive knows whole seconds
    keepalive = [
        f"{side}tcpka-{what} {value}"
        for side in ("cli", "srv")
        for what, value in (("idle", "1s"), ("intvl", "1s"), ("cnt", "1"))
    ]
    half_close = task.milliseconds("timeouts.half_close", 0)
    more = [f"timeout {side}-fin {half_close}ms" for side in ("client", "server")] if half_close else []
    more += ["option clitcpka", "option srvtcpka", *keepalive] if dead_peer else []
    user_timeout = f"tcp-ut {dead_peer}ms" if dead_peer else ""
    drain = task.milliseconds("timeouts.drain", 0)
    servers = [f"server s{n} {address} {user_timeout}" for n, address in enumerate(task.upstreams)]
    config = task.directory / "haproxy.cfg"
    config.write_text(
        HAPROXY.format(
            drain=f"hard-stop-after {drain}ms" if drain else "",
            connect=task.milliseconds("timeouts.connect", 5_000),
            idle=task.milliseconds("timeouts.idle", 60_000),
            half_close="\n    ".join(more),
            address=task.address,
            bind=user_timeout,
            servers="\n    ".join(servers),
        ),
        encoding="utf-8",
    )
    return ["haproxy", "-db", "-f", str(config)]


def _nginx(task: Task, *more: str) -> list[str]:
    directives = [
        f"{directive} {task.milliseconds(setting, 0)}ms;"
        for setting, directive in (
            ("timeouts.idle", "proxy_timeout"),
            ("timeouts.connect", "proxy_connect_timeout"),
        )
        if setting in task.settings
    ]
    if "limits.buffer" in task.settings:
        directives.append(f"proxy_buffer_size {task.bytes('limits.buffer', 0)};")
    dead_peer = task.milliseconds("timeouts.dead_peer", 0) == DEAD_PEER
    if dead_peer:
        directives.append("proxy_socket_keepalive on;")
    drain = task.milliseconds("timeouts.drain", 0)
    config = task.directory / "nginx.conf"
    config.write_text(
        NGINX.format(
            module=f"load_module {NGINX_STREAM};" if NGINX_STREAM.exists() else "",
            directory=task.directory,
            drain=f"worker_shutdown_timeout {drain}ms;" if drain else "",
            servers="\n        ".join(f"server {address};" for address in task.upstreams),
            address=task.address,
            listen="so_keepalive=1s:1s:1" if dead_peer else "",
            more="\n        ".join([*directives, *more]),
        ),
        encoding="utf-8",
    )
    return ["nginx", "-p", str(task.directory), "-e", str(task.directory / "error.log"), "-c", str(config)]


def _socat(task: Task) -> list[str]:
    command = ["socat"]
    for setting, flag in (("timeouts.idle", "-T"), ("timeouts.half_close", "-t")):
        if setting in task.settings:
            command += [flag, f"{task.milliseconds(setting, 0) / 1000:g}"]
    if "limits.buffer" in task.settings:
        command += ["-b", str(task.bytes("limits.buffer", 0))]
    dead_peer = task.milliseconds("timeouts.dead_peer", 0) == DEAD_PEER
    keepalive = ",keepalive,keepidle=1,keepintvl=1,keepcnt=1" if dead_peer else ""
    connect = task.milliseconds("timeouts.connect", 0)
    listen = f"TCP-LISTEN:{task.address.port},bind={task.address.host},reuseaddr,fork,backlog=512{keepalive}"
    dial = f"TCP:{task.upstreams[0]}{keepalive}" + (f",connect-timeout={connect / 1000:g}" if connect else "")
    return [*command, listen, dial]


def _portforward(task: Task) -> list[str]:
    upstream = task.upstreams[0]
    words = (task.address.port, upstream.host, upstream.port)
    return [sys.executable, "-m", "comparisons.peers.portforward", *map(str, words)]


def engine(name: str) -> Callable[[Task], list[str]]:
    """How `triptych serve` is started with this engine."""

    def command(task: Task) -> list[str]:
        settings: Mapping[str, str] = {
            "engine": name,
            # every session that is opened: which lines are yet to come is known
            "log.level": "debug",
            "limits.buffer": "64KiB",
            # the line comes that late, and a script that is slow or waits is not cut in two
            "timeouts.udp_idle": "1s",
            **task.settings,
        }
        listener = {"name": "conform", "address": str(task.address), "service": task.service}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        if task.service == "proxy":
            listener["pool"] = "upstreams"
            upstreams = ", ".join(f"{{ address = {json.dumps(str(each))} }}" for each in task.upstreams)
            lines.append(f"pool.upstreams.upstreams = [{upstreams}]")
        lines += ["[[listener]]", *(f"{key} = {json.dumps(value)}" for key, value in listener.items())]
        config = task.directory / "triptych.toml"
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        log = str(task.directory / LOG)
        return [sys.executable, "-m", "services.cli", "serve", "--config", str(config), "--log", log]

    return command


def _said(*command: str) -> str:
    """The version in what a program says of itself."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else ""


# the setting with which rule 7 is played; other rules only keep it out of their way
DEAD_PEER = 2_000
LOG = "log.jsonl"
TIMEOUTS = (
    "timeouts.connect",
    "timeouts.half_close",
    "timeouts.idle",
    "timeouts.dead_peer",
    "timeouts.drain",
)

_NGINX = Peer(
    "nginx",
    _nginx,
    programs=("nginx",),
    version=partial(_said, "nginx", "-v"),
    settings=("timeouts.connect", "timeouts.idle", "timeouts.dead_peer", "timeouts.drain", "limits.buffer"),
    upstreams=2,
    drain=signal.SIGQUIT,
)

KNOWN: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        *(
            Peer(
                name,
                engine(name),
                version=partial(metadata.version, "triptych"),
                services=("echo", "proxy"),
                transports=("tcp4", "udp4"),
                settings=(*TIMEOUTS, "limits.buffer"),
                upstreams=2,
                log=LOG,
            )
            for name in ENGINES
        ),
        Peer(
            "haproxy",
            _haproxy,
            programs=("haproxy",),
            version=partial(_said, "haproxy", "-v"),
            settings=TIMEOUTS,
            upstreams=2,
            drain=signal.SIGUSR1,
        ),
        _NGINX,
        replace(
            _NGINX,
            name="nginx-tuned",
            command=lambda task: _nginx(task, "proxy_half_close on;"),
        ),
        Peer(
            "socat",
            _socat,
            programs=("socat",),
            version=partial(_said, "socat", "-V"),
            settings=(
                "timeouts.connect",
                "timeouts.half_close",
                "timeouts.idle",
                "timeouts.dead_peer",
                "limits.buffer",
            ),
        ),
        Peer("portforward", _portforward, version=partial(metadata.version, "twisted")),
    )
}
