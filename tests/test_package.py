"""What is handed out: the wheel, the command that it installs, and the example configuration."""

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.config import (
    NOT_KEYS,
    Config,
    FaultsConfig,
    ListenerConfig,
    PoolConfig,
    UpstreamConfig,
    load,
)
from services.core.faults import FOR_DATAGRAMS, FOR_STREAMS, Fault
from services.core.upstreams import Check, Ejection, Queue

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "deploy/triptych.toml"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    [built] = folder.glob("*.whl")
    return built


def run(*command: str, **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_the_wheel_holds_the_two_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {
        str(path.relative_to(ROOT))
        for package in ("services", "comparisons")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # what a test that compares two listings would not miss if it went from both
    assert held >= {"services/py.typed", "comparisons/py.typed", "services/log.schema.json"}
    assert {"redis.recording", "http.recording"} <= {Path(name).name for name in held}


def test_the_wheel_says_what_the_project_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        # the core metadata specification: UTF-8, whatever e-mail says of headers
        metadata = email.message_from_string(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("triptych", PROJECT["version"])
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.11")
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_command_works_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    # before the tree's own packages, with the dependencies of the environment that runs the tests
    environment = {**os.environ, "PYTHONPATH": str(site)}
    module = run(
        sys.executable, "-c", "import services; print(services.__file__)", env=environment, cwd=tmp_path
    )
    assert Path(module.strip()).is_relative_to(site)
    command = str(site / "bin/triptych")
    assert "proxy" in run(command, "--help", env=environment, cwd=tmp_path)
    assert "summary" in run(command, "logs", "--help", env=environment, cwd=tmp_path)
    checked = run(command, "check", "--config", str(EXAMPLE), env=environment, cwd=tmp_path)
    assert checked == f"{EXAMPLE}: ok\n"


def test_the_example_configuration_has_every_key() -> None:
    written = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert written.keys() == keys(Config)
    for section in ("log", "limits", "timeouts"):
        kind = next(field.type for field in msgspec.structs.fields(Config) if field.name == section)
        assert written[section].keys() == keys(kind), section
    assert {key for listener in written["listener"] for key in listener} == keys(ListenerConfig)
    faults = [fault for listener in written["listener"] for fault in listener.get("faults", [])]
    for kind in (*FOR_STREAMS, *FOR_DATAGRAMS):
        own = {key for fault in faults if fault["type"] == kind.__struct_config__.tag for key in fault}
        assert own >= keys(kind) - keys(Fault), kind
    assert {key for fault in faults for key in fault} >= keys(Fault)
    assert written["faults"].keys() == keys(FaultsConfig)
    upstreams = [upstream for pool in written["pool"].values() for upstream in pool["upstreams"]]
    assert {key for upstream in upstreams for key in upstream} == keys(UpstreamConfig)
    [backend] = written["pool"].values()
    assert backend.keys() == keys(PoolConfig)
    assert backend["queue"].keys() == keys(Queue)
    assert backend["eject"].keys() == keys(Ejection)
    assert backend["health"].keys() == keys(Check)


def keys(kind: type[msgspec.Struct]) -> set[str]:
    fields = msgspec.structs.fields(kind)
    return {field.encode_name for field in fields if field.name not in NOT_KEYS.get(kind, ())}


def test_the_example_configuration_calls_default_what_is_default() -> None:
    config, default = load(EXAMPLE), Config()
    assert (config.engine, config.log) == (default.engine, default.log)
    # those without a value as default are limits that somebody must want
    for name in ("buffer", "ipv4_prefix", "ipv6_prefix"):
        assert getattr(config.limits, name) == getattr(default.limits, name)
    # left out, dead_peer is as long as idle
    timeouts = msgspec.structs.replace(default.timeouts, dead_peer=default.timeouts.idle)
    assert msgspec.structs.replace(config.timeouts, lifetime=None) == timeouts
