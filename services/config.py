"""The configuration: one TOML file, read into frozen typed structs.

The structs are the specification. One walker reads their fields, so that a key exists exactly
where a field does, and the type says how its text is read: a `float` is a duration in seconds
("250ms", "1h"), an `int` is a size in bytes ("64KiB"), an `Address` is an address; what is annotated with
bounds is a plain number, and among tagged structs `type` tells which. Nothing stops
at the first fault: `ConfigError` holds all of them, each with the path of its key.

The flags of `triptych echo` and `triptych proxy` go the same way as a file, by `from_flags`.
Names are not resolved and no socket is opened here: that is `endpoints.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import Struct

from services.core.addresses import Address
from services.core.admission import Limits, Lists, Network
from services.core.faults import FOR_DATAGRAMS, FOR_STREAMS, AnyFault
from services.core.preface import Version
from services.core.session import Timeouts
from services.core.upstreams import Choice, Number
from services.vocabulary import Level

EngineName = Literal["blocking", "nonblocking", "twisted"]

ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DURATION = re.compile(r"([0-9]+\.?[0-9]*)(ms|s|m|h)")
MODE = re.compile(r"0?[0-7]{3}")
SIZE = re.compile(r"([0-9]+)(B|KiB|MiB|GiB)")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
BYTES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

# epoll_wait(2) takes its timeout as 31 bits of milliseconds: 596 hours
LONGEST, SHORTEST = 596 * 3600, 0.001
# beyond this a size is a slip of the pen: it would be held for every direction of every session
LARGEST = 1024**3

# stands for a value that could not be read while the rest of the file is looked at
FAULTY: Any = object()


class LogConfig(Struct, frozen=True, kw_only=True):
    """`path` is a file or "-" (stdout); `progress` and `stats` are intervals in seconds."""

    path: str = "-"
    level: Level = "info"
    progress: float = 60.0
    stats: float = 60.0


class ListenerConfig(Struct, frozen=True, kw_only=True):
    """`answer_low_ports` lets a UDP echo answer source ports below 1024 (echo loops). `faults` are met
    on purpose by its sessions (`core/faults.py`).
    """

    name: str
    address: Address
    service: Literal["echo", "proxy"]
    pool: str | None = None
    answer_low_ports: bool = False
    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    proxy_protocol: bool = False
    mode: str | None = None
    owner: str | None = None
    faults: tuple[AnyFault, ...] = ()

    @property
    def lists(self) -> Lists | None:
        return Lists(allow=self.allow, deny=self.deny) if self.allow or self.deny else None


class UpstreamConfig(Struct, frozen=True, kw_only=True):
    """`sessions` is how many it may have at one time."""

    address: Address
    weight: Number = 1
    backup: bool = False
    sessions: Number | None = None
    proxy_protocol: Version | None = None


class PoolConfig(Choice, frozen=True, kw_only=True):
    """`resolve` is how often the names of its upstreams are looked up again, in seconds: half of the
    minute that load balancers with moving addresses commonly ask for.
    """

    upstreams: tuple[UpstreamConfig, ...]
    resolve: float = 30.0


class MetricsConfig(Struct, frozen=True, kw_only=True):
    """Where Prometheus finds /metrics: HOST:PORT, unix:/PATH or systemd:NAME."""

    address: Address


class FaultsConfig(Struct, frozen=True, kw_only=True):
    """Where listeners and their faults are controlled in Toxiproxy's protocol, as with metrics."""

    address: Address


class ControlConfig(Struct, frozen=True, kw_only=True):
    """Where `triptych status` finds this daemon: unix:/PATH, instead of the runtime directory."""

    address: Address


class Config(Struct, frozen=True, kw_only=True):
    """Everything a daemon is told. In the file `listeners` are [[listener]], `pools` [pool.NAME]."""

    engine: EngineName = "nonblocking"
    log: LogConfig = LogConfig()
    limits: Limits = Limits()
    listeners: tuple[ListenerConfig, ...] = msgspec.field(name="listener", default=())
    pools: dict[str, PoolConfig] = msgspec.field(name="pool", default_factory=dict)
    timeouts: Timeouts = Timeouts()
    metrics: MetricsConfig | None = None
    faults: FaultsConfig | None = None
    control: ControlConfig | None = None


