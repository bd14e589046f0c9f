"""What an I/O model cannot keep through its public interface: proven, and few.

In the test suite every entry is a strict xfail: the day it holds, the suite says so; `triptych conform`
shows it with its reason. What a finding does not touch must still hold: one that `shows_in` the line only
has kept the rule itself.
"""

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    shows_in: Literal["observation", "line"]
    reason: str


_UNREAD = Finding(
    "observation",
    "a transport whose write fails is closed at once, with what its kernel still holds unread: a response "
    "that was complete is cut short when the client says one more thing after the upstream's reset",
)
_ERRNO = Finding(
    "line",
    "a transport tells every failed read and write as ConnectionLost and drops the errno: a peer that "
    "timed out looks like one that reset, so the line says ECONNRESET for ETIMEDOUT",
)

# (engine, scenario)
FINDINGS: dict[tuple[str, str], Finding] = {
    ("twisted", "write_after_a_complete_response"): _UNREAD,
    ("twisted", "client_dies_with_data_on_the_way"): _ERRNO,
    ("twisted", "client_dies_idle"): _ERRNO,
    ("twisted", "upstream_dies_with_data_on_the_way"): _ERRNO,
    ("twisted", "upstream_dies_idle"): _ERRNO,
}
