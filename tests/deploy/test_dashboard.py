"""The Grafana dashboard: three columns that ask the same of each engine, in queries that Prometheus
understands and that have an answer when the three engines run.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon
from scraping import PATIENCE, connect

from services.config import ENGINES
from services.core.addresses import Address

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "deploy/grafana/triptych.json").read_text(encoding="utf-8")
)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
ROWS = [panel for panel in PANELS if panel["type"] == "row"]
WIDTH = 24  # of Grafana's grid


def questions() -> list[tuple[str, list[dict[str, Any]]]]:
    """Each row's title, and its panels from left to right."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for panel in sorted(PANELS, key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"])):
        if panel["type"] == "row":
            found.append((panel["title"], []))
        else:
            found[-1][1].append(panel)
    return found


def expressions() -> list[str]:
    """Every query, with what Grafana puts in for its variables."""
    queries = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    queries += [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    return [query.replace("$__rate_interval", "5s").replace("$job", "triptych-.*") for query in queries]


def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(expressions())]
    path = tmp_path / "queries.yml"
    # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(rules)} rules found" in done.stdout
    assert "$" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("row", "panels"), [pytest.param(row, panels, id=row) for row, panels in questions()]
)
def test_a_row_asks_the_same_of_each_engine(row: str, panels: list[dict[str, Any]]) -> None:
    assert row.endswith("?")
    assert [panel["gridPos"]["x"] for panel in panels] == [0, 8, 16]
    assert {panel["gridPos"]["w"] for panel in panels} == {8}
    for panel, engine in zip(panels, ENGINES, strict=True):
        assert panel["title"].endswith(engine)
        assert all(f'engine="{engine}"' in target["expr"] for target in panel["targets"])
    alike = [
        json.dumps({key: panel[key] for key in ("type", "fieldConfig", "options", "targets")}).replace(
            f'engine=\\"{engine}\\"', ""
        )
        for panel, engine in zip(panels, ENGINES, strict=True)
    ]
    assert alike[0] == alike[1] == alike[2]


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        assert one["x"] + one["w"] <= WIDTH
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_the_data_source_is_chosen_by_the_reader() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    sources += [variables["job"]["datasource"], *(a["datasource"] for a in DASHBOARD["annotations"]["list"])]
    assert all(source == chosen for source in sources)


# With a real Prometheus -------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def ask_prometheus(port: int, query: str) -> list[float]:
    """The values of an instant query. ConnectionError while it starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return [float(result["value"][1]) for result in answer["data"]["result"]]


def talk(echo: Address, datagrams: Address, proxy: Address) -> None:
    for where in (echo, proxy):
        with connect(where) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"hello", (datagrams.host, datagrams.port))
        assert client.recv(5) == b"hello"


def test_every_panel_has_something_to_show(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Prometheus scrapes daemons of the three engines, under load, and is asked every query."""
    started, targets = [], []
    for engine in ENGINES:
        port, local = free_port(), Address("unix", str(tmp_path / f"{engine}.sock"))
        running = daemon(
            engine,
            [
                {"name": "echo", "address": "127.0.0.1:0", "service": "echo"},
                {"name": "datagrams", "address": "udp:127.0.0.1:0", "service": "echo"},
                {"name": "proxy", "address": "127.0.0.1:0", "service": "proxy", "pool": "itself"},
                {"name": "local", "address": str(local), "service": "echo"},
            ],
            {"itself": [local]},
            {"metrics.address": f"127.0.0.1:{port}"},
        )
        started.append(running.addresses[:3])
        targets.append({"targets": [f"127.0.0.1:{port}"], "labels": {"engine": engine}})
    scrape = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {"job_name": "triptych-proxy", "honor_labels": True, "static_configs": targets},
        ],
    }
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps(scrape), encoding="utf-8")
    port = free_port()
    with (tmp_path / "prometheus.log").open("wb") as log:
        prometheus = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    # an annotation marks restarts: there are none
    [restarts] = [query for query in expressions() if query.startswith("changes(")]
    unanswered = [query for query in expressions() if query != restarts]
    try:
        deadline = time.monotonic() + 3 * PATIENCE
        while unanswered and time.monotonic() < deadline:
            for addresses in started:
                talk(*addresses)
            time.sleep(0.2)
            with suppress(ConnectionError, urllib.error.URLError):
                unanswered = [
                    query
                    for query in unanswered
                    if not (values := ask_prometheus(port, query)) or any(map(math.isnan, values))
                ]
        assert not unanswered
        assert ask_prometheus(port, restarts) == []
        assert ask_prometheus(port, "sum(up)") == [3]
        assert ask_prometheus(port, 'count(up{exported_engine!=""})') == []
        for name in set(re.findall(r"triptych_\w+", "".join(expressions()))):
            assert len(ask_prometheus(port, f"count by (engine) ({name})")) == len(ENGINES), name
    finally:
        os.kill(prometheus.pid, signal.SIGTERM)
        prometheus.wait(PATIENCE)
