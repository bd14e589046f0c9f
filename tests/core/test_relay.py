"""One direction's flow control, by counters."""

from hypothesis import given
from hypothesis import strategies as st

from services.core.addresses import Address
from services.core.record import CLIENT, UPSTREAM, Record
from services.core.relay import Relay


def record() -> Record:
    return Record(
        wall=0.0,
        now=0.0,
        service="proxy",
        listener="front",
        client=None,
        local=Address("tcp", "127.0.0.1", 1),
    )


@given(
    limit=st.integers(1, 1000), steps=st.lists(st.tuples(st.booleans(), st.integers(1, 1000)), max_size=50)
)
def test_no_byte_is_lost_or_counted_twice_and_the_limit_holds(
    limit: int, steps: list[tuple[bool, int]]
) -> None:
    relay = Relay(record(), CLIENT, UPSTREAM, limit)
    now = 0.0
    read = written = 0
    for reading, wanted in steps:
        now += 1.0
        if reading and relay.wants_read:
            n = min(wanted, relay.room)
            relay.received(n, now)
            read += n
        elif not reading and relay.wants_write:
            n = min(wanted, relay.pending)
            relay.sent(n, now)
            written += n
        if not relay.wants_read:
            relay.pause(now)
        assert relay.pending == read - written
        assert 0 <= relay.pending <= limit
        assert relay.wants_read == (relay.pending < limit)
        assert relay.wants_write == (relay.pending > 0)
    assert (relay.bytes_in, relay.bytes_out) == (read, written)
    assert relay.peak <= limit
    assert relay.pauses - relay.resumes in {0, 1}, "pauses equal resumes, but for one that lasts"
    relay.ended(now)
    assert relay.finished == (read == written)
    assert not relay.wants_read


def test_a_partial_write_and_a_call_that_would_wait_are_counted() -> None:
    relay = Relay(record(), CLIENT, UPSTREAM, 10)
    relay.received(10, 1.0)
    relay.blocked()
    relay.pause(1.0)
    relay.pause(2.0)
    relay.sent(4, 3.0)
    relay.sent(6, 4.0)
    assert (relay.partial_writes, relay.would_block, relay.pauses, relay.resumes) == (1, 1, 1, 1)
    assert relay.paused_time == 2.0
    assert (relay.first_in, relay.first_out, relay.last_in) == (1.0, 3.0, 1.0)


def test_the_first_byte_to_the_client_is_stamped_on_the_record() -> None:
    kept = record()
    up, down = Relay(kept, CLIENT, UPSTREAM, 10), Relay(kept, UPSTREAM, CLIENT, 10)
    up.received(1, 1.0)
    up.sent(1, 1.0)
    assert kept.first_byte_at is None
    down.received(1, 2.0)
    down.sent(1, 2.5)
    down.received(1, 3.0)
    down.sent(1, 3.5)
    assert kept.first_byte_at == 2.5


def test_the_longest_silence_is_between_two_moved_bytes() -> None:
    kept = record()
    relay = Relay(kept, CLIENT, CLIENT, 10)
    relay.received(5, 2.0)
    relay.sent(5, 7.0)
    relay.received(1, 8.0)
    assert kept.max_gap == 5.0
    assert kept.moved_at == 8.0


def test_a_relay_that_discards_takes_no_room_and_keeps_no_silence_from_being_one() -> None:
    kept = record()
    relay = Relay(kept, CLIENT, UPSTREAM, 10)
    relay.received(10, 1.0)
    relay.pause(1.0)
    relay.discard()
    assert relay.wants_read
    assert not relay.wants_write
    relay.received(10, 5.0)
    assert relay.wants_read
    assert kept.moved_at == 1.0
    assert relay.bytes_in == 20
    relay.ended(6.0)
    relay.ended(7.0)
    assert relay.finished
    assert relay.ended_at == 6.0
