"""A recording as a capture file that Wireshark reads: the frames that would have carried the conversations.

What is real: addresses, the bytes with their order and times, FIN and RST. What is made up, because a
recorder between two sockets never saw it: sequence numbers (from 0), handshakes (in the instant of the
accept), acknowledgements (at once), how bytes were cut into segments, and addresses where none were
kept, or a UNIX socket was (192.0.2.0/24 and 2001:db8::/32, which RFC 5737 and RFC 3849 keep for examples).

The file is pcapng (draft-ietf-opsawg-pcapng): a section, one interface of raw IP packets, and a packet a
block, in the order of time. IPv4 as in RFC 791, IPv6 as in RFC 8200, TCP as in RFC 9293.
"""

import heapq
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from comparisons.recordings.format import Conversation, Recording, Side
from services.core.addresses import Address

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
RAW_IP = 101  # LINKTYPE_RAW
MTU = 1500
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
WINDOW_SHIFT = 14  # the most there is (RFC 7323): 65,535 << 14 are never in flight
TCP_HEADER = 20
EPHEMERAL = 49152

Ip = IPv4Address | IPv6Address
OTHER: dict[Side, Side] = {"client": "server", "server": "client"}


def export(recording: Recording) -> Iterator[bytes]:
    """The file's blocks."""
    # the byte order, version 1.0, a length that is not told
    yield _block(SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    yield _block(INTERFACE, struct.pack("<HHI", RAW_IP, 0, 0))
    conversations = (_packets(number, each) for number, each in enumerate(recording.conversations))
    for when, packet in heapq.merge(*conversations, key=lambda each: each[0]):
        stamp = recording.header.began_us + when
        head = struct.pack("<IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(packet), len(packet))
        yield _block(PACKET, head + packet)


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length


def _packets(number: int, conversation: Conversation) -> Iterator[tuple[int, bytes]]:
    """The packets of one conversation, each with its time in microseconds since the recording began."""
    flow = _Flow(*_ends(number, conversation))
    start = conversation.start_us
    for packet in flow.handshake():
        yield start, packet
    for step in conversation.steps:
        if step.what == "data":
            packets = flow.data(step.who, step.data)
        elif step.what == "end":
            packets = flow.end(step.who)
        else:
            packets = [flow.packet(step.who, RST | ACK)]
        for packet in packets:
            yield start + step.when_us, packet


class _Flow:
    """A TCP connection as its packets show it."""

    def __init__(self, client: tuple[Ip, int], server: tuple[Ip, int]) -> None:
        self._ends: dict[Side, tuple[Ip, int]] = {"client": client, "server": server}
        self._sequence: dict[Side, int] = {"client": 0, "server": 0}
        self._segment = MTU - (20 if client[0].version == 4 else 40) - TCP_HEADER

    def handshake(self) -> list[bytes]:
        # maximum segment size; window scale after one byte of padding
        options = struct.pack(">BBHBBBB", 2, 4, self._segment, 1, 3, 3, WINDOW_SHIFT)
        packets = [self.packet("client", SYN, options=options)]
        self._sequence["client"] += 1
        packets.append(self.packet("server", SYN | ACK, options=options))
        self._sequence["server"] += 1
        return [*packets, self.packet("client", ACK)]

    def data(self, who: Side, data: bytes) -> list[bytes]:
        packets = []
        for begin in range(0, len(data), self._segment):
            piece = data[begin : begin + self._segment]
            last = begin + len(piece) == len(data)
            packets.append(self.packet(who, PSH | ACK if last else ACK, piece))
            self._sequence[who] += len(piece)
        return [*packets, self.packet(OTHER[who], ACK)]

    def end(self, who: Side) -> list[bytes]:
        packets = [self.packet(who, FIN | ACK)]
        self._sequence[who] += 1
        return [*packets, self.packet(OTHER[who], ACK)]

    def packet(self, who: Side, flags: int, data: bytes = b"", options: bytes = b"") -> bytes:
        (source, source_port), (target, target_port) = self._ends[who], self._ends[OTHER[who]]
        length = TCP_HEADER + len(options) + len(data)
        heard = self._sequence[OTHER[who]] if flags & ACK else 0
        words = (self._sequence[who] & 0xFFFFFFFF, heard & 0xFFFFFFFF)
        offset_flags = (TCP_HEADER + len(options)) << 10 | flags
        tcp = struct.pack(">HHIIHHHH", source_port, target_port, *words, offset_flags, 0xFFFF, 0, 0)
        tcp += options + data
        # both families' pseudo headers add up to the same: addresses, length, protocol 6
        pseudo = source.packed + target.packed + struct.pack(">II", length, 6)
        tcp = tcp[:16] + struct.pack(">H", _checksum(pseudo + tcp)) + tcp[18:]
        if source.version == 6:
            return struct.pack(">IHBB", 6 << 28, length, 6, 64) + source.packed + target.packed + tcp
        # no identification, do not fragment, 64 hops
        ip = (
            struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0)
            + source.packed
            + target.packed
        )
        return ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:] + tcp


def _checksum(data: bytes) -> int:
    """RFC 1071: the ones' complement of the ones' complement sum of 16-bit words."""
    # 2^16 is 1 modulo 2^16 - 1, so a remainder is that sum, but that no sum of a packet is 0
    total = int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF
    return 0xFFFF - (total or 0xFFFF)


def _ends(number: int, conversation: Conversation) -> tuple[tuple[Ip, int], tuple[Ip, int]]:
    """Client and server, of one family."""
    found = [_known(each) for each in (conversation.client, conversation.server)]
    six = any(each and each[0].version == 6 for each in found)
    network: Sequence[Ip] = (
        (IPv6Address("2001:db8::1:0"), IPv6Address("2001:db8::1"))
        if six
        else (IPv4Address("192.0.2.2"), IPv4Address("192.0.2.1"))
    )
    # so that conversations without addresses are told apart
    client = found[0] or (network[0] + number // 16384 % 250, EPHEMERAL + number % 16384)
    server = found[1] or (network[1], 1)
    return _as(client, six=six), _as(server, six=six)


def _known(text: str) -> tuple[Ip, int] | None:
    try:
        address = Address.parse(text)
        return ip_address(address.host.partition("%")[0]), address.port
    except ValueError:
        return None


def _as(end: tuple[Ip, int], *, six: bool) -> tuple[Ip, int]:
    if six and isinstance(end[0], IPv4Address):
        return IPv6Address(f"::ffff:{end[0]}"), end[1]
    return end
