"""Plays the rules on a peer and judges what was seen.

What a peer does wrong costs the rule that found it out and no other: a script is over after `LIMIT`
seconds, and a peer that broke a rule, or ended by itself, is started anew for the next. What cannot be
shown (a timeout that nobody can set, a process that is not known, rights that are missing) is said, and
counts as nothing.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

from comparisons.conformance.findings import FINDINGS
from comparisons.conformance.lines import Ended, expected
from comparisons.peers.peer import Peer, size
from comparisons.peers.standing import NotUp, Standing
from comparisons.scenarios.network import Namespace
from comparisons.scenarios.rules import RULES, TABLE, Rule, Transport
from comparisons.scenarios.wire import Heard, Inconclusive, Observation, Subject

LIMIT = 60.0  # seconds for a script; on a quiet machine the longest that a right one takes is about 9
LOG_PATIENCE = 5.0  # seconds until the log has the lines of what was played
LAST_BREATH = 1.0  # seconds from the end of a process's sockets to its own
ENDED = 10.0  # seconds for a drained process to end
BUFFER = "64KiB"  # what the adapter of our engines sets where a rule does not

# these are about a service that answers by itself; all other rules of echo services hold for a proxy
# that has one behind it
ECHO_ONLY = (19, 20, 21)
# what a network of one's own is made with
NETWORK_TOOLS = ("ip", "nft")

Status = Literal[
    "kept", "broken", "finding", "not configured", "not observable", "not applicable", "needs root"
]
JUDGED: tuple[Status, ...] = ("kept", "broken", "finding")


class Verdict(NamedTuple):
    """One rule's scenario on one peer. `seen`: what was wrong, or what was observed, or why it was not played."""

    rule: Rule
    status: Status
    seen: str
    seconds: float = 0.0


def scenarios_of(numbers: Sequence[int] = ()) -> list[Rule]:
    """The rules with these numbers (or all), in the table's order; those beside the table come last."""
    chosen = [rule for rule in RULES if not numbers or rule.number in numbers]
    order = list(TABLE)
    return sorted(chosen, key=lambda rule: order.index(rule.number))


def without_scenario(numbers: Sequence[int] = ()) -> list[int]:
    """Rules of the table that nothing here shows."""
    return [
        number
        for number in TABLE
        if (not numbers or number in numbers) and number not in {rule.number for rule in RULES}
    ]


def play(peer: Peer, rules: Sequence[Rule], done: Callable[[Verdict], None]) -> list[Verdict]:
    """The verdicts on `rules`, in their order; `done` hears of each as it is there."""
    verdicts = {}
    with closing(_Stage(peer)) as stage:
        # those that want the same peer come together, so that it is started once
        for rule in sorted(rules, key=lambda rule: (rule.service, str(rule.settings), rule.upstreams)):
            verdicts[rule.title] = _play(stage, peer, rule)
            done(verdicts[rule.title])
    return [verdicts[rule.title] for rule in rules]


def _play(stage: "_Stage", peer: Peer, rule: Rule) -> Verdict:
    transport = next((each for each in rule.transports if each in peer.transports), None)
    if refused := _refusal(peer, rule, transport):
        return Verdict(rule, *refused)
    assert transport
    began = time.monotonic()
    try:
        status, seen = stage.network(rule) if rule.place == "network" else stage.shared(rule, transport)
    except NotUp as error:
        status, seen = "broken", str(error)
    except Inconclusive as error:
        status, seen = "not observable", str(error)
    except PermissionError as error:
        status, seen = "needs root", f"the script may not do what it must: {error.strerror}"
    return Verdict(rule, status, seen, time.monotonic() - began)


def _refusal(peer: Peer, rule: Rule, transport: Transport | None) -> tuple[Status, str] | None:
    """Why the rule cannot be played on this peer."""
    if rule.service not in peer.services and (rule.service == "proxy" or rule.number in ECHO_ONLY):
        return "not applicable", f"this is about {'an echo' if rule.service == 'echo' else 'a proxy'}"
    if transport is None:
        return "not applicable", f"this is about {' and '.join(rule.transports)}"
    if rule.needs is not None and rule.needs not in peer.settings:
        return "not configured", peer.why_not(rule.needs)
    if rule.upstreams > peer.upstreams:
        return "not configured", peer.why_not("a second upstream")
    if peer.command is None and rule.place == "network":
        return "not observable", "a peer that is up cannot be moved to a network of its own"
    if peer.command is None and (rule.place == "process" or "descriptors_left_over" in rule.figures):
        return "not observable", "the process is not known"
    if rule.place == "network":
        if os.geteuid() != 0:
            return "needs root", "a network of its own, in which packets are lost"
        for tool in NETWORK_TOOLS:
            if shutil.which(tool) is None:
                return "not observable", f"{tool} is not installed"
    return None


