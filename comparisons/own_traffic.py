"""The user's own traffic: any real client, through each engine and directly, in shuffled order.

What such a client sends is not known, so its bytes cannot be checked; its exit status is
compared with that of the direct run, and the daemon's log has to agree with itself.
"""

import os
import random
import select
import shlex
import socket
import time
from collections.abc import Iterator, Sequence

import msgspec

from comparisons import daemon_log
from comparisons.results import Run
from comparisons.runner import Bench, end_group
from comparisons.subjects import Subject, SubjectFailed
from services.core.addresses import Address

KEPT_LINES = 5  # of what a failed client said


class Traffic(msgspec.Struct, frozen=True):
    """The user's command, the server it is meant for, and the seconds after which a run is ended."""

    command: str
    upstream: str
    limit: float


class Unusable(Exception):  # noqa: N818  it is not the program's error
    """The client cannot be started, or the server cannot be reached; one line."""


def words(command: str, address: str) -> list[str]:
    """The command as a shell would split it, with {host} and {port} replaced and nothing else interpreted."""
    target = Address.parse(address)
    replaced = {"{host}": target.host, "{port}": str(target.port)}
    parts = shlex.split(command)
    for name, value in replaced.items():
        parts = [part.replace(name, value) for part in parts]
    return parts


def reach(upstream: str) -> None:
    """Unusable if nobody answers there: better said once than by every client."""
    target = Address.parse(upstream)
    try:
        socket.create_connection((target.host, target.port), 5).close()
    except OSError as error:
        raise Unusable(f"--upstream: {upstream} cannot be reached: {error.strerror or error}") from error


def run_round(
    bench: Bench,
    number: int,
    subjects: Sequence[Subject],
    traffic: Traffic,
    order: random.Random,
) -> Iterator[Run]:
    """One run through every subject; the last of them is the floor, whose exit status is the right one."""
    floor = subjects[-1]
    shuffled = list(subjects)
    order.shuffle(shuffled)
    runs = [
        _run(bench, Run(subject=subject.name, round=number, place=place), subject, traffic)
        for place, subject in enumerate(shuffled, 1)
    ]
    direct = next(run for run in runs if run.subject == floor.name)
    for run in runs:
        # a client that fails directly too may fail with another status behind a proxy
        if not run.broken and (run.status == 0) != (direct.status == 0):
            run.broken = f"{_status(run)}, direct {_status(direct)}"
        if not run.broken and run.wall_s and direct.wall_s:
            run.ratio = run.wall_s / direct.wall_s
    yield from runs


def _run(bench: Bench, run: Run, subject: Subject, traffic: Traffic) -> Run:
    running = bench.start(subject, "proxy", traffic.upstream)
    try:
        _run_client(bench, run, words(traffic.command, running.address()), traffic.limit)
        if died := running.died():
            raise SubjectFailed(died)  # noqa: TRY301  one way out of a run
        run.log = running.finish()
        if run.log is not None:
            # against itself: the totals have to be those of the lines
            run.broken = daemon_log.disagreement(
                run.log, run.log.closed, run.log.total_bytes_c2s, run.log.total_bytes_s2c
            )
    except SubjectFailed as failure:
        run.broken = str(failure)
    finally:
        running.kill()
    return run


def _run_client(bench: Bench, run: Run, arguments: list[str], limit: float) -> None:
    output = bench.folder() / "output"
    with output.open("wb") as file:
        begun = time.monotonic()
        try:
            process = bench.client(arguments, file)
        except OSError as error:
            raise Unusable(
                f"--client: {arguments[0]} cannot be started: {os.strerror(error.errno or 0)}"
            ) from error
        # wait(timeout) of subprocess looks in growing steps of up to 50 ms: too coarse for a short client
        descriptor = os.pidfd_open(process.pid)
        ended, _, _ = select.select([descriptor], [], [], limit)
        run.wall_s = time.monotonic() - begun
        os.close(descriptor)
        if ended:
            run.status = process.wait()
        else:
            end_group(process)
    if run.status != 0:
        said = output.read_bytes()[-4096:].decode(errors="replace")
        run.last_lines = [line for line in said.splitlines() if line.strip()][-KEPT_LINES:]


def _status(run: Run) -> str:
    return "ended at the time limit" if run.status is None else f"exit {run.status}"
