"""Every client's socket has the options of its listener, whenever it came."""

import socket

from services.engines.sockets import complete_options, set_options


def user_timeout(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_a_client_that_came_before_the_listener_had_its_options_gets_them_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            set_options(listener, 2.0)
            early, _ = listener.accept()
        with early:
            assert user_timeout(early) == 0
            complete_options(early, 2.0)
            assert user_timeout(early) == 2000
            assert early.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert early.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_one_that_has_them_keeps_them_and_a_unix_socket_has_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        set_options(listener, 2.0)
        with socket.create_connection(listener.getsockname()):
            late, _ = listener.accept()
        with late:
            complete_options(late, 2.0)
            assert user_timeout(late) == 2000
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        complete_options(one, 2.0)
