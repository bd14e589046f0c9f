"""Echo (rule 21): everything received before FIN is sent back, then FIN."""

from comparisons.scenarios.wire import Observation, Subject, payload, transfer

SMALL = payload(64, seed=11)
LARGE = payload(1_000_003, seed=12)
SIZES = (1, 2, 63, 1_024, 16_384, 65_536, 65_537, 200_000)


def echo_of_everything(subject: Subject) -> Observation:
    """The client sends a megabyte and FIN, hearing its echo at the same time."""
    with subject.connect() as client:
        transfer((client, LARGE, client))
        client.finish()
        return Observation(client.hear_out())


def echo_of_nothing(subject: Subject) -> Observation:
    """The client connects and sends only FIN."""
    with subject.connect() as client:
        client.finish()
        return Observation(client.hear_out())


def echo_after_the_end(subject: Subject) -> Observation:
    """The client sends and finishes before it hears anything."""
    with subject.connect() as client:
        client.push(SMALL)
        client.finish()
        return Observation(client.hear_out())


def echo_of_many_sizes(subject: Subject) -> Observation:
    """One message after another, each heard in full before the next is sent."""
    echoed = 0
    with subject.connect() as client:
        for size in SIZES:
            echoed += transfer((client, payload(size, seed=size), client))
        client.finish()
        heard = client.hear_out()
        return Observation(heard, figures={"echoed": echoed, "intact": client.told_what(client)})


def echo_client_resets(subject: Subject) -> Observation:
    """The client resets after one round trip; the next client finds the service as before."""
    with subject.connect() as client:
        transfer((client, SMALL, client))
        client.reset()
    return echo_after_the_end(subject)
