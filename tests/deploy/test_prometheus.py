"""The scrape configuration and the alerts: valid, tested by Prometheus' own tool, and about metrics
and ports that there are.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Daemon
from scraping import ask, series

from services.config import ENGINES
from services.core.addresses import Address

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPE = (DEPLOY / "prometheus/scrape.yml").read_text(encoding="utf-8")
ALERTS = (DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8")
ALERT_TESTS = (DEPLOY / "prometheus/alerts.test.yml").read_text(encoding="utf-8")
ALERT_NAMES = re.findall(r"- alert: (\w+)", ALERTS)
UNITS = {path.name.removesuffix("-metrics@.socket") for path in (DEPLOY / "units").glob("*-metrics@.socket")}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("check config scrape.yml", id="scrape configuration"),
        pytest.param("check rules alerts.yml", id="rules"),
        pytest.param("test rules alerts.test.yml", id="what the rules do"),
    ],
)
def test_promtool_accepts(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=DEPLOY / "prometheus",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout
    assert "FAILED" not in done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERT_NAMES)
def test_each_alert_is_seen_to_fire_and_not_to_fire(alert: str) -> None:
    quiet = re.findall(rf"\{{ eval_time: \w+, alertname: {alert} \}}", ALERT_TESTS)
    fires = re.findall(rf"alertname: {alert}\n +exp_alerts:\n +- exp_labels", ALERT_TESTS)
    assert quiet
    assert fires


def test_alerts_are_about_metrics_that_there_are(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    where = Address("unix", str(tmp_path / "m.sock"))
    daemon(
        "nonblocking",
        [{"name": "echo", "address": "127.0.0.1:0", "service": "echo"}],
        settings={"metrics.address": str(where)},
    )
    exposed = {name for name, _ in series(ask(where).body)}
    # it has no series before a session has ended
    exposed.add("triptych_sessions_closed_total")
    expressions = "".join(re.findall(r"expr: (.*?)(?:\n +(?:for|labels):)", ALERTS, re.DOTALL))
    assert expressions.count("triptych_") >= 10
    used = set(re.findall(r"\b(?:triptych|process)_\w+", expressions))
    assert used <= exposed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("unit", sorted(UNITS))
def test_the_targets_are_the_units_metrics_ports(unit: str, engine: str) -> None:
    [drop_in] = (DEPLOY / f"units/{unit}-metrics@{engine}.socket.d").iterdir()
    [target] = re.findall(r"ListenStream=(.+)", drop_in.read_text(encoding="utf-8"))
    [job] = re.findall(rf"- job_name: {unit}\n(.*?)(?=\n  - job_name|\Z)", SCRAPE, re.DOTALL)
    assert f'- targets: ["{target}"]\n        labels: {{ engine: {engine} }}\n' in job + "\n"


def test_each_job_is_a_unit() -> None:
    assert set(re.findall(r"job_name: ([\w-]+)", SCRAPE)) == UNITS