class Source(NamedTuple):
    """Where a configuration came from, and how to read it again (ConfigError)."""

    path: Path
    read: Callable[[], Config]


# the core's timeouts carry the progress interval, which the file gives under [log]
NOT_KEYS: dict[type[Struct], set[str]] = {Timeouts: {"progress"}}


class ConfigError(Exception):
    """`faults`: every fault found, one line each, as `path: what is wrong`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def load(path: Path) -> Config:
    """The configuration in the file at `path`. ConfigError with all its faults."""
    return read(document(path))


def document(path: Path) -> dict[str, Any]:
    """What is written in the TOML file at `path`. ConfigError."""
    import tomllib  # noqa: PLC0415  only a daemon with a file pays for it

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 text at byte {error.start}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not TOML: {error}"]) from error
    except RecursionError as error:
        raise ConfigError(["not TOML: nested too deeply"]) from error


def from_flags(
    *,
    engine: str,
    service: str,
    listen: Sequence[str],
    upstreams: Sequence[str] = (),
    faults: Sequence[str] = (),
    faults_address: str | None = None,
    log_path: str = "-",
    log_level: str = "info",
) -> Config:
    """The configuration that the flags of `echo` and `proxy` stand for; the listeners are named
    `echo-1`, `echo-2` in the order of their flags. A fault is given to every listener that can suffer
    it. ConfigError names the flags.
    """
    tables = [fault_table(text) for text in faults]
    for table, text in zip(tables, faults, strict=True):
        if not any(_suffers(address, table["type"]) for address in listen):
            raise ConfigError([f"--fault: {text}: no --listen has what this fault is for"])
    pool = {"pool": "upstream"} if service == "proxy" else {}
    document = {
        "engine": engine,
        "log": {"path": log_path, "level": log_level},
        "listener": [
            {
                "name": f"{service}-{number}",
                "address": text,
                "service": service,
                "faults": [table for table in tables if _suffers(text, table["type"])],
                **pool,
            }
            for number, text in enumerate(listen, 1)
        ],
        "pool": {"upstream": {"upstreams": [{"address": text} for text in upstreams]}} if pool else {},
        **({"faults": {"address": faults_address}} if faults_address else {}),
    }
    try:
        return read(document)
    except ConfigError as error:
        flags = {
            r"^engine:": "--engine:",
            r"^log\.path:": "--log:",
            r"^log\.level:": "--log-level:",
            r"^faults\.address:": "--fault-api:",
            r"^listener\[\d+\]\.faults\[\d+\]": "--fault",
            r"^listener(\[\d+\]\.\w+)?:": "--listen:",
            r"^pool\.upstream\.upstreams(\[\d+\]\.\w+)?:": "--upstream:",
        }
        told = error.faults
        for path, flag in flags.items():
            told = [re.sub(path, flag, fault) for fault in told]
        raise ConfigError(list(dict.fromkeys(told))) from error


def fault_table(text: str) -> dict[str, Any]:
    """`latency:delay=2ms,probability=0.5` as the table that a file would have."""
    kind, _, rest = text.partition(":")
    table: dict[str, Any] = {"type": kind}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError([f"--fault: {text}: expected TYPE:KEY=VALUE,..., as in latency:delay=2ms"])
        try:
            table[key] = json.loads(value)
        except ValueError:  # a duration, a size, a name
            table[key] = value
    return table


def _suffers(address: str, kind: str) -> bool:
    """Whether a listener at `address` can suffer a fault of this type; one that does not exist is told
    by the walker.
    """
    suited = FOR_DATAGRAMS if address.startswith("udp:") else FOR_STREAMS
    known = {each.__struct_config__.tag for each in (*FOR_STREAMS, *FOR_DATAGRAMS)}
    return kind not in known or kind in {each.__struct_config__.tag for each in suited}


def read(document: Mapping[str, Any]) -> Config:
    faults: list[str] = []
    config: Config = read_struct(Config, document, "", faults)
    _check(config, document, faults)
    if faults:
        raise ConfigError(faults)
    timeouts = msgspec.structs.replace(config.timeouts, progress=config.log.progress)
    return msgspec.structs.replace(config, timeouts=timeouts)


def _check(config: Config, document: Mapping[str, Any], faults: list[str]) -> None:
    """What no single key can tell. A value that could not be read is never complained of twice."""
    for key, interface in (("metrics", config.metrics), ("faults", config.faults)):
        address = getattr(interface, "address", FAULTY)
        if address is not FAULTY and address.transport == "udp":
            faults.append(f"{key}.address: {key} are asked for over HTTP, so not at a udp: address")
    control = getattr(config.control, "address", FAULTY)
    if control is not FAULTY and control.transport != "unix":
        faults.append("control.address: a daemon is controlled on its own machine: expected unix:/PATH")
    names: dict[str, str] = {}
    addresses: dict[Address, str] = {}
    # as written, so that a pool with a fault inside is not called unknown as well
    written = document.get("pool", {})
    pools = set(written) if isinstance(written, dict) else FAULTY
    if config.listeners is FAULTY:
        return
    if not config.listeners and config.faults is None:
        faults.append("listener: at least one is needed, as in [[listener]] with name, address and service")
    for number, listener in enumerate(config.listeners):
        path = f"listener[{number}]"
        if listener is FAULTY:
            continue
        if listener.name is not FAULTY:
            first = names.setdefault(listener.name, path)
            if first != path:
                faults.append(f"{path}.name: {_quote(listener.name)} is the name of {first} already")
        address = listener.address
        udp = address is not FAULTY and address.transport == "udp"
        # port 0 asks for any free port, which is another one each time
        if address is not FAULTY and (address.port or address.transport in {"unix", "systemd"}):
            first = addresses.setdefault(address, path)
            if first != path:
                faults.append(f"{path}.address: {_quote(str(address))} is the address of {first} already")
        if listener.service == "proxy":
            if listener.pool is None:
                faults.append(f"{path}.pool: a proxy needs a pool")
            elif FAULTY not in (listener.pool, pools) and listener.pool not in pools:
                faults.append(
                    f"{path}.pool: there is no pool {_quote(listener.pool)}{_similar(listener.pool, pools)}"
                )
            elif address is not FAULTY and FAULTY not in (listener.pool, pools, config.pools):
                _check_kind(path, address, listener.pool, config.pools[listener.pool], faults)
        if listener.service == "echo" and listener.pool is not None:
            faults.append(f"{path}.pool: an echo has no upstreams, so no pool")
        _check_faults(listener, path, faults)
        unix = address is FAULTY or address.transport == "unix"
        for key, text in (("mode", listener.mode), ("owner", listener.owner)):
            if text is not None and not unix:
                faults.append(f"{path}.{key}: only a unix: socket has one")
        if isinstance(listener.mode, str) and not MODE.fullmatch(listener.mode):
            faults.append(f'{path}.mode: expected an octal mode such as "0660", not {_quote(listener.mode)}')
        if listener.proxy_protocol is True and udp:
            faults.append(f"{path}.proxy_protocol: datagrams have no connection to introduce")
        # what a descriptor of the service manager is shows only when it is claimed
        may_be_udp = address is FAULTY or address.transport in {"udp", "systemd"}
        if listener.answer_low_ports is True and not may_be_udp:
            faults.append(f"{path}.answer_low_ports: only a udp echo has use for it")
    if config.pools is FAULTY:
        return
    for name, pool in config.pools.items():
        if FAULTY in (pool, getattr(pool, "upstreams", FAULTY)):
            continue
        path = f"{_join('pool', name)}.upstreams"
        if isinstance(pool.source, str) and not _is_ip(pool.source):
            faults.append(f"{_join('pool', name)}.source: expected an IP address, not {_quote(pool.source)}")
        kinds = _kinds(pool)
        if len(kinds) > 1:
            faults.append(f"{path}: datagrams and streams do not mix: all of them are udp:, or none is")
        if (
            kinds == {"udp"}
            and pool.health not in (None, FAULTY)
            and not (pool.health.send and pool.health.expect)
        ):
            faults.append(
                f"{_join('pool', name)}.health: a udp: upstream shows only by an answer: send, expect"
            )
        if not pool.upstreams:
            faults.append(f"{path}: at least one upstream is needed")
        for number, upstream in enumerate(pool.upstreams):
            if FAULTY in (upstream, getattr(upstream, "address", FAULTY)):
                continue
            transport, _, port = upstream.address
            if transport == "udp" and upstream.proxy_protocol not in (None, FAULTY):
                faults.append(f"{path}[{number}].proxy_protocol: datagrams have no connection to introduce")
            if transport == "systemd":
                faults.append(
                    f"{path}[{number}].address: an upstream is HOST:PORT, udp:HOST:PORT or unix:/PATH, not systemd:"
                )
            elif transport != "unix" and not port:
                faults.append(f"{path}[{number}].address: an upstream needs a port from 1 to 65535")


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _kinds(pool: PoolConfig) -> set[str]:
    """`udp`, `stream`, or both: what can be told of the pool's upstreams."""
    found = set()
    for upstream in pool.upstreams if pool.upstreams is not FAULTY else ():
        address = getattr(upstream, "address", FAULTY)
        if upstream is not FAULTY and address is not FAULTY and address.transport != "systemd":
            found.add("udp" if address.transport == "udp" else "stream")
    return found


