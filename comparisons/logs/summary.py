"""What is in a log: how many sessions of each engine, how they ended, how long everything took.

Only a `session_closed` line is a session. Sessions that were opened and whose end is not in these
files, clients that were refused, lines that are not ours and lines that are missing are counted
beside them, so that the summary of a damaged log looks like one.
"""

from collections.abc import Sequence

from duckdb import DuckDBPyConnection
from msgspec import Struct

from comparisons.logs.reader import Fault, open_logs

TIMERS = (
    "accept_wait_us",
    "connect_us",
    "first_byte_us",
    "duration_us",
    "max_gap_us",
    "paused_us",
    "loop_lag_us",
    "client_rtt_us",
    "upstream_rtt_us",
)
AMOUNTS = ("bytes_c2s", "bytes_s2c", "datagrams_c2s", "datagrams_s2c")
# so many lines that are not ours are quoted, enough to see what they are
QUOTED = 5


class Timer(Struct, frozen=True):
    """Microseconds, of the `sessions` that reached this timer and whose model can see it.

    Exact quantiles by nearest rank: p90 is the smallest value that at least 90 % of the
    sessions do not exceed (DuckDB's `quantile_disc`), always one that was measured.
    """

    sessions: int
    p50: int
    p90: int
    p99: int


class Ending(Struct, frozen=True):
    """So many sessions ended in this way."""

    state: str
    termination: str
    sessions: int


class Engine(Struct, frozen=True, kw_only=True):
    """One engine's sessions. A timer that no session has is not in `timers`, and `datagrams_` are
    null if no session was UDP. `refused` clients never became a session.
    """

    engine: str
    sessions: int
    refused: int
    bytes_c2s: int
    bytes_s2c: int
    datagrams_c2s: int | None
    datagrams_s2c: int | None
    endings: list[Ending]
    timers: dict[str, Timer]


class Process(Struct, frozen=True):
    """`lines` of one process were read; `missing` is how many its `seq` says were between them.

    A process that began again under the same pid (in a container it always does) counts as the
    same. What is lost before its first and after its last line leaves no gap.
    """

    engine: str
    pid: int
    worker: int
    lines: int
    missing: int


class Summary(Struct, frozen=True, kw_only=True):
    """`lines` were read, of which `foreign` are not ours: torn, or another program's. `first` and
    `last` are the timestamps between which our lines lie; `unclosed` sessions have a line and no end.
    """

    files: list[str]
    lines: int
    foreign: int
    faults: list[Fault]
    first: str | None
    last: str | None
    sessions: int
    unclosed: int
    engines: list[Engine]
    processes: list[Process]


def summarize(files: Sequence[str]) -> Summary:
    """The summary of these files; `-` is standard input. OSError if one cannot be read."""
    with open_logs(files) as logs:
        sql = logs.sql
        # the files are read once, and only what is asked for below is kept
        sql.execute(
            "CREATE TABLE told AS SELECT "  # noqa: S608 -- our own constants
            "ours, timestamp, event, engine, pid, worker, seq, session, refused, "
            f"state, termination, {', '.join((*AMOUNTS, *TIMERS))} FROM lines"
        )
        [(lines, foreign)] = sql.execute("SELECT count(*), count(*) FILTER (NOT ours) FROM told").fetchall()
        sql.execute("DELETE FROM told WHERE NOT ours")
        [(first, last)] = sql.execute("SELECT min(timestamp), max(timestamp) FROM told").fetchall()
        sql.execute("CREATE VIEW closed AS SELECT * FROM told WHERE event = 'session_closed'")
        [(unclosed,)] = sql.execute(
            "SELECT count(DISTINCT session) FROM told ANTI JOIN closed USING (session) "
            "WHERE event IN ('session_opened', 'session_progress')"
        ).fetchall()
        engines = _engines(sql)
        return Summary(
            files=list(files),
            lines=lines,
            foreign=foreign,
            faults=logs.faults(QUOTED) if foreign else [],
            first=first,
            last=last,
            sessions=sum(engine.sessions for engine in engines),
            unclosed=unclosed,
            engines=engines,
            processes=_processes(sql),
        )


def _engines(sql: DuckDBPyConnection) -> list[Engine]:
    endings: dict[str, list[Ending]] = {}
    for engine, *ending in sql.execute(
        "SELECT engine, state, termination, count(*) FROM closed GROUP BY ALL "
        "ORDER BY count(*) DESC, state, termination"
    ).fetchall():
        endings.setdefault(engine, []).append(Ending(*ending))

    timers: dict[str, dict[str, Timer]] = {}
    for engine, timer, sessions, quantiles in sql.execute(
        "SELECT engine, timer, count(*), quantile_disc(us, [0.5, 0.9, 0.99]) "  # noqa: S608 -- our own constants
        f"FROM (UNPIVOT closed ON {', '.join(TIMERS)} INTO NAME timer VALUE us) "
        "GROUP BY engine, timer"
    ).fetchall():
        timers.setdefault(engine, {})[timer] = Timer(sessions, *quantiles)

    is_session = "FILTER (event = 'session_closed')"
    sums = ", ".join(f"sum({amount}) {is_session}" for amount in AMOUNTS)
    rows = sql.execute(
        f"SELECT engine, count(*) {is_session} AS sessions, "  # noqa: S608 -- our own constants
        f"coalesce(sum(refused) FILTER (event = 'session_refused'), 0) AS clients, {sums} "
        "FROM told GROUP BY engine HAVING sessions > 0 OR clients > 0 ORDER BY engine"
    ).fetchall()
    return [
        Engine(
            engine=engine,
            sessions=sessions,
            refused=refused,
            bytes_c2s=bytes_c2s or 0,
            bytes_s2c=bytes_s2c or 0,
            datagrams_c2s=datagrams_c2s,
            datagrams_s2c=datagrams_s2c,
            endings=endings.get(engine, []),
            timers=timers.get(engine, {}),
        )
        for engine, sessions, refused, bytes_c2s, bytes_s2c, datagrams_c2s, datagrams_s2c in rows
    ]


def _processes(sql: DuckDBPyConnection) -> list[Process]:
    # A process numbers from 0, so each 0 is another run under this pid. Runs follow each other in
    # time, whatever order rotated files are named in; within a run two threads may stamp their lines
    # in one order and number them in the other, so there the numbers count and not their order.
    rows = sql.execute(
        "WITH starts AS (SELECT engine, pid, worker, timestamp, timestamp AS start FROM told WHERE seq = 0), "
        "runs AS (SELECT engine, pid, worker, start, count(*) AS lines, "
        "max(seq)::HUGEINT - min(seq) + 1 - count(DISTINCT seq) AS missing "
        "FROM told ASOF LEFT JOIN starts USING (engine, pid, worker, timestamp) GROUP BY ALL) "
        "SELECT engine, pid, worker, sum(lines), sum(missing) FROM runs GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    return [Process(*row) for row in rows]
