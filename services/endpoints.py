"""Listeners, bound or inherited, and the addresses behind names.

Everything is bound here before an engine is imported, so an engine only ever meets sockets and
addresses, and a fault of the set-up is told in one line. All sockets are non-blocking: an engine
that blocks still polls its listener. Resolving blocks: it is for the start of a daemon.
"""

import errno
import grp
import os
import pwd
import socket
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, NamedTuple

from services.config import ListenerConfig
from services.core.addresses import Address, Transport
from services.core.admission import Lists
from services.core.faults import AnyFault

# more than any burst; the kernel cuts it to net.core.somaxconn, which is where a limit belongs
BACKLOG = 4096
# how often a port that was free for one address of a name may be taken for another
PORT_ATTEMPTS = 10

UNAVAILABLE, OS_ERROR, NO_PERMISSION, CONFIGURATION = 69, 71, 77, 78

# the machine has no such address, or not that family at all
NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class EndpointError(Exception):
    """One line for the user, and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Listener:
    """A name of the configuration with the sockets bound for it. `requested` is the address as
    configured; `addresses` are the real ones, in the order of `sockets`; they stay readable after the
    sockets are closed.
    """

    name: str
    service: Literal["echo", "proxy"]
    transport: Transport
    pool: str | None
    answer_low_ports: bool
    lists: Lists | None
    proxy_protocol: bool
    faults: tuple[AnyFault, ...]
    sockets: list[socket.socket]
    inherited: bool
    requested: Address
    addresses: list[Address] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", [_bound(self.transport, each) for each in self.sockets])


def open_listeners(
    configured: Iterable[ListenerConfig], inherited: Mapping[str, Sequence[socket.socket]]
) -> list[Listener]:
    """Every listener, bound and listening. EndpointError, and then nothing is left open.

    `inherited` are the service manager's sockets by name; a listener gets duplicates, so that a reload
    may drop one and take it up again.
    """
    listeners: list[Listener] = []
    try:
        for wanted in configured:
            if wanted.address.transport == "systemd":
                listeners += _adopt(wanted, inherited)
            else:
                sockets = _bind(wanted.address, wanted.mode, wanted.owner)
                listeners.append(_listener(wanted, wanted.address.transport, sockets, inherited=False))
    except BaseException:
        close_listeners(listeners)
        raise
    return listeners


def open_again(listener: Listener) -> Listener:
    """The listener with new sockets, bound to the addresses it had; to the one requested where it had
    none yet. EndpointError, and then nothing is left open.
    """
    opened: list[socket.socket] = []
    try:
        for address in listener.addresses or [listener.requested]:
            opened += _bind(address)
    except BaseException:
        for each in opened:
            each.close()
        raise
    return replace(listener, sockets=opened)


def open_interface(address: Address, inherited: Mapping[str, Sequence[socket.socket]]) -> list[socket.socket]:
    """The sockets of an interface of the daemon's own. EndpointError as for a listener."""
    if address.transport != "systemd":
        return _bind(address)
    sockets = [each.dup() for each in inherited.get(address.host, [])]
    if not sockets:
        raise EndpointError(f"{address}: no socket of that name was handed over", UNAVAILABLE)
    for each in sockets:
        each.setblocking(False)
    return sockets


def bound_address(bound: socket.socket) -> Address:
    """What a stream socket is bound to."""
    return _bound("unix" if bound.family == socket.AF_UNIX else "tcp", bound)


def close_listeners(listeners: Iterable[Listener]) -> None:
    """Closes what is still open and removes the socket files of our own. Inherited sockets are
    closed but never shut down: that would silence the service manager's copy.
    """
    for listener in listeners:
        for each in listener.sockets:
            each.close()
        if listener.transport == "unix" and not listener.inherited:
            for address in listener.addresses:
                # a successor may have taken the path while this process drained
                if _is_stale(address.host):
                    Path(address.host).unlink()


def resolve(address: Address) -> list[Address]:
    """The addresses behind `address`, in the order to try them: IP literals for a name, itself for
    a UNIX socket. EndpointError if there is none.
    """
    if address.transport == "unix":
        return [address]
    return [Address(address.transport, host, port) for _, (host, port, *_) in _look_up(address)]


class Route(NamedTuple):
    """A proxying listener: what it is bound to, and where its pool's upstreams are."""

    name: str
    bound: Sequence[Address]
    upstreams: Sequence[Address]


