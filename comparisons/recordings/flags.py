"""What the commands of recordings share: flags in the units of the configuration, and files that may be bad."""

import os
import re
from io import FileIO

import click

from comparisons.recordings.format import Recording, load
from services.config import BYTES, LARGEST, SIZE
from services.core.addresses import Address

SHOWN_DAMAGE = 5  # parts of a file that are named one by one


def listener(text: str) -> Address:
    """Where clients connect: HOST:PORT or unix:/PATH."""
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if address.transport in {"udp", "systemd"}:
        raise click.BadParameter(f"{text!r}: conversations are on HOST:PORT or unix:/PATH")
    return address


def upstream(text: str) -> Address:
    """Where a server is."""
    address = listener(text)
    if address.transport == "tcp" and not address.port:
        raise click.BadParameter(f"{text!r}: a server needs a port from 1 to 65535")
    return address


def size(text: str) -> int:
    """Bytes, from text such as 64MiB."""
    found = SIZE.fullmatch(text)
    if not found or not 0 < (number := int(found[1]) * BYTES[found[2]]) <= LARGEST:
        raise click.BadParameter(f"{text!r} is no size up to 1GiB, as in 64MiB")
    return number


def regex(text: str) -> re.Pattern[bytes]:
    """A regular expression over bytes."""
    try:
        pattern = re.compile(os.fsencode(text))
    except (re.error, OverflowError, RecursionError) as error:
        raise click.BadParameter(f"{text!r} is no regular expression: {error}") from error
    if pattern.fullmatch(b""):
        raise click.BadParameter(f"{text!r} matches nothing at all, so it would match everywhere")
    return pattern


class NoInput(click.ClickException):
    """A file that is not there or cannot be read (sysexits.h)."""

    exit_code = os.EX_NOINPUT


class NoRecording(click.ClickException):
    """A file that holds no recording (sysexits.h)."""

    exit_code = os.EX_DATAERR


def created(path: str) -> FileIO:
    """A new file for what others said: nobody else may read it, and nothing is overwritten."""
    try:
        return FileIO(path, "xb", opener=lambda name, how: os.open(name, how, 0o600))
    except FileExistsError as error:
        raise click.UsageError(f"{path} exists; remove it or name another") from error


def opened(name: str) -> Recording:
    """The recording of that name or path with something in it; what of it is damaged is told on stderr."""
    try:
        recording = load(name)
    except OSError as error:
        raise NoInput(
            f"{name}: {error.strerror}; name a recording, as `triptych record` writes them"
        ) from error
    except ValueError as error:
        raise NoRecording(f"{error}; name a file that `triptych record` wrote") from error
    for damage in recording.damaged[:SHOWN_DAMAGE]:
        click.echo(f"triptych: {name}: byte {damage.offset}: {damage.reason}", err=True)
    if recording.damaged:
        more = len(recording.damaged) - SHOWN_DAMAGE
        click.echo(
            f"triptych: {name}: {f'{more} more damaged parts; ' if more > 0 else ''}"
            f"the {len(recording.conversations)} conversations that can be read are used",
            err=True,
        )
    return recording
