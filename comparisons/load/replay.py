"""Real conversations through the proxy: the player plays both ends of a shipped recording and checks every byte."""

import socket
import time
from array import array

from comparisons.load.job import Broken, Job, Outcome
from comparisons.load.meter import Meter, latency
from comparisons.recordings.format import load
from comparisons.recordings.player import play
from services.core.addresses import Address


def run(job: Job, meter: Meter) -> Outcome:
    """The whole recording, again and again until the window has passed; always whole passes."""
    if job.recording is None or job.listener is None:
        raise ValueError("a replay needs a recording and the descriptor of a listener")
    recording = load(job.recording)
    with socket.socket(fileno=job.listener) as listener:
        outcome = Outcome()
        answers = array("q")
        begun = meter.open_window()
        while time.perf_counter_ns() - begun < job.seconds * 1e9:
            played = play(recording, Address.parse(job.address), listener)
            if played.failed:
                fault = played.faults[0]
                raise Broken(f"{fault.what} at the {fault.end}'s end, byte {fault.offset}: {fault.detail}")
            outcome.sessions += played.opened
            outcome.bytes_sent += played.bytes_c2s
            outcome.bytes_received += played.bytes_s2c
            answers.extend(microseconds * 1000 for microseconds in played.latencies_us)
        meter.close_window(outcome)
    outcome.requests = outcome.exchanges = len(answers)
    outcome.payload_bytes = outcome.bytes_sent + outcome.bytes_received
    outcome.latency = latency(answers, len(answers))
    return outcome
