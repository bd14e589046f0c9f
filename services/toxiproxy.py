"""Toxiproxy's HTTP interface: existing clients of Toxiproxy 2 drive listeners and their faults here.

A proxy of theirs is a TCP or UNIX listener here, whoever made it; a toxic is a fault. What they ask for
holds for open sessions too, and until they, or a reload with other faults, say something else.

Where we differ: a proxy's upstreams are resolved when it is made, and several are joined by commas; an
echo has none. A proxy that would lead back to this daemon is refused. `[::]` is IPv6 only. A fault for
datagrams, which Toxiproxy has no word for, is not shown and not touched. What a toxicity hits is drawn
from a seed: the n-th session of a listener meets the same every time.

Like Toxiproxy it asks nobody who they are: it belongs on loopback. Browsers are refused, so that no web
page can drive it through the user's own (DNS rebinding).
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from services.core.addresses import Address
from services.core.faults import (
    AnyFault,
    Bandwidth,
    Blackhole,
    Direction,
    Fault,
    Latency,
    Limit,
    Reset,
    Slicer,
    SlowClose,
    StreamFault,
)
from services.core.upstreams import Pool, Upstream
from services.endpoints import CONFIGURATION, EndpointError, resolve
from services.listeners import DrainingError, Held, Listeners
from services.web import JSON, Request, Response

T = TypeVar("T")

# the release that last changed this interface (PATCH), for clients that look
SPEAKS = "2.6.0"
# of what Toxiproxy counts in milliseconds and kilobytes: 24 days, 2 terabytes a second
MOST = 2**31 - 1


class Attribute(NamedTuple):
    """Of a toxic: the fault's field, how much of it one is, and what it may be. `never`: 0 stands for
    a time that does not come.
    """

    name: str
    field: str
    unit: float
    least: int = 0
    most: int = MOST
    never: bool = False


# Toxiproxy's README: latency and jitter in ms, rate in KB/s, the slicer's delay in us
TOXICS: Mapping[str, tuple[type[StreamFault], tuple[Attribute, ...]]] = {
    "latency": (Latency, (Attribute("latency", "delay", 1e-3), Attribute("jitter", "jitter", 1e-3))),
    "bandwidth": (Bandwidth, (Attribute("rate", "rate", 1000),)),
    "slow_close": (SlowClose, (Attribute("delay", "delay", 1e-3),)),
    "timeout": (Blackhole, (Attribute("timeout", "after", 1e-3, never=True),)),
    "reset_peer": (Reset, (Attribute("timeout", "after", 1e-3),)),
    "slicer": (
        Slicer,
        (
            Attribute("average_size", "size", 1, least=1),
            Attribute("size_variation", "variation", 1),
            Attribute("delay", "delay", 1e-6),
        ),
    ),
    "limit_data": (Limit, (Attribute("bytes", "bytes", 1, most=2**53),)),
}
TYPES: Mapping[type[Fault], str] = {kind: name for name, (kind, _) in TOXICS.items()}
DIRECTIONS: Mapping[str, Direction] = {"upstream": "upstream", "downstream": "downstream"}


class Proxy(Struct):
    """A proxy as clients write it; what is left out stays as it is."""

    name: str = ""
    listen: str | None = None
    upstream: str | None = None
    enabled: bool | None = None


class Toxic(Struct):
    name: str = ""
    type: str = ""
    stream: str = "downstream"
    toxicity: float | None = None
    attributes: dict[str, Any] = {}


class Refusal(Exception):  # noqa: N818  it is an answer
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Toxiproxy:
    def __init__(self, listeners: Listeners) -> None:
        self._listeners = listeners

    def respond(self, request: Request) -> Response:
        if request.fields.get("user-agent", "").startswith("Mozilla/"):
            return _refuse(403, "User agent not allowed")
        parts = [unquote(part) for part in request.path.split("/")[1:]]
        methods: dict[str, Callable[..., Response]]
        match parts:
            case ["version"]:
                methods = {"GET": self._version}
            case ["reset"]:
                methods = {"POST": self._reset}
            case ["populate"]:
                methods = {"POST": self._populate}
            case ["proxies"]:
                methods = {"GET": self._index, "POST": self._create}
            case ["proxies", _]:
                update = self._update
                methods = {"GET": self._show, "POST": update, "PATCH": update, "DELETE": self._remove}
            case ["proxies", _, "toxics"]:
                methods = {"GET": self._index_toxics, "POST": self._add_toxic}
            case ["proxies", _, "toxics", _]:
                change = self._update_toxic
                methods = {
                    "GET": self._show_toxic,
                    "POST": change,
                    "PATCH": change,
                    "DELETE": self._remove_toxic,
                }
            case _:
                return _refuse(404, "there is nothing of this name")
        if request.method not in methods:
            return _refuse(405, "method not allowed")._replace(allow=", ".join(methods))
        try:
            return methods[request.method](request.body, *parts[1::2])
        except Refusal as refusal:
            return _refuse(refusal.status, refusal.message)
        except EndpointError as error:
            return _refuse(400 if error.exit_code == CONFIGURATION else 500, error.message)
        except DrainingError:
            return _refuse(503, "this daemon is draining")
        except TimeoutError:
            return _refuse(503, "the engine gave no answer in time")

    # Proxies ------------------------------------------------------------------------------------

    def _version(self, _body: bytes) -> Response:
        return _json(200, {"version": SPEAKS, "server": f"triptych {version('triptych')}"})

    def _index(self, _body: bytes) -> Response:
        return _json(200, {held.name: _proxy(held) for held in self._listeners.streams()})

    def _show(self, _body: bytes, name: str) -> Response:
        return _json(200, _proxy(self._find(name)))

    def _create(self, body: bytes) -> Response:
        wanted = _read(body, Proxy)
        _require(wanted)
        if any(held.name == wanted.name for held in self._listeners.streams()):
            raise Refusal(409, "proxy already exists")
        return _json(201, _proxy(self._make(wanted)))

    def _populate(self, body: bytes) -> Response:
        proxies = _read(body, list[Proxy])
        for number, wanted in enumerate(proxies, 1):
            _require(wanted, f" at proxy {number}")
            wanted.enabled = wanted.enabled is not False
        names = [wanted.name for wanted in proxies]
        if len(set(names)) < len(names):
            raise Refusal(400, "bad request body: two proxies have the same name")
        existing = {held.name: held for held in self._listeners.streams()}
        made = []
        for wanted in proxies:
            held = existing.get(wanted.name)
            if held is None:
                held = self._make(wanted)
            elif self._alter(held, wanted):
                with self._listeners.changing():
                    self._listeners.change_faults(held, _unspoken(held))
            made.append(_proxy(held))
        return _json(201, {"proxies": made})

    def _update(self, body: bytes, name: str) -> Response:
        held = self._find(name)
        self._alter(held, _read(body, Proxy))
        return _json(200, _proxy(held))

    def _remove(self, _body: bytes, name: str) -> Response:
        with self._listeners.changing():
            self._listeners.remove(self._find(name))
        return Response(204)

    def _reset(self, _body: bytes) -> Response:
        with self._listeners.changing():
            for held in self._listeners.streams():
                self._listeners.enable(held)
                if _spoken(held):
                    self._listeners.change_faults(held, _unspoken(held))
        return Response(204)

    def _find(self, name: str) -> Held:
        for held in self._listeners.streams():
            if held.name == name:
                return held
        raise Refusal(404, "proxy not found")

    def _make(self, wanted: Proxy) -> Held:
        requested = _listen(wanted.listen or "127.0.0.1:0")
        pool = _pool(wanted.name, wanted.upstream or "")
        with self._listeners.changing():
            held = self._listeners.create(wanted.name, requested, pool)
            try:
                if wanted.enabled is not False:
                    self._listeners.enable(held)
            except EndpointError:
                self._listeners.remove(held)
                raise
        return held

    def _alter(self, held: Held, wanted: Proxy) -> bool:
        """Whether it listens elsewhere now, or has other upstreams."""
        requested = pool = None
        if wanted.listen and wanted.listen != _address(held):
            requested = _listen(wanted.listen)
            if requested == held.listener.requested:
                requested = None
        if wanted.upstream is not None and wanted.upstream != _upstream(held):
            if held.pool is None:
                raise Refusal(400, "bad request body: an echo has no upstream")
            pool = _pool(held.name, wanted.upstream)
        with self._listeners.changing():
            self._find(held.name)  # a reload may have removed it meanwhile
            enabled = bool(held.listening) if wanted.enabled is None else wanted.enabled
            if pool is not None:
                self._listeners.redirect(held, pool)
            if requested is not None:
                self._listeners.move(held, requested)
            if enabled:
                self._listeners.enable(held)
            else:
                self._listeners.disable(held)
        return pool is not None or requested is not None

    # Toxics -------------------------------------------------------------------------------------

    def _index_toxics(self, _body: bytes, name: str) -> Response:
        return _json(200, [_toxic(fault) for fault in _spoken(self._find(name))])

    def _show_toxic(self, _body: bytes, name: str, toxic: str) -> Response:
        return _json(200, _toxic(_named(self._find(name), toxic)))

    def _add_toxic(self, body: bytes, name: str) -> Response:
        wanted = _read(body, Toxic)
        with self._listeners.changing():
            held = self._find(name)
            direction = DIRECTIONS.get(wanted.stream.lower())
            if direction is None:
                raise Refusal(400, "stream was invalid, can be either upstream or downstream")
            if wanted.type not in TOXICS:
                raise Refusal(400, "invalid toxic type")
            label = wanted.name or f"{wanted.type}_{direction}"
            if any(fault.label == label for fault in held.policy.faults):
                raise Refusal(409, "toxic already exists")
            kind, attributes = TOXICS[wanted.type]
            fault = kind(
                name=label,
                direction=direction,
                probability=_probability(wanted.toxicity, 1.0),
                **_fields(attributes, wanted.attributes, {}),
            )
            self._listeners.change_faults(held, (*held.policy.faults, fault))
        return _json(200, _toxic(fault))

    def _update_toxic(self, body: bytes, name: str, toxic: str) -> Response:
        wanted = _read(body, Toxic)
        with self._listeners.changing():
            held = self._find(name)
            old = _named(held, toxic)
            shown = _toxic(old)
            _, attributes = TOXICS[shown["type"]]
            new = replace(
                old,
                probability=_probability(wanted.toxicity, old.probability),
                **_fields(attributes, wanted.attributes, shown["attributes"]),
            )
            faults = tuple(new if fault is old else fault for fault in held.policy.faults)
            self._listeners.change_faults(held, faults)
        return _json(200, _toxic(new))

    def _remove_toxic(self, _body: bytes, name: str, toxic: str) -> Response:
        with self._listeners.changing():
            held = self._find(name)
            gone = _named(held, toxic)
            self._listeners.change_faults(
                held, tuple(fault for fault in held.policy.faults if fault is not gone)
            )
        return Response(204)


# What clients read ------------------------------------------------------------------------------


def _json(status: int, body: object) -> Response:
    return Response(status, msgspec.json.encode(body) + b"\n", JSON)


def _refuse(status: int, message: str) -> Response:
    return _json(status, {"error": message, "status": status})


def _proxy(held: Held) -> dict[str, object]:
    return {
        "name": held.name,
        "listen": _address(held),
        "upstream": _upstream(held),
        "enabled": bool(held.listening),
        "toxics": [_toxic(fault) for fault in _spoken(held)],
    }


def _address(held: Held) -> str:
    return str((held.listener.addresses or [held.listener.requested])[0])


def _upstream(held: Held) -> str:
    return ",".join(upstream.name for upstream in held.pool.upstreams) if held.pool else ""


def _toxic(fault: Fault) -> dict[str, Any]:
    name = TYPES[type(fault)]
    _, attributes = TOXICS[name]
    return {
        "name": fault.label,
        "type": name,
        "stream": fault.direction,
        "toxicity": fault.probability,
        "attributes": {
            each.name: round((getattr(fault, each.field) or 0) / each.unit) for each in attributes
        },
    }


def _spoken(held: Held) -> list[AnyFault]:
    """The faults that Toxiproxy has a word for."""
    return [fault for fault in held.policy.faults if type(fault) in TYPES]


def _unspoken(held: Held) -> tuple[AnyFault, ...]:
    return tuple(fault for fault in held.policy.faults if type(fault) not in TYPES)


def _named(held: Held, toxic: str) -> AnyFault:
    for fault in _spoken(held):
        if fault.label == toxic:
            return fault
    raise Refusal(404, "toxic not found")


# What clients write -----------------------------------------------------------------------------


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"bad request body: {error}") from error


def _require(wanted: Proxy, where: str = "") -> None:
    for field in ("name", "upstream"):
        if not getattr(wanted, field):
            raise Refusal(400, f"missing required field: {field}{where}")


def _listen(text: str) -> Address:
    # as Go has it, no host is every host; it is warned about like any other such address
    every = "0.0.0.0"  # noqa: S104  the client's choice
    address = _parse("listen", every + text if text.startswith(":") else text)
    if address.transport != "tcp":
        raise Refusal(400, f"bad request body: listen: {text!r}: expected HOST:PORT")
    return address


def _pool(name: str, upstream: str) -> Pool:
    addresses = [_parse("upstream", text) for text in upstream.split(",")]
    for address in addresses:
        if address.transport != "unix" and (address.transport != "tcp" or not address.port):
            raise Refusal(400, f"bad request body: upstream: {str(address)!r}: expected HOST:PORT")
    return Pool(name, [Upstream(str(each), tuple(resolve(each))) for each in addresses])


def _parse(field: str, text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise Refusal(400, f"bad request body: {field}: {error}") from error


def _probability(toxicity: float | None, otherwise: float) -> float:
    if toxicity is None:
        return otherwise
    if not 0 <= toxicity <= 1:
        raise Refusal(400, "bad request body: toxicity: expected a number from 0 to 1")
    return toxicity


def _fields(
    attributes: Iterable[Attribute], given: Mapping[str, Any], otherwise: Mapping[str, int]
) -> dict[str, Any]:
    """The fault's fields: as given, as they are, or 0, which Toxiproxy means by nothing."""
    fields: dict[str, Any] = {}
    for name, field, unit, least, most, never in attributes:
        number = given.get(name, otherwise.get(name, 0))
        if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
            raise Refusal(
                400, f"bad request body: attributes: {name}: expected a number from {least} to {most}"
            )
        fields[field] = None if never and not number else int(number) * unit
    return fields
