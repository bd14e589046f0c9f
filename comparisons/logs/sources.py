"""What the user names, as files that DuckDB can read: the names of a command line in, `Source`s out.

A name is a file, `-` for standard input, a pattern (`access.log*`, which is how a rotated set is named),
or a folder that `logs compact` wrote. What a file holds is told by its beginning and not by its name:
gzip, Zstandard, Parquet, or lines. Lines of ours are read where they lie. What wraps ours or is a peer's
(`journalctl -o json`, HAProxy, Zeek) is rewritten into lines of ours in the scratch folder first.

Nothing here decides whether a line is ours: what it does not know, it passes on as it is.
"""

import glob
import gzip
import io
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal, cast

import click
import msgspec
import zstandard

from comparisons.logs.peers import from_haproxy, from_zeek
from comparisons.logs.show import printable

# Our longest line is an engine_fault with its traceback, a few KiB. DuckDB gives up a whole file
# for one line much longer than this, so such a line is cut, which makes it a torn one.
LINE_LIMIT = 1 << 20
# so many lines of a file are looked at to tell whose they are
HEAD = 50

MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}


class Unreadable(click.ClickException):
    """An input that is not there or cannot be read (sysexits.h)."""

    exit_code = os.EX_NOINPUT


class Source(msgspec.Struct, frozen=True):
    """`path` is what DuckDB reads, `name` what the user calls it. `peer` lines were rewritten from a
    peer's, `lines` are to be judged.
    """

    name: str
    path: str
    kind: Literal["lines", "peer", "parquet"]


class Journal(msgspec.Struct):
    """What is read of a line of `journalctl -o json`; a message that is no text is an array of bytes."""

    realtime: str = msgspec.field(name="__REALTIME_TIMESTAMP")
    message: Any = msgspec.field(name="MESSAGE", default=None)


JOURNAL = msgspec.json.Decoder(Journal)


def find(names: Sequence[str], scratch: Path) -> list[Source]:
    """What these names stand for. Unreadable, in one line, if one of them is nothing that can be read."""
    found: list[Source] = []
    for number, name in enumerate(dict.fromkeys(chain.from_iterable(map(_expand, names)))):
        try:
            # names of our own, because DuckDB takes some file names for patterns or URLs
            found += _source(name, scratch / str(number))
        except OSError as error:
            raise Unreadable(
                f"{printable(name)}: {error.strerror or error}; name a log that can be read, or - for stdin"
            ) from error
    return found


def mend(source: Source) -> Source:
    """A copy of a source that DuckDB gave up, as it can read it: decompressed, no line too long."""
    copy = Path(source.path).with_suffix(".mended")
    with Path(source.path).open("rb") as file, copy.open("wb") as whole:
        whole.writelines(line if line.endswith(b"\n") else line + b"\n" for line in lines(file))
    return Source(source.name, str(copy), source.kind)


def lines(file: io.BufferedReader) -> Iterator[bytes]:
    """The lines of a file, compressed or not, each cut at LINE_LIMIT. Where an archive is torn, a line
    that says so takes the place of the rest.
    """
    suffix = _suffix(file.peek())
    reader: IO[bytes] = file
    if suffix == ".gz":
        reader = cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    elif suffix == ".zst":
        reader = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    at_start = True
    while True:
        try:
            part = reader.readline(LINE_LIMIT)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError):
            yield b"(torn archive: the rest cannot be decompressed)\n"
            return
        if not part:
            return
        if at_start:
            yield part
        at_start = part.endswith(b"\n")


def _expand(name: str) -> Iterator[str]:
    path = Path(name)
    if path.is_dir():
        parts = sorted(map(str, path.rglob("*.parquet")))
        if not parts:
            raise Unreadable(
                f"{printable(name)}: a folder without Parquet; name log files, or what compact wrote"
            )
        yield from parts
    elif glob.has_magic(name) and not path.exists():
        matches = sorted(glob.glob(name))  # noqa: PTH207  an absolute pattern is none of Path.glob's
        if not matches:
            raise Unreadable(f"{printable(name)}: no file has such a name; name a log that can be read")
        for match in matches:
            yield from _expand(match)
    else:
        yield name


def _source(name: str, path: Path) -> list[Source]:
    original = Path(name).absolute()
    with click.open_file(name, "rb") as file:
        if name == "-" or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            # a pipe can be read once
            original = path.with_suffix(".piped")
            with original.open("wb") as copy:
                shutil.copyfileobj(file, copy)
    with original.open("rb") as file:
        suffix = _suffix(file.peek())
        head = [] if suffix == ".parquet" else list(islice(lines(file), HEAD))
    if any(unwrapped(line) is not line or translated(line) for line in head):
        return _rewritten(name, original, path)
    link = path.with_suffix(suffix or ".log")
    link.symlink_to(original)
    return [Source(name, str(link), "parquet" if suffix == ".parquet" else "lines")]


def _rewritten(name: str, original: Path, path: Path) -> list[Source]:
    ours, theirs = path.with_suffix(".log"), path.with_suffix(".peer")
    with original.open("rb") as file, ours.open("wb") as to_ours, theirs.open("wb") as to_theirs:
        for line in lines(file):
            text = unwrapped(line)
            peer = translated(text)
            if peer:
                to_theirs.write(msgspec.json.encode(peer) + b"\n")
                # a blank line in its place, so that lines keep their numbers
                text = b""
            to_ours.write(text.rstrip(b"\r\n") + b"\n")
    return [Source(name, str(ours), "lines"), Source(name, str(theirs), "peer")]


def unwrapped(line: bytes) -> bytes:
    """What a line of `journalctl -o json` was told; any other line as it is."""
    if b"__REALTIME_TIMESTAMP" not in line:
        return line
    try:
        message = JOURNAL.decode(line).message
    except msgspec.MsgspecError:
        return line
    # on one line, as ours are; a message that is no text is not ours
    return message.replace("\n", " ").encode() if isinstance(message, str) else line[:]


def translated(line: bytes) -> dict[str, Any] | None:
    return from_zeek(line) if line.startswith(b"{") else from_haproxy(line)


def _suffix(head: bytes) -> str:
    return next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), "")
