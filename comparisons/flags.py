"""What commands share: a duration as a flag, and a failure as one line with its exit code."""

import click

from services.config import DURATION, LONGEST, SECONDS


class Failed(click.ClickException):
    """One line, and the exit code that goes with it (sysexits.h)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


def duration(text: str) -> float:
    """Seconds, from text such as 10m."""
    found = DURATION.fullmatch(text)
    if not found or not 0 < (seconds := float(found[1]) * SECONDS[found[2]]) <= LONGEST:
        raise click.BadParameter(f"{text!r} is no duration up to 596h, as in 10m")
    return seconds
