"""The load: its latencies, its bytes, and its upstream, without any engine between them."""

import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator

import msgspec
import pytest

from comparisons.load.__main__ import run
from comparisons.load.job import Job, Kind, Outcome
from comparisons.load.meter import Meter, latency
from comparisons.load.pattern import PERIOD, messages, pattern
from comparisons.runner import Bench, Cores, end


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(Cores.choose(), 7, 0.05) as bench:
        yield bench


def test_percentiles_are_those_of_the_values_to_three_digits() -> None:
    source = random.Random(1)  # noqa: S311  the same values every time
    values = [int(source.lognormvariate(12, 1)) for _ in range(20_000)]
    found = latency(array("q", [*values, 10**12]), len(values))
    assert found is not None
    exact = statistics.quantiles(values, n=100, method="inclusive")
    for told, percent in ((found.p50, 50), (found.p90, 90), (found.p99, 99)):
        assert told * 1000 == pytest.approx(exact[percent - 1], rel=0.003)
    # what lies behind the count has not been measured
    assert found.max * 1000 == pytest.approx(max(values), rel=0.001)


def test_no_values_have_no_percentiles() -> None:
    assert latency(array("q"), 0) is None


def test_the_pattern_is_told_by_its_seed_and_has_a_prime_period() -> None:
    assert pattern(1) == pattern(1)
    assert pattern(1) != pattern(2)
    assert all(PERIOD % divisor for divisor in range(2, 512))
    texts = messages(1, 64)
    assert len(set(texts)) == len(texts) == 1024
    assert len(messages(1, 2**20)) == 128


@pytest.mark.parametrize(
    ("kind", "upstream", "connections", "size"),
    [
        pytest.param("round_trips", "echo", 1, 64, id="one client"),
        pytest.param("round_trips", "echo", 16, 2**20, id="messages larger than a socket buffer"),
        pytest.param("bulk", "source", 1, 64, id="bulk"),
        pytest.param("burst", "echo", 1, 64, id="burst"),
        pytest.param("idle", "echo", 200, 64, id="idle"),
    ],
)
def test_a_load_against_its_own_upstream(
    bench: Bench, kind: Kind, upstream: str, connections: int, size: int
) -> None:
    job = Job(
        kind=kind,
        address=bench.upstreams[upstream],
        connections=connections,
        size=size,
        seconds=0.05,
        seed=bench.seed,
    )
    outcome = run(job)
    assert outcome.fault is None
    assert outcome.sessions >= connections
    assert outcome.payload_bytes > 0
    if kind == "bulk":
        assert outcome.bytes_received == outcome.bytes_sent // 8 * 64 * PERIOD
    else:
        assert outcome.bytes_received == outcome.bytes_sent == outcome.exchanges * size


def test_a_client_that_does_not_read_gets_everything_in_the_end(bench: Bench) -> None:
    job = Job(kind="round_trips", address=bench.upstreams["echo"], connections=2, stalled=True, seconds=0.1)
    outcome = run(job)
    assert outcome.fault is None
    assert outcome.absorbed_bytes is not None
    assert outcome.absorbed_bytes > 2**20
    assert outcome.bytes_received == outcome.absorbed_bytes + outcome.exchanges * 64


def run_process(bench: Bench, job: Job) -> Outcome:
    """The same in a process of its own, as a comparison does: what a fault leaves open ends with it."""
    process = bench.process(["-m", "comparisons.load"], bench.cores.load)
    answer, _ = process.communicate(msgspec.json.encode(job) + b"\n", 10)
    return msgspec.json.decode(answer, type=Outcome)


def test_bytes_of_another_seed_are_a_fault(bench: Bench) -> None:
    job = Job(kind="bulk", address=bench.upstreams["source"], seconds=0.05, seed=bench.seed + 1)
    assert run_process(bench, job).fault == f"wrong bytes between byte 0 and the {PERIOD} that follow"


def test_nobody_there_is_a_fault_not_a_crash(bench: Bench) -> None:
    fault = run_process(bench, Job(kind="round_trips", address="127.0.0.1:1")).fault
    assert fault is not None
    assert "ECONNREFUSED" in fault


def test_the_meter_counts_the_processor_time_of_another_process(bench: Bench) -> None:
    spinning = bench.process(["-c", "while True: pass"], bench.cores.load)
    idle = bench.process(["-c", "input()"], bench.cores.load)
    time.sleep(0.3)  # both have started
    spent = {}
    for process in (spinning, idle):
        meter = Meter(process.pid)
        outcome = Outcome()
        meter.open_window()
        time.sleep(0.2)
        meter.close_window(outcome)
        spent[process] = outcome.daemon_cpu_us or 0
        assert outcome.pss_bytes is not None
        assert outcome.pss_bytes > 2**20
        assert meter.threads() == 1
        end(process)
    assert spent[spinning] > 50_000  # of 200,000: others use this machine too
    assert spent[idle] < 5_000


def test_a_load_process_imports_nothing_heavy() -> None:
    # a load process starts for every cell: what it imports is paid a hundred times
    heavy = {"twisted", "rich", "plotly", "click", "structlog", "duckdb"}
    code = f"import sys, comparisons.load.__main__; print({heavy!r} & {{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
