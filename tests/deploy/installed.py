"""Fixtures: the booted machine, with Triptych installed in it as an operator would, and the figures that
tests tell. A plugin that each module here asks for, since a second conftest.py would be a second module
of that name.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import DROP_INS, LOGS, ROOT, Machine, debian, logs, run, whole

FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("measured on a booted systemd")
        for figure in config.stash[FIGURES]:
            terminalreporter.line(figure)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A figure for the end of the test run."""
    return request.config.stash[FIGURES].append


@pytest.fixture(scope="session")
def root() -> Path:
    return debian()


@pytest.fixture(scope="session")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triptych and all it needs as wheels, for the Python of the machine."""
    folder = tmp_path_factory.mktemp("wheels")
    version = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    [wheel] = folder.iterdir()
    run(*pip, "download", "--only-binary=:all:", f"--python-version={version}", "--dest", folder, wheel)
    return folder


@pytest.fixture(scope="session")
def booted(root: Path, wheels: Path) -> Iterator[Machine]:
    machine = Machine(root, [ROOT / "deploy", wheels])
    try:
        machine(ROOT / "deploy/install", "--wheels", wheels)
        yield machine
    finally:
        machine.off()


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The machine as it was installed, with nothing of Triptych running, before and after the test.

    However a test went, every log of it has to be whole: lines that are JSON, numbered without a gap,
    none dropped and no fault of our own.
    """
    yield booted
    booted("systemctl", "stop", "triptych*")
    try:
        for log in logs(booted).values():
            whole(log)
    finally:
        for log_folder in (LOGS, "/var/log/triptych"):
            shutil.rmtree(booted.path(log_folder), ignore_errors=True)
        # not the folder itself: that it is there says that systemd runs (sd_booted(3))
        for folder in booted.path(DROP_INS).glob("triptych*"):
            shutil.rmtree(folder)
        for name in ("echo", "proxy", "shadow"):
            booted("cp", ROOT / f"deploy/config/{name}.toml", f"/etc/triptych/{name}.toml")
        booted("systemctl", "daemon-reload")
        booted("systemctl", "reset-failed", "triptych*")
