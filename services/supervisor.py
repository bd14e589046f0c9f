"""`--engine all`: the three engines side by side, each a process of its own, in the foreground.

Each child is the same command with one engine. A fixed PORT becomes PORT, PORT+1 and PORT+2; port 0
stays 0, so that each takes a free one and says in its `service_ready` which. The children write their
logs themselves, to the same place. This module starts them, stops them together, and tells how it went.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from services.config import ENGINES, ConfigError
from services.core.addresses import Address

# si_code of a signal that the kernel sent (siginfo.h): Ctrl-C on a terminal
SI_KERNEL = 0x80


def spread(listen: Sequence[str]) -> Mapping[str, list[str]]:
    """The --listen flags of each engine. ConfigError if an address cannot be had three times."""
    faults = []
    flags: dict[str, list[str]] = {engine: [] for engine in ENGINES}
    for text in listen:
        try:
            address = Address.parse(text)
        except ValueError as error:
            faults.append(f"--listen: {error}")
            continue
        if address.transport == "systemd":
            faults.append(f"--listen: {text}: one handed over socket cannot serve three engines")
        elif address.port + len(ENGINES) - 1 > 65535:
            faults.append(f"--listen: {text}: three engines need three ports, up to 65535")
        for number, engine in enumerate(ENGINES):
            flags[engine].append(str(_own(address, number, engine)))
    if faults:
        raise ConfigError(faults)
    return flags


def run(commands: Mapping[str, Sequence[str]]) -> int:
    """Runs `triptych ARGUMENTS` for each engine until all have ended; the first exit code that is not 0.

    SIGINT and SIGTERM are passed on. An engine that ends with an error stops the others.
    """
    # blocked, so that none is lost between two waits; the children start with none blocked
    watched = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    running: set[int] = set()
    exit_code = 0
    try:
        for arguments in commands.values():
            running.add(_start(arguments))
        while running:
            caught = signal.sigwaitinfo(watched)
            if caught.si_signo != signal.SIGCHLD:
                # a terminal sends Ctrl-C to every process of its foreground group itself
                if caught.si_code != SI_KERNEL:
                    _send(running, signal.Signals(caught.si_signo))
                continue
            # several may have ended: signals of a kind that wait are merged into one
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if not ended:
                    continue
                running.remove(child)
                code = os.waitstatus_to_exitcode(status)
                if code and not exit_code:
                    # as a shell tells a death by signal
                    exit_code = code if code > 0 else 128 - code
                    _send(running, signal.SIGTERM)
    except BaseException:
        _send(running, signal.SIGTERM)
        raise
    return exit_code


def _own(address: Address, number: int, engine: str) -> Address:
    if address.transport == "unix":
        path = PurePath(address.host)
        return address._replace(host=str(path.with_name(f"{path.stem}.{engine}{path.suffix}")))
    return address._replace(port=address.port + number if address.port else 0)


def _start(arguments: Sequence[str]) -> int:
    # -P and the path of this very package: a folder named `services` where the user happens to stand
    # must not be taken for ours
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-m", "services.cli", *arguments],
        {**os.environ, "PYTHONPATH": path},
        setsigmask=(),
    )


def _send(children: set[int], number: signal.Signals) -> None:
    for child in children:
        os.kill(child, number)
