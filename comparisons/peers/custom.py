"""A peer of the user's own: a command to start, or an address that is already up.

In the command's words, and in the configuration file that it may come with, the placeholders below are
replaced literally; braces around anything else stay as they are. A rule that is about a timeout is played
only where that timeout's placeholder stands somewhere: each rule wants another value of it.
"""

import shlex
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from comparisons.peers.peer import Peer, Service, Task
from comparisons.scenarios.rules import Transport
from services.core.addresses import Address

# what a rule calls it, what the user calls it, and what it is where no rule cares
TIMEOUTS = {
    "timeouts.connect": ("{connect_ms}", 5_000),
    "timeouts.idle": ("{idle_ms}", 3_600_000),
    "timeouts.half_close": ("{half_close_ms}", 60_000),
    "timeouts.dead_peer": ("{dead_peer_ms}", 3_600_000),
    "timeouts.drain": ("{drain_ms}", 30_000),
}
BUFFER, BUFFER_SIZE = "{buffer}", 65_536
LISTENS = ("{listen}", "{port}")
DIALS = ("{upstream}", "{upstream_port}")
SECOND = ("{upstream2}", "{upstream2_port}")


def by_command(command: str, config: Path | None, *, echo: bool) -> Peer:
    """A peer that `command` starts. ValueError with one line if that cannot be."""
    words = shlex.split(command)
    if not words:
        raise ValueError("the command is empty")
    text = config.read_text(encoding="utf-8") if config else ""
    if (config is None) == ("{config}" in command):
        raise ValueError("--config and {config} in the command belong together: give both or neither")
    whole = f"{command} {text}"
    for placeholders, what in ((LISTENS, "listens"), (DIALS, "dials")):
        if not any(each in whole for each in placeholders) and not (echo and placeholders is DIALS):
            raise ValueError(
                f"nothing says where it {what}: put {placeholders[0]} into the command or its file"
            )

    def start(task: Task) -> Sequence[str]:
        values = _values(task)
        if config:
            own = task.directory / config.name
            own.write_text(_filled(text, values), encoding="utf-8")
            values["{config}"] = str(own)
        return [_filled(word, values) for word in words]

    named = {setting: placeholder for setting, (placeholder, _) in TIMEOUTS.items()}
    named["limits.buffer"] = BUFFER
    return Peer(
        Path(words[0]).name,
        start,
        programs=(words[0],),
        services=("echo",) if echo else ("proxy",),
        settings=tuple(setting for setting, placeholder in named.items() if placeholder in whole),
        upstreams=2 if any(each in whole for each in SECOND) else 1,
        lacks="the command has no {} to be told it",
        names={**named, "a second upstream": SECOND[0]},
    )


def by_address(address: str, upstreams: Sequence[str], *, echo: bool) -> Peer:
    """A peer that is up. ValueError with one line if it cannot be tested so."""
    listens = _loopback(address)
    dials = [_loopback(text) for text in upstreams]
    if bool(dials) == echo:
        raise ValueError("an echo service has no --upstream-listen, and a proxy needs one")
    if len(dials) > 2:
        raise ValueError("--upstream-listen: no rule needs more than two")
    if dials and listens.transport == "udp":
        raise ValueError(f"{address}: no rule is about a proxy for UDP; give --echo for an echo service")
    if any(_transport(each) != _transport(listens) for each in dials):
        raise ValueError("--address and --upstream-listen must be of one kind: IPv4, IPv6 or UNIX sockets")
    services: tuple[Service, ...] = ("echo",) if echo else ("proxy",)
    return Peer(
        address,
        None,
        services=services,
        transports=(_transport(listens),),
        upstreams=max(1, len(dials)),
        address=listens,
        upstream_addresses=dials,
        lacks="an address that is up is not known to have {}",
    )


def _values(task: Task) -> dict[str, str]:
    first, *others = task.upstreams or (Address("tcp", "127.0.0.1"),)
    # with one upstream, both names are the same
    second = others[0] if others else first
    values = {
        "{listen}": str(task.address),
        "{host}": task.address.host,
        "{port}": str(task.address.port),
        "{upstream}": str(first),
        "{upstream_host}": first.host,
        "{upstream_port}": str(first.port),
        "{upstream2}": str(second),
        "{upstream2_host}": second.host,
        "{upstream2_port}": str(second.port),
        "{directory}": str(task.directory),
        BUFFER: str(task.bytes("limits.buffer", BUFFER_SIZE)),
    }
    return values | {
        placeholder: str(task.milliseconds(setting, default))
        for setting, (placeholder, default) in TIMEOUTS.items()
    }


def _filled(text: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def _loopback(text: str) -> Address:
    address = Address.parse(text)
    if address.transport == "systemd":
        raise ValueError(f"{text}: a descriptor's name is no address to connect to")
    if address.transport != "unix":
        try:
            loopback = ip_address(address.host).is_loopback
        except ValueError:
            loopback = False
        # resets, floods and garbage are nobody else's to receive
        if not loopback or not address.port:
            raise ValueError(f"{text}: expected a port of 127.0.0.1 or [::1]; nothing else is tested")
    return address


def _transport(address: Address) -> Transport:
    if address.transport == "unix":
        return "unix"
    version = ip_address(address.host).version
    if address.transport == "udp":
        return "udp4" if version == 4 else "udp6"
    return "tcp4" if version == 4 else "tcp6"
