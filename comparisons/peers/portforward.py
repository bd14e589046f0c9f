"""Twisted's own port forwarder as a program: `python -m comparisons.peers.portforward PORT HOST PORT`.

Forwards 127.0.0.1:PORT, with `twisted.protocols.portforward` as it comes.
"""

import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react
from twisted.protocols.portforward import ProxyFactory


def main(reactor: Any, port: str, host: str, upstream: str) -> Deferred[None]:
    reactor.listenTCP(int(port), ProxyFactory(host, int(upstream)), interface="127.0.0.1")
    return Deferred()  # until it is told to end


if __name__ == "__main__":
    react(main, sys.argv[1:])
