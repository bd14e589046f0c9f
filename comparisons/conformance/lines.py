"""What the log says about each scenario: the engine-neutral fields of its session_closed lines.

`ANY` stands where the scenario leaves open what comes first, or where a kernel's buffers decide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from comparisons.scenarios import closing, connecting, draining, echoing, flow, timeouts
from comparisons.scenarios.wire import Observation


class Anything:
    """Equal to everything."""

    def __eq__(self, _other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "ANY"


ANY = Anything()


class Ended(NamedTuple):
    """How a session ended, as its line says it."""

    state: object
    history: object
    termination: object
    closed_by: object
    error: object = None
    bytes_c2s: object = ANY
    bytes_s2c: object = ANY

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Ended":
        return cls(*(line[name] for name in cls._fields))


WHATEVER = Ended(ANY, ANY, ANY, ANY, ANY)
COMPLETE = Ended("SF", ANY, "--", ANY)


LINES: dict[str, list[Ended]] = {
    # closing
    "reply_after_client_end": [Ended("SF", "ShDFdf", "--", "client", None, 64, len(closing.REPLY))],
    "upload_after_upstream_end": [
        Ended("SF", "ShDdfF", "--", "upstream", None, 64 + len(closing.REPLY), len(closing.ANSWER))
    ],
    "every_byte_before_the_end": [Ended("SF", ANY, "--", ANY, None, len(closing.BURST), len(closing.BURST))]
    * 20,
    "upstream_resets": [Ended("RSTR", "ShDdr", "SD", "upstream", "ECONNRESET", 64, len(closing.ANSWER))],
    "client_resets": [Ended("RSTO", "ShDdR", "CD", "client", "ECONNRESET", 64, len(closing.ANSWER))],
    "client_resets_after_its_end": [
        Ended("RSTO", "ShDFdR", "CL", "client", "EPIPE", 64, len(closing.ANSWER))
    ],
    "reset_after_a_complete_response": [
        Ended("RSTR", "ShDdfr", "SL", "upstream", "EPIPE", 64, len(closing.RESPONSE))
    ],
    "reset_after_a_complete_upload": [
        Ended("RSTO", "ShDFR", "CL", "client", "EPIPE", len(closing.UPLOAD), 0)
    ],
    "write_after_a_complete_response": [
        Ended("SF", "ShdfF", "--", "upstream", None, 0),
        Ended("RSTR", "ShdDfr", "SL", "upstream", "EPIPE"),
    ],
    "client_resets_while_paused": [Ended("RSTO", "ShDR", "CD", "client", "ECONNRESET")],
    "upstream_resets_while_paused": [Ended("RSTR", "Shdr", "SD", "upstream", "ECONNRESET")],
    # timeouts
    "half_closed_by_the_client": [Ended("RSTR", "ShDdFr", "sL", "service", None, 64, len(timeouts.ANSWER))],
    "half_closed_by_the_upstream": [Ended("RSTR", "ShDdfr", "cL", "service", None, 64, len(timeouts.ANSWER))],
    "idle_after_the_client_spoke": [Ended("RSTR", "ShdDr", "sD", "service", None, 64, len(timeouts.ANSWER))],
    "idle_after_the_upstream_spoke": [
        Ended("RSTR", "ShDdr", "cD", "service", None, 64, len(timeouts.ANSWER))
    ],
    "idle_from_the_start": [Ended("RSTR", "Shr", "cD", "service", None, 0, 0)],
    "idle_with_a_stuck_client": [Ended("RSTR", "ShDdr", "cD", "service")],
    "echo_idle": [Ended("RSTR", "ShDdr", "cD", "service", None, 64, 64)],
    "client_dies_with_data_on_the_way": [
        Ended("RSTO", "ShDdR", "CD", "client", "ETIMEDOUT", 64, len(timeouts.ANSWER))
    ],
    "client_dies_idle": [Ended("RSTO", "ShDdR", "CD", "client", "ETIMEDOUT", 64, len(timeouts.ANSWER))],
    "upstream_dies_with_data_on_the_way": [
        Ended("RSTR", "ShdDr", "SD", "upstream", "ETIMEDOUT", 64, len(timeouts.ANSWER))
    ],
    "upstream_dies_idle": [Ended("RSTR", "ShDdr", "SD", "upstream", "ETIMEDOUT", 64, len(timeouts.ANSWER))],
    # connecting
    "server_speaks_first": [Ended("SF", "ShdDFf", "--", "client", None, 64, len(connecting.GREETING))],
    "others_while_a_dial_hangs": [WHATEVER] * 4,
    "client_resets_while_connecting": [Ended("RSTO", "ShR", "CC", "client", "ECONNRESET", 0, 0)],
    "client_ends_while_connecting": [Ended("SF", "ShDFdf", "--", "client", None, 64, len(connecting.REPLY))],
    "refused_upstream_is_retried": [Ended("SF", "ShDdFf", "--", "client", None, 64, len(connecting.REPLY))]
    * 4,
    "all_refused_before_data": [Ended("SF", "Shf", "SC", "service", "ECONNREFUSED", 0, 0)],
    "all_refused_after_data": [Ended("RSTR", "ShDr", "SC", "service", "ECONNREFUSED")],
    "dial_never_answered": [Ended("SF", "Shf", "sC", "service", ANY, 0, 0)],
    # flow
    "stalled_upstream": [Ended("SF", "ShDFf", "--", "client", None, ANY, 0)],
    "stalled_client": [Ended("SF", "ShdfF", "--", "upstream", None, 0, ANY)],
    "trickle_both_ways": [Ended("SF", ANY, "--", "client", None, len(flow.TRICKLE), len(flow.TRICKLE))],
    "bulk_both_ways": [Ended("SF", ANY, "--", "client", None, len(flow.BULK), len(flow.BULK))],
    "small_writes": [Ended("SF", "ShDdFf", "--", "client", None, 40, 40)],
    "burst_beside_a_session": [Ended("SF", "ShDdFf", "--", "client")] * 201,
    "newcomers_beside_busy_sessions": [WHATEVER] * 24,
    # echoing
    "echo_of_everything": [
        Ended("SF", "ShDdFf", "--", "client", None, len(echoing.LARGE), len(echoing.LARGE))
    ],
    "echo_of_nothing": [Ended("SF", "ShFf", "--", "client", None, 0, 0)],
    # whether the echo or the FIN is seen first is not the script's to say
    "echo_after_the_end": [Ended("SF", ANY, "--", "client", None, 64, 64)],
    "echo_of_many_sizes": [
        Ended("SF", "ShDdFf", "--", "client", None, sum(echoing.SIZES), sum(echoing.SIZES))
    ],
    "echo_client_resets": [WHATEVER] * 2,
    # datagrams: as many sessions as clients that were heard
    "low_ports_get_no_answer": [Ended("SF", "Dd", "--", "service", None, 64, 64)],
    "datagrams_come_back_whole": [Ended("SF", "Dd", "--", "service")],
    "datagrams_keep_their_boundaries": [
        Ended("SF", "Dd", "--", "service", None, sum(range(20)), sum(range(20)))
    ],
    "many_datagram_clients": [Ended("SF", "Dd", "--", "service", None, 40, 40)] * 100,
    # draining: the sessions that were open; clients that were let in late come beside them
    "open_session_finishes": [Ended("SF", "ShDdFf", "--", "client", None, 128, 128)],
    "backlog_is_served": [Ended("SF", ANY, "--", "client", None, 64, 64)] * 5,
    "session_past_the_deadline_is_cut": [Ended("RSTR", "ShDdr", "KD", "service", None, 64, 64)],
    "half_closed_session_is_cut": [Ended("RSTR", "ShDFr", "KL", "service", None, len(draining.WORD), 0)],
    # hostility: every client of the trouble is a session of its own, and two honest ones beside
    "garbage": [WHATEVER] * 22,
    "resets": [WHATEVER] * 302,
    "vanishing_clients": [WHATEVER] * 102,
    "one_byte_at_a_time": [COMPLETE] * 12,
}


def expected(scenario: str, observation: Observation) -> list[Ended]:
    """The lines of one run of a scenario, which may have had to rehearse more than once."""
    lines = LINES[scenario]
    return lines[:1] * (int(observation.figures.get("rehearsals", 1)) - 1) + lines