class _Stage:
    """The peer as the last rule wanted it, up for as long as the next ones want the same."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._standing: Standing | None = None
        self._kind: object = None

    def shared(self, rule: Rule, transport: Transport) -> tuple[Status, str]:
        kind = (rule.service, transport, rule.upstreams, dict(rule.settings))
        # what a peer has learnt of an upstream that refused is not to meet the next rule
        if rule.place == "process" or rule.upstreams > 1 or self._kind != kind:
            self.close()
        if self._standing is None:
            self._standing = Standing(
                self._peer, rule.service, transport, upstreams=rule.upstreams, settings=rule.settings
            )
            self._kind = kind
        status, seen = _judge(self._peer, rule, self._standing, rule.scenario)
        if status == "broken" or rule.place == "process":
            self.close()
        return status, seen

    def network(self, rule: Rule) -> tuple[Status, str]:
        try:
            with Namespace() as namespace:

                def started() -> Standing:
                    return Standing(self._peer, settings=rule.settings, prefix=namespace.command)

                def scenario(subject: Subject) -> Observation:
                    return namespace.call(rule.scenario, subject, namespace.silence)

                with namespace.call(started) as standing:
                    return _judge(self._peer, rule, standing, scenario)
        except subprocess.SubprocessError as error:
            return "needs root", f"a network of its own cannot be made: {error}"

    def close(self) -> None:
        if self._standing:
            self._standing.close()
            self._standing = None


def _judge(
    peer: Peer, rule: Rule, standing: Standing, scenario: Callable[..., Observation]
) -> tuple[Status, str]:
    before = _settled(standing) if peer.log else 0
    began = time.monotonic()
    subject = standing.subject(limit=LIMIT)
    try:
        observation = scenario(subject)
    except PermissionError:
        raise
    except OSError as error:
        wrong = [f"it could not be played to its end: {error.strerror or error}"]
    else:
        wrong = rule.faults(observation)
    if time.monotonic() - began > LIMIT:
        wrong.append(f"cut short after {LIMIT:g} s")
    if rule.place != "process":
        if wrong:  # its sockets are closed a moment before it is known to have ended
            standing.wait_died(LAST_BREATH)
        if how := standing.died():
            wrong.append(how)
    # findings are about our engines; anybody's program may be called like one
    finding = FINDINGS.get((peer.name, rule.name)) if peer.log else None
    if wrong:
        known = finding is not None and finding.shows_in == "observation"
        return ("finding", finding.reason) if known and finding else ("broken", "; ".join(wrong))
    if peer.log and (told := list(_log_faults(rule, observation, standing, before))):
        known = finding is not None and finding.shows_in == "line"
        return ("finding", finding.reason) if known and finding else ("broken", "; ".join(told))
    return "kept", _summary(observation)


def _settled(standing: Standing) -> int:
    """How many sessions its log knows, once all of them have ended: earlier ones are not the next rule's."""
    deadline = time.monotonic() + LOG_PATIENCE
    while True:
        closed = len(standing.lines("session_closed"))
        if len(standing.lines("session_opened")) == closed or time.monotonic() > deadline:
            return closed
        time.sleep(0.01)


def _log_faults(rule: Rule, observation: Observation, standing: Standing, before: int) -> Iterator[str]:
    """Where the log tells another story than what was seen."""
    wanted = expected(rule.name, observation)
    if rule.place == "process":
        standing.wait_died(ENDED)
    deadline = time.monotonic() + LOG_PATIENCE
    while len(lines := standing.lines("session_closed")[before:]) < len(wanted):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    endings = [Ended.of(line) for line in lines]
    if rule.place == "process":  # late clients, let in before the listener closed, come beside
        endings = [ended for ended in endings if ended == wanted[0]]
    if len(endings) != len(wanted):
        yield f"the log has {len(endings)} sessions, not {len(wanted)}"
    for ended, want in zip(endings, wanted, strict=False):
        if ended != want:
            yield "the log says " + ", ".join(
                f"{name} {got}, not {should}"
                for name, got, should in zip(Ended._fields, ended, want, strict=True)
                if got != should
            )
    buffer = rule.settings.get("limits.buffer", BUFFER)
    if (most := max((line["peak_buffer"] for line in lines), default=0)) > size(buffer):
        yield f"the log says that {most} bytes were held in user space, and {buffer} are the limit"


def _summary(observation: Observation) -> str:
    def one(who: str, heard: Heard | None) -> str:
        return f"{who} heard {heard.received:,} bytes, then {heard.ended}" if heard else ""

    figures = (f"{name} {value:.4g}" for name, value in observation.figures.items())
    ends = (one("client", observation.client), one("upstream", observation.upstream))
    return "; ".join(part for part in (*ends, *figures) if part)
