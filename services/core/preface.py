"""The PROXY protocol, versions 1 and 2: who a client is that comes by another proxy.

`Preface` reads a header however its bytes arrive, within a bound, and says what it means, or what is
wrong with it (rule 16): a header that is not exactly right is refused, since whoever believes a wrong
one lets anybody be anybody. `header` writes one for the upstream. Both follow the specification of
HAProxy, "The PROXY protocol", versions 1 and 2, of 2020.

What a header of version 2 carries beside addresses (TLVs: the certificate's name, the connection's id)
is kept as it came and passed on. One of them is ours: `PAIR`, from the range for applications, is the id
that split, shadow and replay give to sessions that belong together; it goes into the log line.
"""

import struct
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal, NamedTuple

from services.core.addresses import Address

Version = Literal["v1", "v2"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
# "PROXY TCP6 " with two addresses and two ports at their longest, or UNKNOWN with anything, and CRLF
LONGEST_V1 = 107
# Addresses have 216 bytes at most; certificates in TLVs can be long, endless ones are an attack.
LONGEST_V2 = 4096
# PP2_TYPE_CRC32C, and one of PP2_TYPE_MIN_CUSTOM to PP2_TYPE_MAX_CUSTOM
CRC32C, PAIR = 0x03, 0xE3

_FIXED = struct.Struct("!12sBBH")
_FAMILIES = {0x1: struct.Struct("!4s4sHH"), 0x2: struct.Struct("!16s16sHH"), 0x3: struct.Struct("!108s108s")}
_TLV = struct.Struct("!BH")


class PrefaceError(Exception):
    """The header cannot be believed; one line says why."""


class Introduction(NamedTuple):
    """What a header says. Addresses are None where it names none (UNKNOWN, LOCAL): then the connection
    itself is all that is known. `tlvs` are the bytes of version 2; `rest` came behind the header.
    """

    client: Address | None
    local: Address | None
    tlvs: bytes
    rest: bytes

    @property
    def pair(self) -> str | None:
        for kind, value in each_tlv(self.tlvs):
            if kind == PAIR and value.isascii() and len(value) == 26:
                return value.decode()
        return None


class Preface:
    """A header on its way in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Introduction | None:
        """What came next; nothing is the end of all. None while the header is not whole; PrefaceError as
        soon as it cannot be.
        """
        if not data:
            raise PrefaceError("it ended before it was whole")
        self._data += data
        held = bytes(self._data)
        if held[:12] == SIGNATURE[: len(held)]:
            return _second(held)
        if held[:6] == b"PROXY "[: len(held)]:
            return _first(held)
        raise PrefaceError("it does not begin as a PROXY header does")


def _first(held: bytes) -> Introduction | None:
    end = held.find(b"\r\n", 0, LONGEST_V1)
    if end < 0:
        if len(held) >= LONGEST_V1:
            raise PrefaceError(f"no line end within {LONGEST_V1} bytes")
        return None
    rest = held[end + 2 :]
    words = held[:end].split(b" ")
    if words[1] == b"UNKNOWN":
        return Introduction(None, None, b"", rest)
    if words[1] not in {b"TCP4", b"TCP6"} or len(words) != 6:
        raise PrefaceError("the line is not PROXY TCP4 or TCP6 with two addresses and two ports")
    kind = IPv4Address if words[1] == b"TCP4" else IPv6Address
    try:
        hosts = [str(kind(word.decode("ascii"))) for word in words[2:4]]
    except (AddressValueError, UnicodeDecodeError):
        raise PrefaceError(f"an address is none of {words[1].decode()}") from None
    ports = [_port(word) for word in words[4:]]
    client, local = (Address("tcp", host, port) for host, port in zip(hosts, ports, strict=True))
    return Introduction(client, local, b"", rest)


def _port(word: bytes) -> int:
    # as the specification has it: decimal, no leading zero
    if not word.isdigit() or (len(word) > 1 and word[:1] == b"0") or int(word) > 65535:
        raise PrefaceError("a port is no number from 0 to 65535")
    return int(word)


def _second(held: bytes) -> Introduction | None:
    if len(held) < _FIXED.size:
        return None
    _, version_command, family, length = _FIXED.unpack_from(held)
    version, command = version_command >> 4, version_command & 0xF
    if version != 2:
        raise PrefaceError(f"version {version} is not known")
    if command > 1:
        raise PrefaceError(f"command {command} is not known")
    if length > LONGEST_V2:
        raise PrefaceError(f"it announces {length} bytes, more than {LONGEST_V2}")
    end = _FIXED.size + length
    if len(held) < end:
        return None
    body, rest = held[_FIXED.size : end], held[end:]
    # 1 is a stream; whatever else it may be (0 unspecified, 2 datagrams) says nothing of this client
    shape = _FAMILIES.get(family >> 4) if family & 0xF == 1 else None
    if shape is not None and length < shape.size:
        raise PrefaceError("it is shorter than its addresses")
    tlvs = body[shape.size :] if shape is not None else b""
    if not _whole(tlvs):
        raise PrefaceError("a TLV goes beyond its end")
    if family == 0 and _whole(body):
        tlvs = body  # a client without a name can have TLVs; what is none of them is to be ignored
    _check_sum(held[:end], len(tlvs), tlvs)
    if command == 0 or shape is None:  # LOCAL: a health check of the proxy's own
        return Introduction(None, None, tlvs, rest)
    fields = shape.unpack_from(body)
    if shape.size == 216:
        client, local = (Address("unix", path.rstrip(b"\0").decode("utf-8", "replace")) for path in fields)
    else:
        kind = IPv4Address if len(fields[0]) == 4 else IPv6Address
        client, local = (Address("tcp", str(kind(fields[at])), fields[at + 2]) for at in (0, 1))
    return Introduction(client, local, tlvs, rest)


def _whole(tlvs: bytes) -> bool:
    return sum(_TLV.size + len(value) for _, value in each_tlv(tlvs)) == len(tlvs)


def each_tlv(tlvs: bytes) -> list[tuple[int, bytes]]:
    """Kind and value of each that is whole."""
    found = []
    at = 0
    while at + _TLV.size <= len(tlvs):
        kind, length = _TLV.unpack_from(tlvs, at)
        at += _TLV.size
        if at + length > len(tlvs):
            break
        found.append((kind, tlvs[at : at + length]))
        at += length
    return found


def _check_sum(header: bytes, tail: int, tlvs: bytes) -> None:
    """PP2_TYPE_CRC32C: of the whole header, with zeros where the sum itself stands."""
    at = len(header) - tail
    for kind, value in each_tlv(tlvs):
        at += _TLV.size
        if kind == CRC32C:
            zeroed = header[:at] + bytes(len(value)) + header[at + len(value) :]
            if value != crc32c(zeroed).to_bytes(4):
                raise PrefaceError("its checksum is wrong")
        at += len(value)


def crc32c(data: bytes) -> int:
    """Castagnoli's, as in RFC 3720, B.4."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def header(
    version: Version, client: Address | None, local: Address, tlvs: bytes = b"", pair: str | None = None
) -> bytes:
    """What an upstream is told of a client before its first byte.

    Args:
        client: None where it has no name (UNIX sockets).
        local: where the client connected to.
        tlvs: of the header that the client came with; only version 2 can pass them on.
        pair: our own TLV, unless `tlvs` have it already.

    """
    named = client is not None and client.transport == local.transport == "tcp"
    six = named and client is not None and (":" in client.host or ":" in local.host)
    if version == "v1":
        if not named or client is None:
            return b"PROXY UNKNOWN\r\n"
        hosts = [_six(each.host) if six else each.host for each in (client, local)]
        return f"PROXY TCP{6 if six else 4} {' '.join(hosts)} {client.port} {local.port}\r\n".encode()
    # a checksum would be of another header; the next proxy's is its own
    kept = [(kind, value) for kind, value in each_tlv(tlvs) if kind != CRC32C]
    if pair is not None and all(kind != PAIR for kind, _ in kept):
        kept.append((PAIR, pair.encode()))
    body = b"".join(_TLV.pack(kind, len(value)) + value for kind, value in kept)
    family = 0
    if named and client is not None:
        family = 0x21 if six else 0x11
        packed = [
            IPv6Address(_six(each.host)).packed if six else IPv4Address(each.host).packed
            for each in (client, local)
        ]
        body = _FAMILIES[family >> 4].pack(*packed, client.port, local.port) + body
    command = 0x21 if named else 0x20
    return _FIXED.pack(SIGNATURE, command, family, len(body)) + body


def _six(host: str) -> str:
    """An address of either kind as one of IPv6; a scope means nothing elsewhere."""
    bare = host.partition("%")[0]
    return bare if ":" in bare else f"::ffff:{bare}"
