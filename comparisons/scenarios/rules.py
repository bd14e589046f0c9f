"""Which scenario shows which rule of the behaviour table, and what must have been observed.

A `Rule` is all that a runner needs: how the service must be set up, the scenario, and the verdict.
`settings` are keys of our own configuration file; whoever tests another proxy sets the same there.
`TABLE` has the sentence of every rule, those without a scenario too: what nothing shows, nobody claims.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from comparisons.scenarios import (
    closing,
    connecting,
    datagrams,
    draining,
    echoing,
    flow,
    hostility,
    timeouts,
)
from comparisons.scenarios.wire import Ending, Heard, Observation, payload

Transport = Literal["tcp4", "tcp6", "unix", "udp4", "udp6"]
STREAMS: tuple[Transport, ...] = ("tcp4", "tcp6", "unix")
TCP: tuple[Transport, ...] = ("tcp4", "tcp6")
TCP4: tuple[Transport, ...] = ("tcp4",)

TABLE: Mapping[int, str] = {
    1: "Half-close: each direction is drained and ended on its own",
    2: "A half-closed session has a timeout of its own, an idle one too",
    3: "FIN is forwarded only after every byte",
    4: "A reset on one leg becomes a reset on the other, both ways",
    5: "A reset never discards a direction that had ended and still has output",
    6: "A peer's death is seen while reading is paused",
    7: "A dead peer ends its session in bounded time, with data on the way or idle",
    8: "The server may speak first: nothing waits for the client's bytes",
    9: "Connecting holds up nobody, and what the client does meanwhile is seen",
    10: "Out of descriptors, accepting pauses and resumes, and open sessions go on",
    11: "A refused upstream is retried on another, then the client is told the truth",
    12: "Buffers are bounded for every session",
    13: "Tiny buffers move large transfers intact",
    14: "TCP_NODELAY on both legs",
    15: "Accepting and serving are fair to each other",
    16: "The PROXY header: bounded in time and size, split anywhere, faults refused",
    17: "Upstream names are resolved again, and their addresses raced",
    18: "Asked to end, it serves its backlog, finishes sessions, and cuts at the deadline",
    19: "A UDP echo answers no datagram that could start an echo loop",
    20: "UDP keeps the boundaries of datagrams",
    21: "Echo: everything before FIN comes back, then FIN",
    22: "splice: no byte is lost between two pipes, and without a pipe it copies",
    23: "A limit refuses at once, never by silence",
    0: "Whoever means ill costs their own session and nothing else",
}

# Short, and apart from each other, so that which of them ended a session shows in when it ended.
IMPATIENT = {
    "timeouts.connect": "500ms",
    "timeouts.half_close": "300ms",
    "timeouts.idle": "700ms",
    "timeouts.dead_peer": "30s",
}
DEAD_PEER = {"timeouts.dead_peer": "2s"}
SHORT_DRAIN = {"timeouts.drain": "500ms"}


@dataclass(frozen=True, slots=True)
class Hears:
    """What one end must have heard: these bytes (None: any), and one of these endings."""

    data: bytes | None
    endings: tuple[Ending, ...] = ("eof",)

    def faults(self, who: str, heard: Heard | None) -> list[str]:
        if heard is None:
            return [f"the {who} heard nothing that could be judged"]
        faults = []
        if heard.ended not in self.endings:
            faults.append(f"the {who} saw {heard.ended}, not {' or '.join(self.endings)}")
        if self.data is not None and heard.received != len(self.data):
            faults.append(f"the {who} heard {heard.received} bytes, not {len(self.data)}")
        elif self.data is not None and heard.sha256 != Heard.of(self.data, "eof").sha256:
            faults.append(f"the {who} heard other bytes than were sent")
        return faults


@dataclass(frozen=True, slots=True)
class Rule:
    """One proof of one rule. Figures must lie within their bounds, both inclusive.

    Attributes:
        number: the rule's, in the behaviour table; 0 for what holds beside the table (hostility).
        title: what must hold, as a sentence.
        scenario: takes the Subject and, where `place` is "network", a `timeouts.Silence`.
        transports: where it makes sense; a reset exists in TCP only.
        upstreams: how many listening sockets the proxy is given.
        needs: that of the settings without which the rule cannot be shown at all.
        place: "shared" can run beside others, "process" ends the service, "network" needs one's own.

    """

    number: int
    title: str
    service: Literal["echo", "proxy"]
    scenario: Callable[..., Observation]
    client: Hears | None = None
    upstream: Hears | None = None
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    transports: tuple[Transport, ...] = TCP4
    upstreams: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    place: Literal["shared", "process", "network"] = "shared"

    @property
    def name(self) -> str:
        return self.scenario.__name__

    def faults(self, observation: Observation) -> list[str]:
        """What was observed and must not be, or was not and must; empty when the rule holds."""
        faults = []
        for who, wanted, heard in (
            ("client", self.client, observation.client),
            ("upstream", self.upstream, observation.upstream),
        ):
            if wanted:
                faults += wanted.faults(who, heard)
        for name, (least, most) in self.figures.items():
            if not least <= observation.figures[name] <= most:
                seen = observation.figures[name]
                shown = "never" if seen == float("inf") else f"{seen:g}"
                faults.append(f"{name} is {shown}, not {least:g} to {most:g}")
        return faults


INTACT = {"intact": (1, 1)}
# the probe of a paused leg comes within a second; the rest is a slow machine
SOON = {"reset_seen_s": (0, 3)}
# what two connections may hold in the kernel, each in a send and a receive buffer of the largest size
KERNEL = 2 * sum(
    int(Path(f"/proc/sys/net/ipv4/{name}").read_text(encoding="ascii").split()[2])
    for name in ("tcp_rmem", "tcp_wmem")
)
# Measured: four proxies absorb 7.4 to 9.4 MB, ours up to 30, depending on how far the kernel had tuned
# its buffers up. What a proxy adds to that in user space is small beside it: the log's peak_buffer.
ABSORBED = {"absorbed_bytes": (1, KERNEL + 1e6), **INTACT}
HALF_CLOSED = {"ended_s": (0.25, 3)}
IDLE = {"ended_s": (0.6, 4)}
# TCP_USER_TIMEOUT is looked at when a retransmission is due, which backs off
DEAD = {"ended_s": (1, 9)}
NOTHING_LEFT = {"descriptors_left_over": (-1e9, 0)}
CUT: tuple[Ending, ...] = ("reset",)
# a leg that had ended in order may learn of the reset before or after its end is read
ENDED_OR_CUT: tuple[Ending, ...] = ("eof", "reset")

RULES: tuple[Rule, ...] = (
    Rule(
        1,
        "a reply after the client's FIN arrives in full",
        "proxy",
        closing.reply_after_client_end,
        client=Hears(closing.REPLY),
        upstream=Hears(closing.REQUEST),
        transports=STREAMS,
    ),
    Rule(
        1,
        "an upload after the upstream's FIN arrives in full",
        "proxy",
        closing.upload_after_upstream_end,
        client=Hears(closing.ANSWER),
        upstream=Hears(closing.REQUEST + closing.REPLY),
        transports=STREAMS,
    ),
    Rule(
        2,
        "a session that its client half-closed has its own timeout",
        "proxy",
        timeouts.half_closed_by_the_client,
        client=Hears(timeouts.ANSWER, ENDED_OR_CUT),
        upstream=Hears(timeouts.REQUEST, ENDED_OR_CUT),
        figures=HALF_CLOSED,
        settings=IMPATIENT,
        needs="timeouts.half_close",
    ),
    Rule(
        2,
        "a session that its upstream half-closed has its own timeout",
        "proxy",
        timeouts.half_closed_by_the_upstream,
        client=Hears(timeouts.ANSWER, ENDED_OR_CUT),
        upstream=Hears(timeouts.REQUEST, ENDED_OR_CUT),
        figures=HALF_CLOSED,
        settings=IMPATIENT,
        needs="timeouts.half_close",
    ),
    Rule(
        2,
        "what the half-close timeout cuts off is reset, not ended as if it were complete",
        "proxy",
        timeouts.half_closed_by_the_client,
        client=Hears(timeouts.ANSWER, CUT),
        settings=IMPATIENT,
        needs="timeouts.half_close",
    ),
    Rule(
        2,
        "what the idle timeout cuts off is reset, not ended as if it were complete",
        "proxy",
        timeouts.idle_after_the_client_spoke,
        client=Hears(timeouts.ANSWER, CUT),
        upstream=Hears(timeouts.REQUEST, CUT),
        settings=IMPATIENT,
        needs="timeouts.idle",
    ),
    Rule(
        3,
        "FIN follows the last byte, both ways, when nobody read before it",
        "proxy",
        closing.every_byte_before_the_end,
        client=Hears(closing.BURST),
        upstream=Hears(closing.BURST),
        figures={"intact": (20, 20)},
        transports=STREAMS,
    ),
    Rule(
        4,
        "the upstream's reset becomes a reset for the client",
        "proxy",
        closing.upstream_resets,
        client=Hears(closing.ANSWER, CUT),
        transports=TCP,
    ),
    Rule(
        4,
        "the client's reset becomes a reset for the upstream",
        "proxy",
        closing.client_resets,
        upstream=Hears(closing.REQUEST, CUT),
        transports=TCP,
    ),
    Rule(
        4,
        "the upstream's reset after its FIN becomes a reset for the client",
        "proxy",
        closing.reset_after_a_complete_response,
        figures=SOON,
        transports=TCP,
    ),
    Rule(
        4,
        "the client's reset after its FIN becomes a reset for the upstream",
        "proxy",
        closing.client_resets_after_its_end,
        upstream=Hears(closing.REQUEST),
        figures=SOON,
        transports=TCP,
    ),
    Rule(
        5,
        "a complete response survives the reset that follows it",
        "proxy",
        closing.reset_after_a_complete_response,
        client=Hears(closing.RESPONSE),
        transports=TCP,
    ),
    Rule(
        5,
        "a complete upload survives the reset that follows it",
        "proxy",
        closing.reset_after_a_complete_upload,
        upstream=Hears(closing.UPLOAD),
        transports=TCP,
    ),
    Rule(
        5,
        "a complete response survives a reset and what the client then still says",
        "proxy",
        closing.write_after_a_complete_response,
        client=Hears(None),
        figures=INTACT,
    ),
    Rule(
        6,
        "a client's reset is seen while it is not read",
        "proxy",
        closing.client_resets_while_paused,
        upstream=Hears(None, CUT),
        figures=SOON,
    ),
    Rule(
        6,
        "an upstream's reset is seen while it is not read",
        "proxy",
        closing.upstream_resets_while_paused,
        client=Hears(None, CUT),
        figures=SOON,
    ),
    *(
        Rule(
            7,
            title,
            "proxy",
            scenario,
            figures=DEAD,
            settings=DEAD_PEER,
            needs="timeouts.dead_peer",
            place="network",
        )
        for title, scenario in (
            (
                "data that a dead client never acknowledges ends the session",
                timeouts.client_dies_with_data_on_the_way,
            ),
            ("an idle dead client ends the session", timeouts.client_dies_idle),
            (
                "data that a dead upstream never acknowledges ends the session",
                timeouts.upstream_dies_with_data_on_the_way,
            ),
            ("an idle dead upstream ends the session", timeouts.upstream_dies_idle),
        )
    ),
    Rule(
        8,
        "the server may speak first",
        "proxy",
        connecting.server_speaks_first,
        client=Hears(connecting.GREETING),
        upstream=Hears(connecting.REQUEST),
        transports=STREAMS,
    ),
    Rule(
        9,
        "a dial that hangs holds up no other client",
        "proxy",
        connecting.others_while_a_dial_hangs,
        # two upstreams in turn: half of four clients
        figures={"served": (2, 4), "heard": (2, 4), "elapsed_s": (0, 2)},
        upstreams=2,
    ),
    Rule(
        9,
        "a client's reset ends the attempt to connect",
        "proxy",
        connecting.client_resets_while_connecting,
        figures={"attempt_ended_s": (0, 3)},
    ),
    Rule(
        9,
        "a client's FIN while connecting is a half-close, forwarded once connected",
        "proxy",
        connecting.client_ends_while_connecting,
        client=Hears(connecting.REPLY),
        upstream=Hears(connecting.REQUEST),
    ),
    Rule(
        11,
        "a refused upstream is retried on another",
        "proxy",
        connecting.refused_upstream_is_retried,
        figures={"served": (4, 4)},
        upstreams=2,
    ),
    Rule(
        11,
        "with every upstream refused, a client that sent nothing sees FIN",
        "proxy",
        connecting.all_refused_before_data,
        client=Hears(b""),
        upstreams=2,
    ),
    Rule(
        11,
        "with every upstream refused, a client that sent data sees a reset",
        "proxy",
        connecting.all_refused_after_data,
        client=Hears(b"", CUT),
    ),
    Rule(
        11,
        "an upstream that never answers costs no more than the connect timeout",
        "proxy",
        connecting.dial_never_answered,
        client=Hears(b""),
        figures={"ended_s": (0.4, 4)},
        settings=IMPATIENT,
        needs="timeouts.connect",
    ),
    Rule(
        12,
        "an upstream that does not read costs a bounded amount",
        "proxy",
        flow.stalled_upstream,
        figures=ABSORBED,
        transports=STREAMS,
    ),
    Rule(
        12,
        "a client that does not read costs a bounded amount",
        "proxy",
        flow.stalled_client,
        figures=ABSORBED,
        transports=STREAMS,
    ),
    Rule(
        13,
        "a buffer of one byte moves everything, both ways",
        "proxy",
        flow.trickle_both_ways,
        client=Hears(flow.TRICKLE),
        upstream=Hears(flow.TRICKLE),
        settings={"limits.buffer": "1B"},
        needs="limits.buffer",
    ),
    Rule(
        13,
        "a buffer of a kilobyte moves megabytes, both ways at once",
        "proxy",
        flow.bulk_both_ways,
        client=Hears(flow.BULK),
        upstream=Hears(flow.BULK),
        settings={"limits.buffer": "1KiB"},
        needs="limits.buffer",
    ),
    Rule(
        14,
        "no leg waits for an acknowledgement before a small write",
        "proxy",
        flow.small_writes,
        client=Hears(2 * 20 * flow.PING),
        upstream=Hears(2 * 20 * flow.PING),
        # with Nagle's algorithm on one leg: the peer's delayed acknowledgement, 0.04
        figures={"median_round_s": (0, 0.03)},
        transports=TCP,
    ),
    Rule(
        15,
        "a burst of new clients does not starve an open session",
        "echo",
        flow.burst_beside_a_session,
        client=Hears(201 * flow.PING),
        figures={"served": (200, 200), "slowest_round_s": (0, 1)},
        transports=STREAMS,
    ),
    Rule(
        15,
        "busy sessions do not starve new clients",
        "echo",
        flow.newcomers_beside_busy_sessions,
        figures={"served": (20, 20), "slowest_s": (0, 2)},
        transports=STREAMS,
    ),
    Rule(
        18,
        "an open session finishes after the signal to end, and nobody new is let in",
        "echo",
        draining.open_session_finishes,
        client=Hears(2 * draining.WORD),
        figures={"refused": (1, 1)},
        transports=STREAMS,
        place="process",
    ),
    Rule(
        18,
        "clients that wait in the backlog at that signal are served",
        "echo",
        draining.backlog_is_served,
        figures={"served": (5, 5)},
        transports=STREAMS,
        place="process",
    ),
    Rule(
        18,
        "a session past the drain deadline is cut",
        "echo",
        draining.session_past_the_deadline_is_cut,
        client=Hears(draining.WORD, ENDED_OR_CUT),
        figures={"ended_s": (0.4, 4)},
        settings=SHORT_DRAIN,
        needs="timeouts.drain",
        place="process",
    ),
    Rule(
        18,
        "a half-closed session past the drain deadline is cut",
        "proxy",
        draining.half_closed_session_is_cut,
        client=Hears(b"", ENDED_OR_CUT),
        upstream=Hears(draining.WORD),
        figures={"ended_s": (0.4, 4)},
        settings=SHORT_DRAIN,
        needs="timeouts.drain",
        place="process",
    ),
    Rule(
        18,
        "what the drain deadline cuts off is reset, not ended as if it were complete",
        "echo",
        draining.session_past_the_deadline_is_cut,
        client=Hears(draining.WORD, CUT),
        settings=SHORT_DRAIN,
        needs="timeouts.drain",
        place="process",
    ),
    *(
        Rule(
            19,
            "a datagram from a port below 1024 is not answered",
            "echo",
            datagrams.low_ports_get_no_answer,
            figures={"answered": (2, 2), "low_port_answers": (0, 0)},
            transports=("udp4", "udp6"),
        ),
        Rule(
            20,
            "datagrams come back whole, the empty and the largest too",
            "echo",
            datagrams.datagrams_come_back_whole,
            figures={"whole": (len(datagrams.SIZES), len(datagrams.SIZES))},
            transports=("udp4", "udp6"),
        ),
        Rule(
            20,
            "datagrams keep their boundaries and their order",
            "echo",
            datagrams.datagrams_keep_their_boundaries,
            figures={"in_place": (20, 20)},
            transports=("udp4", "udp6"),
        ),
        Rule(
            20,
            "every client hears its own datagrams",
            "echo",
            datagrams.many_datagram_clients,
            figures={"own": (100, 100)},
            transports=("udp4", "udp6"),
        ),
    ),
    *(
        Rule(21, title, "echo", scenario, client=Hears(data), figures=figures, transports=STREAMS)
        for title, scenario, data, figures in (
            ("a megabyte comes back, then FIN", echoing.echo_of_everything, echoing.LARGE, {}),
            ("FIN alone is answered by FIN", echoing.echo_of_nothing, b"", {}),
            ("what was sent before FIN comes back after it", echoing.echo_after_the_end, echoing.SMALL, {}),
            (
                "messages of every size come back one by one",
                echoing.echo_of_many_sizes,
                b"".join(payload(size, seed=size) for size in echoing.SIZES),
                {"echoed": (len(echoing.SIZES), len(echoing.SIZES))},
            ),
        )
    ),
    Rule(
        4,
        "a client's reset costs its own session only",
        "echo",
        echoing.echo_client_resets,
        client=Hears(echoing.SMALL),
        transports=TCP,
    ),
    Rule(
        2,
        "an idle echo session has its timeout",
        "echo",
        timeouts.echo_idle,
        client=Hears(timeouts.REQUEST, ENDED_OR_CUT),
        figures=IDLE,
        settings=IMPATIENT,
        needs="timeouts.idle",
        transports=TCP,
    ),
    *(
        Rule(
            2,
            title,
            "proxy",
            scenario,
            client=client,
            upstream=upstream,
            figures=IDLE,
            settings=IMPATIENT,
            needs="timeouts.idle",
        )
        for title, scenario, client, upstream in (
            (
                "an upstream that owes an answer has the idle timeout",
                timeouts.idle_after_the_client_spoke,
                Hears(timeouts.ANSWER, ENDED_OR_CUT),
                Hears(timeouts.REQUEST, ENDED_OR_CUT),
            ),
            (
                "a client that has its answer has the idle timeout",
                timeouts.idle_after_the_upstream_spoke,
                Hears(timeouts.ANSWER, ENDED_OR_CUT),
                Hears(timeouts.REQUEST, ENDED_OR_CUT),
            ),
            (
                "a session in which nobody speaks has the idle timeout",
                timeouts.idle_from_the_start,
                Hears(b"", ENDED_OR_CUT),
                Hears(b"", ENDED_OR_CUT),
            ),
            (
                "a client that never reads has the idle timeout",
                timeouts.idle_with_a_stuck_client,
                Hears(None, ENDED_OR_CUT),
                None,
            ),
        )
    ),
    *(
        Rule(
            0,
            title,
            "echo",
            scenario,
            client=Hears(2 * hostility.WORD),
            figures=NOTHING_LEFT,
            transports=STREAMS,
        )
        for title, scenario in (
            ("garbage costs its own sessions only", hostility.garbage),
            ("clients that vanish cost their own sessions only", hostility.vanishing_clients),
            ("clients of one byte at a time hold up nobody", hostility.one_byte_at_a_time),
        )
    ),
    Rule(
        0,
        "a flood of resets costs its own sessions only",
        "echo",
        hostility.resets,
        client=Hears(2 * hostility.WORD),
        figures=NOTHING_LEFT,
        transports=TCP,
    ),
)
