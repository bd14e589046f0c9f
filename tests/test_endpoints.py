"""Sockets are bound, inherited and named before an engine is there, and faults are one line."""

import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest

from services.config import Config, ListenerConfig
from services.core.addresses import Address
from services.endpoints import (
    EndpointError,
    Listener,
    Route,
    close_listeners,
    exposure,
    open_listeners,
    refuse_loops,
    resolve,
)

Service = Literal["echo", "proxy"]
Open = Callable[..., list[Listener]]


def configured(*addresses: str, service: Service = "echo") -> Config:
    return Config(
        listeners=tuple(
            ListenerConfig(name=f"l{number}", address=Address.parse(text), service=service, pool="p")
            for number, text in enumerate(addresses)
        )
    )


@pytest.fixture
def opened() -> Iterator[Open]:
    """`open_listeners` for addresses; what it opened is closed after the test."""
    every: list[Listener] = []

    def open_them(*addresses: str, service: Service = "echo") -> list[Listener]:
        listeners = open_listeners(configured(*addresses, service=service).listeners, {})
        every.extend(listeners)
        return listeners

    yield open_them
    close_listeners(every)


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> str:
    """A host name that stands for both loopback addresses, as `localhost` does on most machines."""
    real = socket.getaddrinfo

    def look_up(host: str, port: int, **options: Any) -> list[Any]:
        hosts = ["::1", "127.0.0.1"] if host == "both.test" else [host]
        return [entry for each in hosts for entry in real(each, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return "both.test"


def fails(*addresses: str, service: Service = "echo") -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        open_listeners(configured(*addresses, service=service).listeners, {})
    assert len(caught.value.message.splitlines()) == 1
    return caught.value


# Binding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "0.0.0.0", "[::]"])
def test_a_tcp_listener_takes_connections(opened: Open, host: str) -> None:
    (listener,) = opened(f"{host}:0")
    (address,) = listener.addresses
    assert (listener.transport, listener.inherited) == ("tcp", False)
    assert address.port
    with socket.create_connection((address.host, address.port), timeout=5) as client:
        accepted, peer = listener.sockets[0].accept()
        with accepted:
            assert peer[:2] == client.getsockname()[:2]


def test_a_udp_listener_gets_datagrams(opened: Open) -> None:
    (listener,) = opened("udp:127.0.0.1:0")
    (address,) = listener.addresses
    assert str(address).startswith("udp:127.0.0.1:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (address.host, address.port))
        assert listener.sockets[0].recv(10) == b"x"


def test_sockets_do_not_block_and_do_not_leak_into_children(opened: Open, tmp_path: Path) -> None:
    for listener in opened("127.0.0.1:0", "udp:[::1]:0", f"unix:{tmp_path}/s"):
        for each in listener.sockets:
            assert not each.getblocking()
            assert not each.get_inheritable()


def test_a_name_gets_every_address_it_stands_for_on_one_free_port(opened: Open, two_addresses: str) -> None:
    (listener,) = opened(f"{two_addresses}:0")
    first, second = listener.addresses
    assert (first.host, second.host) == ("::1", "127.0.0.1")
    assert first.port == second.port != 0


def test_a_free_port_that_is_taken_for_the_second_address_is_given_up_for_another(
    opened: Open, two_addresses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    squatters: list[socket.socket] = []
    real = socket.socket.bind

    def bind(self: socket.socket, where: Any) -> None:
        # whoever else takes the port, between our two binds
        if self.family == socket.AF_INET and len(squatters) < 3 and where[1]:
            squatter = socket.socket()
            squatters.append(squatter)
            real(squatter, where)
            squatter.listen()
        real(self, where)

    monkeypatch.setattr(socket, "socket", type("Racing", (socket.socket,), {"bind": bind}))
    try:
        (listener,) = opened(f"{two_addresses}:0")
    finally:
        for squatter in squatters:
            squatter.close()
    assert len(squatters) == 3
    assert len({address.port for address in listener.addresses}) == 1


def test_a_name_is_served_on_what_this_machine_has_of_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def look_up(_host: str, port: int, **options: Any) -> list[Any]:
        return [*real("2001:db8::1", port, **options), *real("127.0.0.1", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    (listener,) = opened("half.test:0")
    assert [address.host for address in listener.addresses] == ["127.0.0.1"]


def test_both_wildcards_can_be_had_on_one_port(opened: Open) -> None:
    (listener,) = opened("[::]:0")
    port = listener.addresses[0].port
    (other,) = opened(f"0.0.0.0:{port}")
    assert other.addresses[0].port == port


# UNIX sockets ------------------------------------------------------------------------------------


def test_a_unix_listener_takes_connections_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listeners = open_listeners(configured(f"unix:{path}").listeners, {})
    assert listeners[0].addresses == [Address("unix", str(path))]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close_listeners(listeners)
    assert not path.exists()


def test_the_file_of_a_daemon_that_died_is_replaced(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    opened(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_the_file_of_a_living_daemon_is_in_use(opened: Open, tmp_path: Path) -> None:
    opened(f"unix:{tmp_path}/s")
    error = fails(f"unix:{tmp_path}/s")
    assert "already in use" in error.message
    assert error.exit_code == 69
    assert (tmp_path / "s").is_socket()


def test_a_file_that_is_no_socket_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    assert fails(f"unix:{path}").exit_code == 69
    assert path.read_text() == "precious"


def test_the_file_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listeners = open_listeners(configured(f"unix:{path}").listeners, {})
    listeners[0].sockets[0].close()
    successors = open_listeners(configured(f"unix:{path}").listeners, {})
    close_listeners(listeners)
    assert path.is_socket()
    close_listeners(successors)
    assert not path.exists()


# Faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["", "udp:"])
def test_a_port_in_use_is_69(opened: Open, transport: str) -> None:
    (listener,) = opened(f"{transport}127.0.0.1:0")
    error = fails(str(listener.addresses[0]))
    assert error.message == (
        f"{listener.addresses[0]}: already in use; stop what uses it or choose another port"
    )
    assert error.exit_code == 69


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64, "a..b", "nul\0"])
def test_an_unknown_host_is_69(host: str) -> None:
    error = fails(f"{host}:80")
    assert "unknown host" in error.message
    assert error.exit_code == 69


# TEST-NET-1 and the documentation prefix: no machine has these addresses
@pytest.mark.parametrize("address", ["192.0.2.1:0", "udp:192.0.2.1:0", "[2001:db8::1]:0"])
def test_an_address_of_another_machine_is_69(address: str) -> None:
    error = fails(address)
    assert error.message == f"{address}: this machine has no such address"
    assert error.exit_code == 69


def test_a_folder_that_is_not_there_is_71(tmp_path: Path) -> None:
    error = fails(f"unix:{tmp_path}/none/s")
    assert error.message == f"unix:{tmp_path}/none/s: cannot be bound: No such file or directory"
    assert error.exit_code == 71


def test_a_fault_leaves_nothing_open(tmp_path: Path, two_addresses: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  names are enough
        fails(f"unix:{tmp_path}/s", "udp:127.0.0.1:0", f"{two_addresses}:{port}")
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208  as above
    assert not (tmp_path / "s").exists()


# Inherited sockets -------------------------------------------------------------------------------

INHERIT = """
import os, sys
from services.config import Config, ListenerConfig
from services.core.addresses import Address
from services import systemd
from services.endpoints import EndpointError, close_listeners, open_listeners
service = sys.argv[1]
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[3]))
config = Config(listeners=tuple(
    ListenerConfig(name=name, address=Address("systemd", name), service=service)
    for name in sys.argv[2].split(",")
))
try:
    listeners = open_listeners(config.listeners, systemd.claim())
except EndpointError as error:
    sys.exit(f"{error.exit_code} {error.message}")
for each in listeners:
    flags = [(s.getblocking(), s.get_inheritable()) for s in each.sockets]
    print(each.name, each.transport, each.inherited, *each.addresses, set(flags))
print([name for name in os.environ if name.startswith("LISTEN_")])
close_listeners(listeners)
"""


def inherit(
    sockets: list[socket.socket],
    names: str,
    wanted: str,
    *,
    service: Service = "echo",
    strangers: bool = False,
) -> tuple[list[str], str]:
    """What a process says that is handed `sockets` from descriptor 3 on, as systemd does it."""
    base = 100

    def hand_over() -> None:
        # away from 3 first, so that no descriptor is overwritten before it is moved
        for position, each in enumerate(sockets):
            os.dup2(each.fileno(), base + position)
        for position in range(len(sockets)):
            os.dup2(base + position, 3 + position)

    done = subprocess.run(
        [sys.executable, "-c", INHERIT, service, wanted, str(int(strangers))],
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names},
        preexec_fn=hand_over,
        close_fds=False,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.splitlines(), done.stderr.strip()


def test_inherited_sockets_come_by_name_several_to_a_name_and_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, second = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    datagrams, unix = socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    with first, second, datagrams, unix:
        datagrams.bind(("127.0.0.1", 0))
        unix.bind(str(path))
        unix.listen()
        lines, told = inherit([first, datagrams, second, unix], "web:web:web:local", "local,web")
        assert told == ""
        ports = [each.getsockname()[1] for each in (first, second, datagrams)]
        assert lines == [
            f"local unix True unix:{path} {{(False, False)}}",
            f"web tcp True 127.0.0.1:{ports[0]} 127.0.0.1:{ports[1]} {{(False, False)}}",
            f"web udp True udp:127.0.0.1:{ports[2]} {{(False, False)}}",
            "[]",
        ]
        # the service manager's copies still listen, and the file is its to remove
        with socket.create_connection(first.getsockname(), timeout=5):
            first.setblocking(True)
            first.accept()[0].close()
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_descriptors_for_another_process_are_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, told = inherit([server], "web", "web", strangers=True)
    assert told == "69 systemd:web: no socket of that name was handed over (there are: none)"


def test_a_name_that_was_not_handed_over_is_told_with_those_that_were() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, told = inherit([server], "web", "wbe")
    assert told == "69 systemd:wbe: no socket of that name was handed over (there are: web)"


def test_a_socket_that_does_not_listen_is_a_fault_of_the_unit() -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        _, told = inherit([idle], "web", "web")
    assert told == "78 systemd:web: not a listening socket; the socket unit needs Accept=no"


def test_a_proxy_cannot_use_a_datagram_socket() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        _, told = inherit([datagrams], "web", "web", service="proxy")
    assert told == "78 systemd:web: a proxy cannot use this kind of socket"


# Names -------------------------------------------------------------------------------------------


def test_an_upstream_is_resolved_to_literals_in_order(two_addresses: str) -> None:
    assert resolve(Address("tcp", two_addresses, 7)) == [
        Address("tcp", "::1", 7),
        Address("tcp", "127.0.0.1", 7),
    ]


@pytest.mark.parametrize("text", ["127.0.0.1:7", "[::1]:7", "unix:/run/x.sock"])
def test_a_literal_is_resolved_to_itself(text: str) -> None:
    assert resolve(Address.parse(text)) == [Address.parse(text)]


def test_an_unknown_upstream_is_69() -> None:
    with pytest.raises(EndpointError, match=r"no-such-host\.invalid:7: unknown host") as caught:
        resolve(Address("tcp", "no-such-host.invalid", 7))
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("text", ["127.0.0.1:7", "127.9.9.9:7", "[::1]:7", "udp:[::1]:7", "unix:/x"])
def test_loopback_is_no_exposure(text: str) -> None:
    assert exposure("proxy", Address.parse(text)) is None


@pytest.mark.parametrize(
    ("service", "text", "risk"),
    [
        ("proxy", "0.0.0.0:7", "reach the upstreams"),
        ("proxy", "[::]:7", "reach the upstreams"),
        ("proxy", "192.0.2.1:7", "reach the upstreams"),
        ("echo", "udp:0.0.0.0:7", "reflection"),
        ("echo", "[2001:db8::1]:7", "echo"),
    ],
)
def test_listening_beyond_loopback_has_a_risk_that_can_be_told(
    service: Service, text: str, risk: str
) -> None:
    assert risk in (exposure(service, Address.parse(text)) or "")


# Loops ------------------------------------------------------------------------------------------


def tcp(host: str, port: int) -> Address:
    return Address("tcp", host, port)


@pytest.mark.parametrize(
    ("bound", "upstream"),
    [
        (tcp("127.0.0.1", 7000), tcp("127.0.0.1", 7000)),
        (tcp("0.0.0.0", 7000), tcp("127.0.0.1", 7000)),
        (tcp("::", 7000), tcp("::1", 7000)),
        (Address("unix", "/run/x.sock"), Address("unix", "/run/x.sock")),
    ],
    ids=str,
)
def test_a_proxy_that_would_dial_itself_is_refused(bound: Address, upstream: Address) -> None:
    with pytest.raises(EndpointError) as caught:
        refuse_loops([Route("front", [bound], [tcp("192.0.2.1", 80), upstream])])
    assert caught.value.message == (
        f"front: its upstreams lead back to {bound}, where it listens itself; name the server behind it"
    )
    assert caught.value.exit_code == 78


def test_a_loop_over_several_listeners_is_refused_and_a_chain_is_not() -> None:
    first, second, third = (tcp("127.0.0.1", port) for port in (7001, 7002, 7003))
    refuse_loops([Route("a", [first], [second]), Route("b", [second], [third])])
    with pytest.raises(EndpointError, match="a: its upstreams lead back"):
        refuse_loops(
            [Route("a", [first], [second]), Route("b", [second], [third]), Route("c", [third], [first])]
        )


@pytest.mark.parametrize(
    ("bound", "upstream"),
    [
        (tcp("127.0.0.1", 7000), tcp("127.0.0.1", 7001)),
        (tcp("127.0.0.1", 7000), tcp("127.0.0.2", 7000)),
        (tcp("0.0.0.0", 7000), tcp("192.0.2.1", 7000)),  # nobody's: RFC 5737
        (tcp("::", 7000), tcp("127.0.0.1", 7000)),
        (Address("unix", "/run/x.sock"), Address("unix", "/run/y.sock")),
    ],
    ids=str,
)
def test_another_port_or_another_machine_is_no_loop(bound: Address, upstream: Address) -> None:
    refuse_loops([Route("front", [bound], [upstream])])


# UNIX sockets ------------------------------------------------------------------------------------


def unix(path: Path, mode: str | None = None, owner: str | None = None) -> list[Listener]:
    address = Address("unix", str(path))
    wanted = ListenerConfig(name="u", address=address, service="echo", mode=mode, owner=owner)
    return open_listeners([wanted], {})


def test_a_unix_socket_gets_its_mode_and_owner_before_anybody_can_come(tmp_path: Path) -> None:
    path = tmp_path / "s"
    me = f"{pwd.getpwuid(os.getuid()).pw_name}:{grp.getgrgid(os.getgid()).gr_name}"
    listeners = unix(path, mode="0604", owner=me)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    close_listeners(listeners)
    listeners = unix(path, owner=":" + me.partition(":")[2])
    close_listeners(listeners)


def test_an_owner_that_there_is_not_is_78(tmp_path: Path) -> None:
    with pytest.raises(EndpointError) as caught:
        unix(tmp_path / "s", owner="nobody-of-this-name")
    assert caught.value.exit_code == 78
    assert "owner" in caught.value.message


def test_an_owner_that_is_not_ours_to_give_is_77(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(EndpointError) as caught:
        unix(tmp_path / "s", owner="root")
    assert caught.value.exit_code == 77
