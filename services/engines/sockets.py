"""What all three engines ask of the kernel: options, addresses, errors, and what became of a leg.

Nothing here waits, and nothing here decides.
"""

import errno
import fcntl
import ipaddress
import os
import select
import socket
import struct
import termios

from services.core.addresses import Address
from services.core.record import NO_TCP_INFO, Loss, Reason, Side, TcpInfo
from services.core.session import Probed

# linux/in.h; the socket module has no name for it yet
IP_BIND_ADDRESS_NO_PORT = 24
# A dead but silent peer is asked for first after this long; further probes follow as often.
KEEPALIVE_SECONDS = 60
# struct tcp_info (linux/tcp.h): eight bytes, then 32-bit fields; the last one read here is the 24th
_TCP_INFO = struct.Struct("=8x24I")
_LAST_DATA_SENT, _RTT, _TOTAL_RETRANS = 9, 15, 23

_REASONS = {
    # accept(2) and connect(2) report a connection that was reset meanwhile as aborted
    errno.ECONNRESET: Reason.RESET,
    errno.ECONNABORTED: Reason.RESET,
    # TCP_USER_TIMEOUT, keepalive, or a SYN that nobody answered
    errno.ETIMEDOUT: Reason.TIMED_OUT,
    # the peer had ended its direction, then reset the connection (or closed it altogether)
    errno.EPIPE: Reason.BROKEN,
    errno.ECONNREFUSED: Reason.REFUSED,
    # a UNIX socket that is not there
    errno.ENOENT: Reason.REFUSED,
    errno.EACCES: Reason.REFUSED,
    errno.EHOSTUNREACH: Reason.UNREACHABLE,
    errno.ENETUNREACH: Reason.UNREACHABLE,
    errno.EADDRNOTAVAIL: Reason.UNREACHABLE,
    errno.EMFILE: Reason.EXHAUSTED,
    errno.ENFILE: Reason.EXHAUSTED,
    errno.ENOBUFS: Reason.EXHAUSTED,
    errno.ENOMEM: Reason.EXHAUSTED,
    # connect(2) on a UNIX socket whose backlog is full
    errno.EAGAIN: Reason.EXHAUSTED,
}

# connect(2) finds the connection established and gone again: a SYN that is refused says ECONNREFUSED
CONNECTED_AND_LOST = frozenset({errno.ECONNRESET, errno.EPIPE})
# accept(2): a pending connection that failed; the next one may be well. Whatever else it says (no
# descriptor, no memory) would be said again at once.
CLIENT_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,  # a firewall's rule
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
    }
)
# HAProxy waits as long before it accepts again
EXHAUSTED_PAUSE = 0.1
# what the kernel would say if the listener did not pause before
NO_DESCRIPTORS = Loss(Reason.EXHAUSTED, "EMFILE")


def loss_of(error: BaseException) -> Loss:
    """The closed enum's word for an OSError, or for a Twisted error that carries its errno."""
    number = getattr(error, "errno", None) or getattr(error, "osError", None)
    if number is None:
        return Loss(Reason.OTHER, type(error).__name__)
    return loss_of_errno(number)


def loss_of_errno(number: int) -> Loss:
    return Loss(_REASONS.get(number, Reason.OTHER), errno.errorcode.get(number, str(number)))


def set_options(sock: socket.socket, dead_peer: float) -> None:
    """What every TCP leg gets; an accepted socket inherits it from its listener (tcp(7)).

    Args:
        dead_peer: seconds that data may stay unacknowledged, or keepalive probes unanswered.

    """
    if sock.family == socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = max(1, min(KEEPALIVE_SECONDS, int(dead_peer / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    # also ends the keepalive: once it is set, it counts instead of TCP_KEEPCNT
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_peer * 1000))


def complete_options(sock: socket.socket, dead_peer: float) -> None:
    """What a listener hands down, it hands down at the handshake: a client that was in its backlog
    before it had its options, as with a socket that was handed over, has none of them.
    """
    if sock.family != socket.AF_UNIX and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) != int(
        dead_peer * 1000
    ):
        set_options(sock, dead_peer)


def dial_socket(address: Address, dead_peer: float, source: str | None = None) -> socket.socket:
    """A blocking socket that `sockaddr(address)` can be connected with. OSError where `source` is no
    address of this machine, or of the other family.
    """
    if address.transport == "unix":
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    set_options(sock, dead_peer)
    if source is not None and family != socket.AF_UNIX:
        _bind_source(sock, source)
    return sock


def _bind_source(sock: socket.socket, source: str) -> None:
    """The port is chosen at connect, so that one source serves more connections than it has ports (ip(7))."""
    try:
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
    except OSError:
        sock.close()
        raise


def datagram_socket(address: Address, source: str | None = None) -> socket.socket:
    """A non-blocking UDP socket that is connected: it hears nobody else, and of ICMP errors (udp(7))."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if source is not None:
            sock.bind((source, 0))
        sock.connect((address.host, address.port))
    except OSError:
        sock.close()
        raise
    return sock


def sockaddr(address: Address) -> tuple[str, int] | str:
    return address.host if address.transport == "unix" else (address.host, address.port)


def client_address(peer: object) -> Address | None:
    """The peer of an accepted socket, as accept(2) told it; a UNIX client has no name."""
    if isinstance(peer, tuple):
        return Address("tcp", peer[0], peer[1])
    return None


def local_address(listening: Address, sock: socket.socket) -> Address:
    """The local end of an accepted socket: what was bound, unless that was the wildcard."""
    if listening.transport == "unix" or not ipaddress.ip_address(listening.host).is_unspecified:
        return listening
    host, port = sock.getsockname()[:2]
    return Address("tcp", host, port)


def tcp_info(sock: socket.socket) -> TcpInfo:
    """Smoothed round trip (microseconds) and retransmissions of a TCP leg."""
    fields = _tcp_info(sock)
    return TcpInfo(fields[_RTT], fields[_TOTAL_RETRANS]) if fields else NO_TCP_INFO


def accept_wait(sock: socket.socket) -> float | None:
    """Seconds that a socket, accepted just now, spent in the backlog (in steps of 1 ms): we have sent
    nothing but the handshake, so that is when data was last sent.
    """
    fields = _tcp_info(sock)
    return fields[_LAST_DATA_SENT] / 1000 if fields else None


def _tcp_info(sock: socket.socket) -> tuple[int, ...] | None:
    if sock.family == socket.AF_UNIX:
        return None
    try:
        return _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except OSError:  # closed under us
        return None


def probe(leg: Side, sock: socket.socket) -> Probed:
    """Has the leg been lost, and what lies in its kernel buffers? Never waits."""
    poll = select.poll()
    poll.register(sock, 0)  # POLLERR is always reported; POLLHUP alone is no death
    loss = None
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        loss = loss_of_errno(number) if number else None
    return Probed(leg, loss, _queued(sock, termios.FIONREAD), _queued(sock, termios.TIOCOUTQ))


def _queued(sock: socket.socket, request: int) -> int:
    """SIOCINQ or SIOCOUTQ (tcp(7), unix(7)): bytes not yet read, or not yet acknowledged."""
    answer = fcntl.ioctl(sock, request, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])


def reset_on_close(sock: socket.socket) -> None:
    """Make close(2) send RST and drop what was not sent (socket(7): linger 0)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def refuse(sock: socket.socket) -> None:
    """Reset a client that never becomes a session."""
    reset_on_close(sock)
    sock.close()


class Wakeup:
    """A descriptor that another thread or a signal handler can make readable."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)
