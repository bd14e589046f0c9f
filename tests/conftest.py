"""The fixtures of every suite that runs daemons: the three engines, and real processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemons import Daemon, configuration

from services.core.addresses import Address

StartDaemon = Callable[..., Daemon]
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process of pytest-xdist runs: a module's tests, those of each engine by themselves; and
    all that boots a machine, since each machine has the same ports of this host.
    """
    for item in items:
        path = item.path.relative_to(TESTS)
        engine = (
            item.callspec.params.get("engine", "")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else ""
        )
        group = path.parts[0] if path.parts[0] == "deploy" else f"{path} {engine}"
        item.add_marker(pytest.mark.xdist_group(group))


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
