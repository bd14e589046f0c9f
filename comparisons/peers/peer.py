"""What is known of a proxy or an echo service before it is started."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from comparisons.scenarios.rules import Transport
from services.config import BYTES, DURATION, SECONDS, SIZE
from services.core.addresses import Address

Service = Literal["echo", "proxy"]


def milliseconds(duration: str) -> int:
    """A duration of a `Rule.settings`, as every configuration can spell it."""
    found = DURATION.fullmatch(duration)
    assert found
    return round(float(found[1]) * SECONDS[found[2]] * 1000)


def size(text: str) -> int:
    """A size of a `Rule.settings`, in bytes."""
    found = SIZE.fullmatch(text)
    assert found
    return int(found[1]) * BYTES[found[2]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is started for.

    Attributes:
        address: where it must listen.
        upstreams: what it must dial; none for an echo service.
        settings: as a scenario's `Rule.settings`, only those that the peer has said to have.
        directory: an empty folder of its own.

    """

    service: Service
    address: Address
    upstreams: Sequence[Address]
    settings: Mapping[str, str]
    directory: Path

    def milliseconds(self, setting: str, default: int) -> int:
        return milliseconds(self.settings[setting]) if setting in self.settings else default

    def bytes(self, setting: str, default: int) -> int:
        return size(self.settings[setting]) if setting in self.settings else default


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy, an echo service, or (our engines) both.

    Attributes:
        command: the words that start it in the foreground; None for one that is already up.
        programs: what must be on PATH for that.
        version: asks for it.
        services: what it is by itself. A proxy in front of an echo service is one, too.
        transports: what its clients can be given.
        settings: those of a rule's settings that it can be given.
        upstreams: how many it can be given.
        drain: the signal that asks it to finish its sessions and end.
        log: the file in its folder that gets the log lines of our vocabulary, if it writes them.
        address, upstream_addresses: of one that is already up.
        lacks: why a rule cannot be played on it; {} is what the rule needs, as `names` calls it.

    """

    name: str
    command: Callable[[Task], Sequence[str]] | None
    programs: Sequence[str] = ()
    version: Callable[[], str] = str
    services: Sequence[Service] = ("proxy",)
    transports: Sequence[Transport] = ("tcp4",)
    settings: Sequence[str] = ()
    upstreams: int = 1
    drain: signal.Signals = signal.SIGTERM
    log: str | None = None
    address: Address | None = None
    upstream_addresses: Sequence[Address] = ()
    lacks: str = "it cannot be given {}"
    names: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, needed: str) -> str:
        return self.lacks.format(self.names.get(needed, needed))
