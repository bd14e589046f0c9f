"""Whatever happens, in whatever order, a session keeps its promises to the engine."""

from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import Play, Stage, upstream

from services.core.record import CLIENT, UPSTREAM, Loss, Reason, Side
from services.core.session import (
    Abort,
    Action,
    BeginRelay,
    Cancel,
    Close,
    Cut,
    Dial,
    DialFailed,
    Dialled,
    Discard,
    Event,
    Finished,
    Lost,
    Probe,
    Probed,
    SendEnd,
)

LOSSES = [
    Loss(Reason.RESET, "ECONNRESET"),
    Loss(Reason.BROKEN, "EPIPE"),
    Loss(Reason.TIMED_OUT, "ETIMEDOUT"),
]
SIDES = st.sampled_from(list(Side))


class Engine:
    """An engine without sockets, which checks every action against what it has open."""

    def __init__(self, service: str) -> None:
        self.stage = Stage(buffer=10, upstreams=2, idle=50.0, half_close=20.0, connect=5.0)
        for number, each in enumerate(self.stage.pool.upstreams):
            each.addresses = upstream(number, 80, 81).addresses
        self.play = Play(self.stage, service)
        self.open = {CLIENT}
        self.dialling: set[int] = set()
        self.relaying = False
        self.fins: list[Side] = []
        self.read = {CLIENT: 0, UPSTREAM: 0}
        self.written = {CLIENT: 0, UPSTREAM: 0}
        self.perform(self.play.actions)

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dial(attempt, _):
                    assert attempt not in self.dialling
                    assert len(self.dialling) < 2, "one dial for each address at most"
                    self.dialling.add(attempt)
                case Cancel(attempt):
                    self.dialling.discard(attempt)
                case BeginRelay():
                    assert not self.relaying
                    assert not self.dialling, "who lost the race was told"
                    self.relaying = True
                case SendEnd(leg):
                    assert leg in self.open
                    assert leg not in self.fins, "one FIN a leg"
                    relay = self.play.session.relay_to(leg)
                    assert relay.finished, "FIN only after the last byte"
                    self.fins.append(leg)
                case Probe(leg):
                    assert leg in self.open
                case Discard(relay):
                    assert not relay.wants_write
                case Abort(leg) | Close(leg):
                    assert leg in self.open, "closed once"
                    self.open.discard(leg)

    def tell(self, event: Event) -> None:
        if isinstance(event, Dialled) and event.attempt in self.dialling:
            self.open.add(UPSTREAM)
        if isinstance(event, Dialled | DialFailed):
            self.dialling.discard(event.attempt)
        self.perform(self.play.tell(event, 0.0))

    def step(self, data: st.DataObject) -> None:
        session = self.play.session
        kind = data.draw(st.sampled_from(["dial", "read", "write", "end", "lost", "probe", "wait", "cut"]))
        side = data.draw(SIDES)
        if kind == "dial" and self.dialling:
            attempt = data.draw(st.sampled_from(sorted(self.dialling)))
            if data.draw(st.booleans()):
                self.tell(Dialled(attempt))
            else:
                self.tell(DialFailed(attempt, Loss(Reason.REFUSED, "ECONNREFUSED")))
        elif kind == "wait":
            self.perform(self.play.wait(data.draw(st.floats(0.01, 70.0))))
        elif kind == "cut" and data.draw(st.integers(0, 5)) == 0:
            self.tell(Cut("K"))
        elif kind == "lost" and side in self.open:
            self.tell(Lost(side, data.draw(st.sampled_from(LOSSES))))
        elif kind == "probe" and side in self.open:
            self.tell(Probed(side, None, data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))))
        elif self.relaying and not session.over and (side is CLIENT or len(session.relays) == 2):
            self.pump(kind, side, data)

    def pump(self, kind: str, side: Side, data: st.DataObject) -> None:
        relay = self.play.relay(side)
        now = self.stage.now
        if kind == "read" and relay.wants_read:
            n = data.draw(st.integers(1, relay.room))
            relay.received(n, now)
            self.read[side] += n
        elif kind == "write" and relay.wants_write:
            n = data.draw(st.integers(1, relay.pending))
            relay.sent(n, now)
            self.written[side] += n
        elif kind == "end" and relay.ended_at is None:
            relay.ended(now)
        if relay.finished:
            self.tell(Finished(relay))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["echo", "proxy"]), st.integers(1, 60), st.data())
def test_every_session_ends_once_and_says_how(service: str, steps: int, data: st.DataObject) -> None:
    engine = Engine(service)
    session = engine.play.session
    for _ in range(steps):
        assert session.over or session.deadline() < float("inf"), "never left without a timer"
        engine.step(data)
        if session.over:
            break
    # left alone, with an engine that answers probes, it comes to an end by its own timers
    for _ in range(300):
        if session.over:
            break
        due = session.deadline()
        engine.stage.now = max(engine.stage.now, due)
        for action in engine.play.wait(0.0):
            engine.perform([action])
            if isinstance(action, Probe) and not session.over:
                engine.tell(Probed(action.leg, None, 0, 0))
    assert session.over
    assert not engine.open, "every leg was closed"
    assert not engine.dialling
    line = engine.play.line()
    assert line.termination is not None
    assert len(set(line.history)) == len(line.history)
    assert line.bytes_c2s == engine.read[CLIENT]
    assert line.bytes_s2c == engine.written[UPSTREAM if service == "proxy" else CLIENT]
    assert ("R" in line.history) == (line.state == "RSTO" or (line.state == "RSTR" and "R" in line.history))