def refuse_loops(routes: Sequence[Route]) -> None:
    """A proxy that dials itself, directly or by another listener of its own process, would eat every
    descriptor there is. EndpointError for the first one.
    """
    for route in routes:
        reached: list[Route] = []
        following = [route]
        while following:
            dialled = following.pop().upstreams
            for other in routes:
                if other not in reached and any(
                    _reaches(upstream, bound) for upstream in dialled for bound in other.bound
                ):
                    reached.append(other)
                    following.append(other)
        if route in reached:
            raise EndpointError(
                f"{route.name}: its upstreams lead back to {route.bound[0]}, where it listens itself; "
                "name the server behind it",
                CONFIGURATION,
            )


def _reaches(dialled: Address, bound: Address) -> bool:
    """Whether a connection to `dialled` comes to the socket that is bound to `bound`."""
    if dialled == bound:
        return True
    if dialled.transport != bound.transport or dialled.port != bound.port or dialled.transport == "unix":
        return False
    if not ip_address(bound.host).is_unspecified or (":" in dialled.host) != (":" in bound.host):
        return False
    # whoever may bind an address has it
    family = socket.AF_INET6 if ":" in dialled.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((dialled.host, 0))
        except OSError:
            return False
    return True


def exposure(
    service: Literal["echo", "proxy", "metrics", "faults", "control"], address: Address
) -> str | None:
    """What listening on this bound address offers to other hosts, in one phrase; None on loopback."""
    host = address.host.removeprefix("::ffff:")
    if address.transport == "unix" or host.startswith("127.") or host == "::1":
        return None
    if service == "proxy":
        return "anyone who can reach it can reach the upstreams through it"
    if service == "metrics":
        return "anyone who can reach it can read the metrics"
    if service == "faults":
        return "anyone who can reach it can open ports here and reach other hosts through them"
    if address.transport == "udp":
        return "anyone can have it send datagrams to a forged source address (reflection)"
    return "anyone who can reach it can have it echo data"


def _listener(
    wanted: ListenerConfig, transport: Transport, sockets: list[socket.socket], *, inherited: bool
) -> Listener:
    return Listener(
        name=wanted.name,
        service=wanted.service,
        transport=transport,
        pool=wanted.pool,
        answer_low_ports=wanted.answer_low_ports,
        lists=wanted.lists,
        proxy_protocol=wanted.proxy_protocol,
        faults=wanted.faults,
        sockets=sockets,
        inherited=inherited,
        requested=wanted.address,
    )


def _adopt(wanted: ListenerConfig, inherited: Mapping[str, Sequence[socket.socket]]) -> list[Listener]:
    """The sockets handed over under the wanted name; one listener for each transport among them."""
    sockets = [each.dup() for each in inherited.get(wanted.address.host, [])]
    if not sockets:
        names = ", ".join(sorted(inherited)) or "none"
        raise EndpointError(
            f"{wanted.address}: no socket of that name was handed over (there are: {names})", UNAVAILABLE
        )
    groups: dict[Transport, list[socket.socket]] = {}
    for each in sockets:
        stream, unix = each.type == socket.SOCK_STREAM, each.family == socket.AF_UNIX
        if stream and not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise EndpointError(
                f"{wanted.address}: not a listening socket; the socket unit needs Accept=no", CONFIGURATION
            )
        if not stream and (unix or each.type != socket.SOCK_DGRAM or wanted.service == "proxy"):
            raise EndpointError(
                f"{wanted.address}: a {wanted.service} cannot use this kind of socket", CONFIGURATION
            )
        each.setblocking(False)
        groups.setdefault("unix" if unix else "tcp" if stream else "udp", []).append(each)
    return [_listener(wanted, transport, each, inherited=True) for transport, each in groups.items()]


def _bind(address: Address, mode: str | None = None, owner: str | None = None) -> list[socket.socket]:
    """One bound socket for every address that `address` resolves to. Port 0 means one free port for
    all of them. `mode` (octal) and `owner` (USER, or USER:GROUP) are a UNIX socket's.
    """
    if address.transport == "unix":
        return [_open(address, socket.AF_UNIX, address.host, lambda: _give(address, mode, owner))]
    for attempt in range(PORT_ATTEMPTS):
        sockets: list[socket.socket] = []
        not_here: EndpointError | None = None
        port = address.port
        try:
            for family, (host, _, *scope) in _look_up(address, listen=True):
                concrete = Address(address.transport, host, port)
                try:
                    sockets.append(_open(concrete, family, (host, port, *scope)))
                except EndpointError as error:
                    # localhost names ::1 also where the kernel has no IPv6: one address is enough
                    if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in NOT_HERE:
                        raise
                    not_here = error
                else:
                    port = sockets[0].getsockname()[1]
            if sockets:
                return sockets
        except EndpointError as error:
            for each in sockets:
                each.close()
            taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not taken or address.port or attempt == PORT_ATTEMPTS - 1:
                raise
        if not_here:
            raise not_here
    raise AssertionError("the last attempt returns or raises")


