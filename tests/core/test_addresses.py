"""Addresses are read as they are written, and refused in one line."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.addresses import Address

PORTS = st.integers(0, 65535)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,30}[a-z0-9])?", fullmatch=True)
HOSTS = st.one_of(NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
# what a path or a descriptor's name may be: anything but NUL, and no more than sun_path holds
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=26)

ADDRESSES = st.one_of(
    st.builds(Address, st.sampled_from(["tcp", "udp"]), HOSTS, PORTS),
    st.builds(Address, st.sampled_from(["unix", "systemd"]), PATHS, st.just(0)),
)

# a busy machine is slow, and that is no fault of an address
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(ADDRESSES)
def test_an_address_is_parsed_from_what_it_is_written_as(address: Address) -> None:
    assert Address.parse(str(address)) == address


@patient
@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_fault_of_one_line(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  any text may be an address, so `raises` cannot say it
    else:
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7007", Address("tcp", "127.0.0.1", 7007)),
        ("[::1]:7", Address("tcp", "::1", 7)),
        ("localhost:80", Address("tcp", "localhost", 80)),
        ("udp:0.0.0.0:0", Address("udp", "0.0.0.0", 0)),
        ("udp:[::]:9", Address("udp", "::", 9)),
        ("unix:/run/x.sock", Address("unix", "/run/x.sock")),
        ("systemd:echo", Address("systemd", "echo")),
    ],
)
def test_every_form_of_the_syntax_is_read(text: str, address: Address) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "HOST:PORT"),
        ("7007", "HOST:PORT"),
        (":7007", "HOST:PORT"),
        ("udp:7007", "HOST:PORT"),
        ("localhost", "HOST:PORT"),
        ("localhost:", "the port must be a number"),
        ("localhost:http", "the port must be a number"),
        ("localhost:65536", "from 0 to 65535"),
        ("localhost:-1", "from 0 to 65535"),
        ("localhost:٣", "the port must be a number"),
        ("::1:7007", "in brackets"),
        ("unix:", "needs a path"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
        ("systemd:", "needs a name"),
    ],
)
def test_a_fault_says_what_was_expected(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        Address.parse(text)
