"""One load process: reads a job from standard input, runs it, prints the outcome, ends.

It is started together with the daemon it will load, so that neither waits for the other's imports.
"""

import errno
import sys
from collections.abc import Callable

import msgspec

from comparisons.load import bulk, burst, replay, round_trips
from comparisons.load.job import Broken, Job, Kind, Outcome
from comparisons.load.meter import Meter

LOADS: dict[Kind, Callable[[Job, Meter], Outcome]] = {
    "round_trips": round_trips.run,
    "bulk": bulk.run,
    "burst": burst.run,
    "idle": burst.run_idle,
    "replay": replay.run,
}


def run(job: Job) -> Outcome:
    try:
        return LOADS[job.kind](job, Meter(job.daemon))
    except Broken as broken:
        return Outcome(fault=str(broken))
    except TimeoutError:
        return Outcome(fault="a connection stood still for 5 s")
    except (OSError, ValueError) as error:
        name = errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None
        return Outcome(fault=f"the load met {name or type(error).__name__}: {error}")


if __name__ == "__main__":
    line = sys.stdin.readline()
    if line:  # empty: whoever started us is gone, or has no use for us
        sys.stdout.write(msgspec.json.encode(run(msgspec.json.decode(line, type=Job))).decode() + "\n")
