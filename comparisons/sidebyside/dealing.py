"""One port, several processes: the kernel deals each new connection to one of them.

Sockets with SO_REUSEPORT that listen on one address are a group. A program in the kernel's classic BPF,
attached to the group, is run once for the first packet of each connection and returns the number of the
socket that gets it, in the order in which they began to listen (socket(7), SO_ATTACH_REUSEPORT_CBPF). So
clients talk to the process that serves them, with nobody in between, and nobody but chance or the client's
address decides which that is.

This module binds the group and writes the program. It starts no process, and it deals TCP only: with UDP
every datagram would be dealt anew, and a session of several would be torn apart.
"""

import ctypes
import random
import socket
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

from services.config import ListenerConfig
from services.core.addresses import Address
from services.endpoints import BACKLOG, close_listeners, open_listeners

Deal = Literal["random", "sticky"]

# asm-generic/socket.h; Python has no name for it
SO_ATTACH_REUSEPORT_CBPF = 51

# linux/bpf_common.h and linux/filter.h: an operation, the kind of its operand, the width of a load
LD, ALU, JMP, RET, MISC = 0x00, 0x04, 0x05, 0x06, 0x07
WORD, ABSOLUTE, CONSTANT, INDEX = 0x00, 0x20, 0x00, 0x08
MUL, RSH, MOD, XOR = 0x20, 0x70, 0x90, 0xA0
JGE = 0x30
RANDOM = -0x1000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM: not in the packet, a new random number
NETWORK = -0x100000  # SKF_NET_OFF: the IP header, wherever it is

# where the client's address is in the header, in words of 4 bytes: RFC 791, RFC 8200
SOURCE = {socket.AF_INET: (12,), socket.AF_INET6: (8, 12, 16, 20)}
# MurmurHash3's finalizer (public domain): every bit of the input reaches every bit of the output
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
SALTS = 2**32


class Instruction(NamedTuple):
    """struct sock_filter: a jump skips `true` or `false` instructions."""

    code: int
    true: int
    false: int
    operand: int


class Group:
    """The listening sockets of a split: `sockets[i]` are those of process i, one for each address."""

    def __init__(self, address: Address, weights: Sequence[int], deal: Deal) -> None:
        """Binds and listens on everything that `address` stands for. EndpointError with one line.

        Args:
            weights: how many shares of the sessions each process gets; none is zero.

        """
        # as a daemon would bind it, alone: with SO_REUSEPORT another split of the same user on this port
        # would be no error but two groups in one
        wanted = ListenerConfig(name="split", address=address, service="proxy")
        alone = open_listeners([wanted], {})
        close_listeners(alone)
        self.addresses = [each for listener in alone for each in listener.addresses]
        # anew in every run: whose address decides is dealt to another engine in another split
        salt = random.SystemRandom().randrange(SALTS)
        self.sockets: list[list[socket.socket]] = [[] for _ in weights]
        try:
            for each in self.addresses:
                family = socket.AF_INET6 if ":" in each.host else socket.AF_INET
                for mine in self.sockets:
                    mine.append(_listen(family, each))
                attach(self.sockets[-1][-1], program(family, weights, deal, salt))
        except BaseException:
            self.close()
            raise

    def silence(self) -> None:
        """Stops listening in all processes, whatever copies they keep: new clients are refused."""
        for each in (sock for mine in self.sockets for sock in mine):
            each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (sock for mine in self.sockets for sock in mine):
            each.close()


def program(
    family: socket.AddressFamily, weights: Sequence[int], deal: Deal, salt: int = 0
) -> list[Instruction]:
    """Returns i with probability weights[i] / sum(weights): by chance, or by the client's address."""
    if deal == "random":
        # A = a random number
        number = [Instruction(LD | WORD | ABSOLUTE, 0, 0, RANDOM)]
    else:
        # X = salt
        number = [Instruction(LD | CONSTANT, 0, 0, salt), Instruction(MISC, 0, 0, 0)]
        for offset in SOURCE[family]:
            # A = the next word of the client's address
            number.append(Instruction(LD | WORD | ABSOLUTE, 0, 0, NETWORK + offset))
            # A ^= X, the words before it
            number.append(Instruction(ALU | XOR | INDEX, 0, 0, 0))
            for shift, factor in MIX:
                # X = A
                number.append(Instruction(MISC, 0, 0, 0))
                # A >>= shift
                number.append(Instruction(ALU | RSH | CONSTANT, 0, 0, shift))
                # A ^= X: the upper bits reach the lower ones
                number.append(Instruction(ALU | XOR | INDEX, 0, 0, 0))
                # A *= factor: the lower bits reach the upper ones
                number.append(Instruction(ALU | MUL | CONSTANT, 0, 0, factor))
            # X = A
            number.append(Instruction(MISC, 0, 0, 0))
    # A %= the number of shares
    number.append(Instruction(ALU | MOD | CONSTANT, 0, 0, sum(weights)))
    choice = []
    shares = 0
    for index, weight in enumerate(weights):
        shares += weight
        # its share? else go on behind the next instruction
        choice.append(Instruction(JMP | JGE | CONSTANT, 1, 0, shares))
        # yes: this socket
        choice.append(Instruction(RET | CONSTANT, 0, 0, index))
    # the last share is never passed, but the kernel wants to see the end
    choice.append(Instruction(RET | CONSTANT, 0, 0, 0))
    return number + choice


def attach(sock: socket.socket, instructions: Sequence[Instruction]) -> None:
    """Has the kernel deal the connections of the group that `sock` is in by this program. Needs no root."""
    text = b"".join(
        struct.pack("HBBI", code, true, false, operand % 2**32) for code, true, false, operand in instructions
    )
    kept = ctypes.create_string_buffer(text)
    # struct sock_fprog: how many, and where
    pointer = struct.pack("HP", len(instructions), ctypes.addressof(kept))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, pointer)


def _listen(family: socket.AddressFamily, address: Address) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            # as the daemons do: addresses mean the same everywhere
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind((address.host, address.port))
        opened.listen(BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened
