"""Who may become a session: address lists, a rate, and limits in all and for each client.

A refusal is decided before anything is made for the client, and at once (rule 23): nobody waits for
nothing. What is asked of each new client is only what was configured.
"""

from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Literal, NamedTuple, get_args

from msgspec import Meta, Struct

Network = IPv4Network | IPv6Network
Number = Annotated[int, Meta(ge=1)]
# What a refusal is for, in one word.
Cause = Literal["list", "sessions", "client", "rate"]


class Limits(Struct, frozen=True, kw_only=True):
    """Args:
    buffer: bytes that a relay may hold in user space.
    sessions: open at one time, in all; None is as many as there are descriptors for.
    sessions_per_client: from one client address, or from one network of `ipv4_prefix` or
        `ipv6_prefix` bits: whoever has one IPv6 address commonly has all of its /64 (RFC 6177).
    accept_rate: new sessions a second, in all.
    accept_burst: so many at once, after a quiet time; None is one second's worth.
    datagram_rate: answers a second to one source of datagrams, whose address may be forged.

    """

    buffer: int = 128 * 1024
    sessions: Number | None = None
    sessions_per_client: Number | None = None
    ipv4_prefix: Annotated[int, Meta(ge=1, le=32)] = 32
    ipv6_prefix: Annotated[int, Meta(ge=1, le=128)] = 64
    accept_rate: Number | None = None
    accept_burst: Number | None = None
    datagram_rate: Number | None = None


class Lists(Struct, frozen=True, kw_only=True):
    """Networks: who is in `deny` is refused, and if `allow` names any, who is in none of them."""

    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()

    def refuse(self, host: str) -> str | None:
        """Why a client of this address is refused, if it is."""
        address = _ip(host)
        if _among(address, self.deny):
            return "its address is on the listener's deny list"
        if self.allow and not _among(address, self.allow):
            return "its address is not on the listener's allow list"
        return None


class Fullness(NamedTuple):
    """How full it is at one moment.

    Attributes:
        limits: that are asked for.
        clients: that are counted one by one, which is only where there is a limit for each.
        most_of_one: sessions of the client that has the most.
        tokens: new sessions that the rate allows at once.
        refused: by what for, since the beginning.

    """

    limits: Limits
    clients: int
    most_of_one: int
    tokens: float
    refused: dict[Cause, int]


class Admission:
    """Not thread-safe, as the service that asks it. Clients of UNIX sockets have no address: the lists
    and the limit for each client are not for them.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._clients: Counter[object] = Counter()
        self._refused: dict[Cause, int] = dict.fromkeys(get_args(Cause), 0)
        self._use(limits, now)

    def _use(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._burst = float(limits.accept_burst or limits.accept_rate or 0)
        self._tokens = self._burst
        self._filled_at = now

    def change(self, limits: Limits, now: float) -> None:
        """From the next client on; who is in stays, and counts."""
        if limits != self._limits:
            self._use(limits, now)

    def refuse(self, host: str | None, lists: Lists | None, sessions: int, now: float) -> str | None:
        """Why a new client is refused, if it is. `sessions` are open at this moment.

        A client that a list or a limit keeps out takes nothing of the accept rate.
        """
        limits = self._limits
        if lists is not None and host is not None and (reason := lists.refuse(host)):
            self._refused["list"] += 1
            return reason
        if limits.sessions is not None and sessions >= limits.sessions:
            self._refused["sessions"] += 1
            return f"{limits.sessions} sessions are open"
        if host is not None and (reason := self.crowded(host)):
            return reason
        if limits.accept_rate is not None:
            self._fill(now)
            if self._tokens < 1:
                self._refused["rate"] += 1
                return f"more than {limits.accept_rate} new sessions a second"
            self._tokens -= 1
        return None

    def crowded(self, host: str) -> str | None:
        """Why this client may have no further session, if it has as many as it may."""
        most = self._limits.sessions_per_client
        if most is None:
            return None
        key = self._key(host)
        if self._clients[key] < most:
            return None
        self._refused["client"] += 1
        return f"{most} sessions of {key} are open"

    def enter(self, host: str | None) -> object:
        """A client is in: what to give back to `leave`."""
        if self._limits.sessions_per_client is None or host is None:
            return None
        key = self._key(host)
        self._clients[key] += 1
        return key

    def leave(self, key: object) -> None:
        if key is not None:
            self._clients[key] -= 1
            if not self._clients[key]:
                del self._clients[key]

    def fullness(self, now: float) -> Fullness:
        self._fill(now)
        most_of_one = max(self._clients.values(), default=0)
        return Fullness(self._limits, len(self._clients), most_of_one, self._tokens, dict(self._refused))

    def _fill(self, now: float) -> None:
        since, self._filled_at = now - self._filled_at, now
        self._tokens = min(self._burst, self._tokens + since * (self._limits.accept_rate or 0))

    def _key(self, host: str) -> object:
        """The client as it is counted: its address, or its network."""
        address = _ip(host)
        prefix = self._limits.ipv4_prefix if address.version == 4 else self._limits.ipv6_prefix
        if prefix == address.max_prefixlen:
            return address
        return ip_network((address.packed, prefix), strict=False)


def _ip(host: str) -> IPv4Address | IPv6Address:
    """An IPv4 client of an IPv6 socket is the IPv4 client that it is; a scope is no part of an address."""
    address = ip_address(host.partition("%")[0])
    return (address.version == 6 and address.ipv4_mapped) or address


def _among(address: IPv4Address | IPv6Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