def _give(address: Address, mode: str | None, owner: str | None) -> None:
    """Before it listens: nobody who may not comes in between."""
    if owner is not None:
        user, _, group = owner.partition(":")
        try:
            uid = pwd.getpwnam(user).pw_uid if user else -1
            os.chown(address.host, uid, grp.getgrnam(group).gr_gid if group else -1)
        except KeyError as error:
            raise EndpointError(f"{address}: owner: {error.args[0]}", CONFIGURATION) from error
        except PermissionError as error:
            raise EndpointError(
                f"{address}: owner: no permission to give it to {owner}", NO_PERMISSION
            ) from error
    if mode is not None:
        Path(address.host).chmod(int(mode, 8))


def _open(
    address: Address, family: int, where: object, prepare: Callable[[], object] = lambda: None
) -> socket.socket:
    """A socket bound to one concrete address, and listening if it is a stream. `prepare` comes between."""
    kind = socket.SOCK_DGRAM if address.transport == "udp" else socket.SOCK_STREAM
    try:
        opened = socket.socket(family, kind)
    except OSError as error:
        raise _explain(address, error) from error
    try:
        opened.setblocking(False)
        if family == socket.AF_INET6:
            # so that [::] and 0.0.0.0 can be had side by side, and addresses mean the same everywhere
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if address.transport == "tcp":
            # sessions of the daemon before, in TIME_WAIT, do not keep the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_UNIX and _is_stale(address.host):
            Path(address.host).unlink()
        opened.bind(where)  # type: ignore[arg-type]  # the shape follows the family
        prepare()
        if kind == socket.SOCK_STREAM:
            # two sockets with SO_REUSEADDR may both bind a port: the second fails only here
            opened.listen(BACKLOG)
    except EndpointError:
        opened.close()
        raise
    except (OSError, ValueError) as error:
        opened.close()
        raise _explain(address, error) from error
    return opened


def _is_stale(path: str) -> bool:
    """Whether `path` is a socket file that nobody listens on any more. Only a connection can tell;
    any other file refuses one too, and must never be taken for ours.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            return probe.connect_ex(path) == errno.ECONNREFUSED
    except (OSError, ValueError):
        return False


def _look_up(
    address: Address, *, listen: bool = False
) -> list[tuple[int, tuple[str, int, *tuple[int, ...]]]]:
    """Family and socket address of everything that a host name stands for, without repeats."""
    kind = socket.SOCK_DGRAM if address.transport == "udp" else socket.SOCK_STREAM
    flags = socket.AI_PASSIVE if listen else 0
    try:
        found = socket.getaddrinfo(address.host, address.port, type=kind, flags=flags)
    except (OSError, ValueError) as error:
        # ValueError: a host that no resolver could be asked for, such as a label of 64 letters
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise EndpointError(f"{address}: unknown host ({reason})", UNAVAILABLE) from error
    return list(dict.fromkeys((int(family), where) for family, _, _, _, where in found))  # type: ignore[misc]


def _explain(address: Address, error: Exception) -> EndpointError:
    """One line, with what to do, for a socket that could not be had."""
    number = error.errno if isinstance(error, OSError) else None
    unix = address.transport == "unix"
    if number == errno.EADDRINUSE:
        hint = (
            "stop what uses it or choose another path" if unix else "stop what uses it or choose another port"
        )
        return EndpointError(f"{address}: already in use; {hint}", UNAVAILABLE)
    if number in {errno.EACCES, errno.EPERM}:
        hint = (
            "no permission to make the socket file; choose another folder"
            if unix
            else "no permission to bind; use a port of 1024 or above, or grant CAP_NET_BIND_SERVICE"
        )
        return EndpointError(f"{address}: {hint}", NO_PERMISSION)
    if number in NOT_HERE:
        return EndpointError(f"{address}: this machine has no such address", UNAVAILABLE)
    reason = error.strerror if isinstance(error, OSError) else error
    return EndpointError(f"{address}: cannot be bound: {reason}", OS_ERROR)


def _bound(transport: Transport, bound: socket.socket) -> Address:
    name = bound.getsockname()
    if transport == "unix":
        # an abstract name, which only the service manager can hand over, comes as bytes
        path = name if isinstance(name, str) else "@" + os.fsdecode(name[1:])
        return Address("unix", path)
    return Address(transport, name[0], name[1])
