"""What the measured window cost: CPU time and memory of the daemon, CPU time of the load, latencies."""

import time
from array import array
from pathlib import Path

from hdrh.histogram import HdrHistogram

from comparisons.load.job import Latency, Outcome


class Meter:
    """Reads one daemon (or none) from outside, through the kernel."""

    def __init__(self, daemon: int | None) -> None:
        self.daemon = daemon
        # clock_getcpuclockid(3) has no Python name; this is the kernel's encoding of "scheduled time of process
        # PID" (MAKE_PROCESS_CPUCLOCK, linux/posix-timers.h). Against /proc/PID/stat it counts nanoseconds, not
        # ticks of 10 ms, and it includes the threads that have ended.
        self._cpu_clock = None if daemon is None else (~daemon << 3) | 2
        self._started = self._load_cpu = self._daemon_cpu = 0

    def _daemon_cpu_ns(self) -> int:
        return 0 if self._cpu_clock is None else time.clock_gettime_ns(self._cpu_clock)

    def open_window(self) -> int:
        """Start counting; returns the time in nanoseconds."""
        self._daemon_cpu = self._daemon_cpu_ns()
        self._load_cpu = time.process_time_ns()
        self._started = time.perf_counter_ns()
        return self._started

    def close_window(self, outcome: Outcome) -> None:
        """Stop counting and write the costs into `outcome`; memory as it is now."""
        outcome.seconds = (time.perf_counter_ns() - self._started) / 1e9
        outcome.load_cpu_us = (time.process_time_ns() - self._load_cpu) // 1000
        if self.daemon is not None:
            outcome.daemon_cpu_us = (self._daemon_cpu_ns() - self._daemon_cpu) // 1000
            outcome.pss_bytes = self.pss()

    def pss(self) -> int | None:
        """Proportional set size in bytes: what the daemon's pages cost, shared ones in shares."""
        if self.daemon is None:
            return None
        return _number(Path(f"/proc/{self.daemon}/smaps_rollup"), "Pss:") * 1024

    def threads(self) -> int | None:
        """How many there are now: to be asked while the sessions are open."""
        if self.daemon is None:
            return None
        return _number(Path(f"/proc/{self.daemon}/status"), "Threads:")


def _number(path: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))


def latency(nanoseconds: "array[int]", count: int) -> Latency | None:
    """Percentiles of the first `count` values. Fed after the window, so that recording costs it nothing."""
    if not count:
        return None
    histogram = HdrHistogram(1, 60_000_000_000, 3)
    for value in nanoseconds[:count]:
        histogram.record_value(value)
    p50, p90, p99 = (histogram.get_value_at_percentile(p) / 1000 for p in (50, 90, 99))
    return Latency(p50=p50, p90=p90, p99=p99, max=histogram.get_max_value() / 1000)
