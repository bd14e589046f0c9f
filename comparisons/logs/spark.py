"""Spark as the backend of the log commands: one session, quiet, with the errors that a user can mend.

The extra `[spark]` brings it; it needs a Java on the machine. Nothing here knows of logs.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

STDERR = 2
# all cores of this machine
LOCAL = "local[*]"
# Spark's own logging goes to a terminal at "warn" otherwise
LOGGING = """\
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %m%n
"""


class Unavailable(click.ClickException):
    """Spark is not installed, or does not start."""

    exit_code = os.EX_UNAVAILABLE


@contextmanager
def session(master: str | None, scratch: Path) -> Iterator[Any]:
    """A `SparkSession` of this master (default: all cores of this machine), or the one that is already
    running in this process, which stays.
    """
    try:
        from pyspark.sql import SparkSession  # noqa: PLC0415  seconds, which only Spark's users pay
    except ModuleNotFoundError as error:
        raise Unavailable("--backend spark needs the extra: pip install 'triptych[spark]'") from error
    running = SparkSession.getActiveSession()
    if running is not None:
        yield running
        return
    logging = scratch / "log4j2.properties"
    logging.write_text(LOGGING)
    builder = (
        SparkSession.builder.appName("triptych logs")
        .master(master or LOCAL)
        .config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={logging}")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        # our groups are few: Spark's 200 partitions are for other work
        .config("spark.sql.shuffle.partitions", "4")
    )
    with tempfile.TemporaryFile() as said:
        # the Java that is started inherits stderr and writes its banner there
        kept = os.dup(STDERR)
        os.dup2(said.fileno(), STDERR)
        try:
            started = builder.getOrCreate()
        except Exception as error:
            said.seek(0)
            told = [line.strip() for line in said.read().decode(errors="replace").splitlines()]
            told = [line for line in told if line and not line.startswith("at ")] or [str(error)]
            reason = next((line for line in told if "Exception: " in line), told[-1])
            raise Unavailable(f"Spark does not start at {master or LOCAL}: {reason}") from error
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)
    try:
        yield started
    finally:
        started.stop()
