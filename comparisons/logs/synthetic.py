"""Sessions that never were: a log of any length for measuring and testing the tools that read logs.

Seeded, so that the same call writes the same lines, and streamed, so that a million of them take no
memory. The shapes are those of real runs (skewed times, a few bad endings, three processes side by side);
nothing about the engines can be learnt from them.
"""

import random
from collections.abc import Iterator
from typing import Any

import msgspec

from comparisons.logs.summary import timestamp
from services.vocabulary import SCHEMA, SessionClosed

ENGINES = ("blocking", "nonblocking", "twisted")
# state, history, termination, closed_by, and how many of a hundred end so
ENDINGS = (
    (("SF", "ShDdFf", "--", "client"), 88),
    (("SF", "ShDdfF", "--", "upstream"), 5),
    (("RSTO", "ShDdR", "CD", "client"), 3),
    (("RSTR", "ShDr", "SC", "service"), 2),
    (("RSTR", "ShDdr", "cD", "service"), 1),
    (("RSTR", "ShDdr", "SD", "upstream"), 1),
)
START_US = 1_795_305_600_000_000
BETWEEN_US = 1000


def lines(count: int, seed: int = 1) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """`count` lines of `session_closed`, each with the row that a reader has to make of it."""
    dice = random.Random(seed)  # noqa: S311  data, not a secret
    endings, weights = zip(*ENDINGS, strict=True)
    nothing = dict.fromkeys(SessionClosed.__struct_fields__)
    encode = msgspec.json.Encoder().encode
    for number in range(count):
        at_us = START_US + number * BETWEEN_US + dice.randrange(BETWEEN_US)
        engine = number % len(ENGINES)
        [(state, history, termination, closed_by)] = dice.choices(endings, weights)
        # a log-normal: the tail that latencies have
        unit = dice.lognormvariate(0, 1)
        connect_us = int(150 * unit)
        first_byte_us = connect_us + int(dice.expovariate(1 / 600))
        duration_us = first_byte_us + int(dice.expovariate(1 / 20_000))
        dialled = termination != "SC"
        session = nothing | {
            "session": f"{number:026}",
            "service": "proxy",
            "listener": "front",
            "transport": "tcp",
            "client_ip": f"10.0.{dice.getrandbits(2)}.{dice.getrandbits(8)}",
            "client_port": 1024 + dice.getrandbits(15),
            "local_ip": "10.1.0.1",
            "local_port": 8000,
            "upstream": f"10.2.0.{1 + dice.getrandbits(1)}:6379",
            "accept_wait_us": 0,
            "connect_us": connect_us if dialled else None,
            "first_byte_us": first_byte_us if dialled else None,
            "duration_us": duration_us,
            "max_gap_us": duration_us // 3,
            "bytes_c2s": int(300 * unit),
            "bytes_s2c": int(4000 * unit) if dialled else 0,
            "reads": 4 + dice.getrandbits(2),
            "writes": 4,
            "partial_writes": 0,
            "would_block": dice.getrandbits(3),
            "pauses": 0,
            "paused_us": 0,
            "peak_buffer": 4096,
            "spliced_bytes": 0,
            "loop_lag_us": int(40 * unit),
            "state": state,
            "history": history,
            "termination": termination,
            "closed_by": closed_by,
            "sessions": 1 + dice.getrandbits(5),
            "client_rtt_us": 20 + dice.getrandbits(6),
            "client_retrans": 0,
        }
        envelope = {
            "timestamp": timestamp(at_us),
            "level": "info",
            "event": "session_closed",
            "schema": SCHEMA,
            "engine": ENGINES[engine],
            "instance": "-",
            "pid": 100 + engine,
            "worker": 0,
            "seq": number // len(ENGINES),
        }
        yield encode(envelope | session) + b"\n", envelope | session | {"at_us": at_us}
