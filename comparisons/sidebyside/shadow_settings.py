"""What `triptych shadow` is told: by flags, by a TOML file with the same names, or both, flags first.

The struct is the specification, and the walker of the daemons' own configuration reads it: durations and
sizes are text with a unit, and all faults are found at once, each with its flag or its key of the file.

    listen = "127.0.0.1:6380"
    upstream = "127.0.0.1:6379"
    answer = "nonblocking"
    normalise = ["Date: .*", "id=[0-9]+=>id"]
    log = "/var/log/triptych/shadow.jsonl"
    [shadow-upstream]
    control = "127.0.0.1:6401"
    blocking = "127.0.0.1:6402"
    twisted = "127.0.0.1:6403"

How long one run takes is no matter of the set-up: `--time` and `--sessions` are flags alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from comparisons.sidebyside.streams import Normaliser
from services.config import ENGINES, FAULTY, ConfigError, EngineName, document, read_struct
from services.core.addresses import Address

CONTROL = "control"
# a chunk of each side and the line that it ends in
LEAST_BUFFER = 128 * 1024


class Settings(Struct, frozen=True, kw_only=True):
    """`buffer` is in bytes; `patience` and `drain` are seconds; `shadow_upstream` is by engine or "control"."""

    listen: Address
    upstream: Address
    shadow_upstream: dict[str, Address] = msgspec.field(name="shadow-upstream", default_factory=dict)
    answer: EngineName = "nonblocking"
    normalise: tuple[str, ...] = ()
    buffer: int = 16 * 1024**2
    patience: float = 10.0
    drain: float = 30.0
    log: str | None = None
    keep: str | None = None

    def names(self) -> dict[str, tuple[str, Address]]:
        """The answering engine, the control and the shadows: their engines and upstreams."""
        engines: dict[str, EngineName] = {CONTROL: self.answer}
        engines.update((name, name) for name in ENGINES if name != self.answer)
        others = {
            name: (engine, self.shadow_upstream.get(name, self.upstream)) for name, engine in engines.items()
        }
        return {self.answer: (self.answer, self.upstream), **others}

    def normalisers(self) -> list[Normaliser]:
        return [Normaliser.parse(text) for text in self.normalise]


class SettingsError(Exception):
    """`faults`: one line each; `of_file`: whether one of them is in the file."""

    def __init__(self, faults: Sequence[str], *, of_file: bool) -> None:
        super().__init__("; ".join(faults))
        self.faults, self.of_file = faults, of_file


def read(path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """The settings in the file, if there is one, with the flags in place of its keys. SettingsError."""
    try:
        written = document(path) if path else {}
    except ConfigError as error:
        raise SettingsError([f"{path}: {fault}" for fault in error.faults], of_file=True) from error
    found: list[str] = []
    settings: Settings = read_struct(Settings, {**written, **flags}, "", found)
    _check(settings, found)
    if not found:
        return settings
    faults, of_file = [], False
    for fault in found:
        key = re.split(r"[:.\[]", fault, maxsplit=1)[0]
        if path and key not in flags:
            of_file = True
            faults.append(f"{path}: {fault}")
        else:
            faults.append("--" + re.sub(r"^([\w-]+)(\[\d+\]|\.\w+)*:", r"\1:", fault))
    raise SettingsError(faults, of_file=of_file)


def _check(settings: Settings, faults: list[str]) -> None:
    """What no single key can tell; a value that could not be read is not complained of twice."""
    listen, answer = settings.listen, settings.answer
    if listen is not FAULTY and listen.transport == "udp":
        faults.append(f"listen: {listen}: a shadow compares streams, so not udp:")
    upstreams = {"upstream": settings.upstream}
    if settings.shadow_upstream is not FAULTY:
        known = [CONTROL, *(name for name in ENGINES if name != answer)]
        for name, upstream in settings.shadow_upstream.items():
            upstreams[f"shadow-upstream.{name}"] = upstream
            if answer is not FAULTY and name not in known:
                why = "answers, from upstream" if name == answer else f"is none of {', '.join(known)}"
                faults.append(f"shadow-upstream.{name}: {name} {why}")
    for key, upstream in upstreams.items():
        if upstream is FAULTY:
            continue
        if upstream.transport in {"udp", "systemd"} or (upstream.transport == "tcp" and not upstream.port):
            faults.append(f"{key}: {upstream}: an upstream is HOST:PORT or unix:/PATH")
    if settings.normalise is not FAULTY:
        for number, text in enumerate(settings.normalise):
            if text is not FAULTY:
                try:
                    Normaliser.parse(text)
                except ValueError as error:
                    faults.append(f"normalise[{number}]: {error}")
    if settings.buffer is not FAULTY and settings.buffer < LEAST_BUFFER:
        faults.append(f"buffer: must be at least {LEAST_BUFFER // 1024}KiB")