def _check_kind(path: str, address: Address, name: str, pool: PoolConfig, faults: list[str]) -> None:
    if pool is FAULTY or address.transport == "systemd":
        return
    kinds = _kinds(pool)
    if address.transport == "udp" and "stream" in kinds:
        faults.append(
            f"{path}.pool: a udp listener needs upstreams as in udp:127.0.0.1:53, and {name} has others"
        )
    elif address.transport != "udp" and "udp" in kinds:
        faults.append(f"{path}.pool: {name} has udp: upstreams, which are for a udp listener")


def _check_faults(listener: ListenerConfig, path: str, faults: list[str]) -> None:
    if FAULTY in (listener.address, listener.faults):
        return
    suited = {"udp": FOR_DATAGRAMS, "systemd": (*FOR_STREAMS, *FOR_DATAGRAMS)}.get(
        listener.address.transport, FOR_STREAMS
    )
    labels: dict[str, str] = {}
    for number, fault in enumerate(listener.faults):
        where = f"{path}.faults[{number}]"
        if fault is FAULTY or FAULTY in (fault.name, fault.direction):
            continue
        if not isinstance(fault, suited):
            other = "streams, not datagrams" if suited is FOR_DATAGRAMS else "datagrams, not streams"
            faults.append(f"{where}.type: {_quote(fault.type)} is for {other}")
        first = labels.setdefault(fault.label, where)
        if first != where:
            faults.append(f"{where}.name: {_quote(fault.label)} is the name of {first} already")


