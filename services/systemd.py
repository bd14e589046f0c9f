"""The service manager's side of a daemon: descriptors it hands over (sd_listen_fds(3)), and what it
is told (sd_notify(3)).

Descriptors are claimed once, before any engine is imported: importing Twisted's endpoints removes the
same variables from the environment, and Twisted keeps only one descriptor of a name.
"""

import contextlib
import os
import socket

# SD_LISTEN_FDS_START: after stdin, stdout and stderr
FIRST = 3


def claim() -> dict[str, list[socket.socket]]:
    """The inherited sockets by name; several may share one. Empty when nothing was handed to this
    process, and on every call after the first. What is not a socket is left alone.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    # the variables are meant for one process, and may reach others through a wrapper
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    # without names systemd's own library calls every descriptor "unknown"
    by_position = dict(enumerate(names.split(":"))) if names else {}
    sockets: dict[str, list[socket.socket]] = {}
    for position in range(int(count)):
        try:
            inherited = socket.socket(fileno=FIRST + position)
        except OSError:
            continue
        inherited.set_inheritable(False)
        sockets.setdefault(by_position.get(position, "unknown"), []).append(inherited)
    return sockets


def is_journal(descriptor: int) -> bool:
    """Whether this is the stream that journald gave us (systemd.exec(5)), and not a redirection."""
    with contextlib.suppress(ValueError, OSError):
        device, inode = map(int, os.environ.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(descriptor)
        return (device, inode) == (status.st_dev, status.st_ino)
    return False


def listens() -> bool:
    """Whether a service manager wants to hear from us."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*assignments: str) -> None:
    """Tell the service manager, if there is one. Never waits, and its absence is no fault of ours."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        # "@" stands for the NUL of an abstract name
        manager.connect("\0" + path[1:] if path.startswith("@") else path)
        manager.send("\n".join(assignments).encode(), socket.MSG_DONTWAIT)


def watchdog() -> float | None:
    """Seconds within which the manager wants to hear WATCHDOG=1; None where it does not listen for it
    (sd_watchdog_enabled(3)).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6
