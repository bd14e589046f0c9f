"""The fixtures of every suite that runs daemons: the three engines, and real processes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from daemons import Daemon, configuration
from xdist.scheduler import LoadScopeScheduling

from services.core.addresses import Address

StartDaemon = Callable[..., Daemon]


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist ships no types
    """What one process of pytest-xdist runs: a module's tests, those of each engine by themselves; and
    all that boots a machine, since each machine has the same ports of this host.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        if path.startswith("tests/deploy/"):
            return "tests/deploy"
        engine = re.search(r"[\[-](blocking|nonblocking|twisted)[-\]]", test)
        return f"{path} {engine[1] if engine else ''}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, id=name) for name in ("blocking", "nonblocking", "twisted")],
)
def engine(request: pytest.FixtureRequest) -> str:
    """A test that asks for it runs once with every engine."""
    name: str = request.param
    return name


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Starts daemons that live as long as the test; each is stopped and checked at its end."""
    with ExitStack() as stack:

        def start(
            engine: str,
            listeners: Sequence[Mapping[str, object]],
            pools: Mapping[str, Sequence[Address]] | None = None,
            settings: Mapping[str, object] | None = None,
            prefix: Sequence[str] = (),
        ) -> Daemon:
            config = configuration(engine, listeners, pools, settings)
            started = Daemon(tmp_path_factory.mktemp("daemon"), config, prefix)
            stack.callback(started.stop)
            return started

        yield start
