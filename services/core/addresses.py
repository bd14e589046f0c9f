"""Where a listener or an upstream is, as text and as a value.

`HOST:PORT`, `[IPV6]:PORT`, `udp:HOST:PORT`, `unix:/PATH` and `systemd:NAME` (a descriptor
that the service manager hands over under that name). Parsing is pure; names are resolved in
`services/endpoints.py`, so an engine only ever meets addresses.
"""

from typing import Literal, NamedTuple, Self

Transport = Literal["tcp", "udp", "unix"]


class Address(NamedTuple):
    """One address. `host` is a name, an IP literal, a path (unix) or a descriptor name (systemd);
    `port` is 0 where the transport has none.
    """

    transport: Transport | Literal["systemd"]
    host: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address that `text` names. ValueError with one line that says what is wrong."""
        scheme, _, rest = text.partition(":")
        if scheme == "unix":
            if not rest:
                raise ValueError(f"{text!r}: a UNIX socket needs a path, as in unix:/run/x.sock")
            # sun_path holds 108 bytes, the last of them NUL (unix(7))
            if len(rest.encode()) > 107:
                raise ValueError(f"{text!r}: a UNIX socket path has at most 107 bytes")
            return cls("unix", rest)
        if scheme == "systemd":
            if not rest:
                raise ValueError(f"{text!r}: a descriptor needs a name, as in systemd:echo")
            return cls("systemd", rest)
        host_port = rest if scheme == "udp" and rest else text
        host, colon, port = host_port.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r}: put an IPv6 address in brackets, as in [::1]:7007")
        if not colon or not host:
            raise ValueError(f"{text!r}: expected HOST:PORT, as in 127.0.0.1:7007")
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text!r}: the port must be a number from 0 to 65535")
        return cls("udp" if scheme == "udp" and rest else "tcp", host, int(port))

    def __str__(self) -> str:
        if self.transport in {"unix", "systemd"}:
            return f"{self.transport}:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'udp:' if self.transport == 'udp' else ''}{host}:{self.port}"