def read_struct(kind: type[Struct], raw: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    """An instance of `kind` with FAULTY where a value could not be read."""
    fields = {
        field.encode_name: field
        for field in msgspec.structs.fields(kind)
        if field.name not in NOT_KEYS.get(kind, ())
    }
    faults.extend(
        f"{_join(path, key)}: unknown key{_similar(key, fields)}" for key in raw if key not in fields
    )
    values = {}
    for key, field in fields.items():
        if key in raw:
            values[field.name] = _value(field.type, raw[key], _join(path, key), faults)
        elif field.required:
            faults.append(f"{_join(path, key)}: missing")
            values[field.name] = FAULTY
    return kind(**values)


def _value(kind: Any, raw: Any, path: str, faults: list[str]) -> Any:
    """`raw` as a `kind`, or FAULTY and a fault more."""
    origin, arguments = get_origin(kind), get_args(kind)
    if type(None) in arguments:
        return _value(arguments[0], raw, path, faults)
    if origin is tuple and isinstance(raw, list):
        return tuple(_value(arguments[0], item, f"{path}[{at}]", faults) for at, item in enumerate(raw))
    if origin is dict and isinstance(raw, dict):
        return {key: _value(arguments[1], item, _join(path, key), faults) for key, item in raw.items()}
    if isinstance(kind, UnionType) and kind != Network and isinstance(raw, dict):
        return _tagged(arguments, raw, path, faults)
    if isinstance(kind, type) and issubclass(kind, Struct) and isinstance(raw, dict):
        return read_struct(kind, raw, path, faults)
    if origin is Annotated:
        return _number(kind, raw, path, faults)
    if origin is Literal and raw in arguments:
        return raw
    if (kind is bool and isinstance(raw, bool)) or (kind is str and isinstance(raw, str) and raw):
        return raw
    try:
        if kind is Address and isinstance(raw, str):
            return Address.parse(raw)
        if kind == Network and isinstance(raw, str):
            return ip_network(raw)
        if kind is float and isinstance(raw, str) and (found := DURATION.fullmatch(raw)):
            return _within(float(found[1]) * SECONDS[found[2]], SHORTEST, LONGEST, "1ms", "596h")
        if kind is int and isinstance(raw, str) and (found := SIZE.fullmatch(raw)):
            return _within(int(found[1]) * BYTES[found[2]], 1, LARGEST, "1B", "1GiB")
    except ValueError as error:
        faults.append(f"{path}: {error}")
    else:
        faults.append(f"{path}: expected {_expectation(kind)}, not {_quote(raw)}")
    return FAULTY


def _tagged(kinds: Sequence[type[Struct]], raw: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    """An instance of that one of `kinds` which `type` names."""
    tags = {kind.__struct_config__.tag: kind for kind in kinds}
    tag = raw.get("type")
    if "type" not in raw:
        faults.append(f"{_join(path, 'type')}: missing")
    elif not isinstance(tag, str) or tag not in tags:
        near = _similar(tag, tags) if isinstance(tag, str) else ""
        faults.append(f"{_join(path, 'type')}: expected {_choices(tags)}, not {_quote(tag)}{near}")
    else:
        return read_struct(tags[tag], {key: raw[key] for key in raw if key != "type"}, path, faults)
    return FAULTY


def _number(kind: Any, raw: Any, path: str, faults: list[str]) -> Any:
    """A plain number within its bounds, which stand in the annotation."""
    base, bounds = get_args(kind)
    if (
        not isinstance(raw, bool)
        and isinstance(raw, int if base is int else int | float)
        and raw >= bounds.ge
        and (bounds.le is None or raw <= bounds.le)
    ):
        return base(raw)
    most = f" to {bounds.le}" if bounds.le is not None else " on"
    number = "a whole number" if base is int else "a number"
    faults.append(f"{path}: expected {number} from {bounds.ge}{most}, not {_quote(raw)}")
    return FAULTY


def _within(number: float, least: float, most: float, least_text: str, most_text: str) -> float:
    if not least <= number <= most:
        raise ValueError(f"must be from {least_text} to {most_text}")
    return number


def _expectation(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return _choices(get_args(kind))
    if origin is tuple:
        return "an array of networks" if get_args(kind)[0] == Network else "an array of tables"
    return {
        float: 'a duration such as "60s"',
        int: 'a size such as "64KiB"',
        bool: "true or false",
        str: "text that is not empty",
        Address: 'an address such as "127.0.0.1:7007"',
        Network: 'a network such as "192.0.2.0/24"',
    }.get(kind, "a table")


def _choices(values: Any) -> str:
    *others, last = (_quote(choice) for choice in values)
    return f"{', '.join(others)} or {last}"


def _quote(value: Any) -> str:
    """A TOML value, short and in one line; JSON writes text and numbers as TOML does."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _join(path: str, key: str) -> str:
    name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
    return f"{path}.{name}" if path else name


def _similar(word: str, known: Any) -> str:
    import difflib  # noqa: PLC0415  only a fault pays for it

    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {_quote(near[0])}?)" if near else ""
