"""Descriptors that the service manager hands over (sd_listen_fds(3)).

They are claimed once, before any engine is imported: importing Twisted's endpoints removes the
same variables from the environment, and Twisted keeps only one descriptor of a name. Sending
notifications is not done here.
"""

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
