"""The configuration file is read whole, and every fault of it is told at once, with its path."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.config import (
    Config,
    ConfigError,
    ListenerConfig,
    LogConfig,
    PoolConfig,
    UpstreamConfig,
    from_flags,
    load,
    read,
)
from services.core.addresses import Address
from services.core.admission import Limits
from services.core.faults import Drop, Latency, Reset
from services.core.session import Timeouts

ECHO = '[[listener]]\nname = "e"\naddress = "127.0.0.1:7007"\nservice = "echo"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "triptych.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    return caught.value.faults


def test_a_file_with_one_listener_gets_every_default(tmp_path: Path) -> None:
    assert load(write(tmp_path, ECHO)) == Config(
        listeners=(ListenerConfig(name="e", address=Address("tcp", "127.0.0.1", 7007), service="echo"),)
    )


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
        engine = "blocking"
        [log]
        path = "/var/log/triptych.jsonl"
        level = "debug"
        progress = "1m"
        stats = "1.5s"
        [limits]
        buffer = "1MiB"
        [[listener]]
        name = "front"
        address = "[::1]:8000"
        service = "proxy"
        pool = "redis"
        [[listener]]
        name = "low"
        address = "udp:127.0.0.1:7"
        service = "echo"
        answer_low_ports = true
        [pool.redis]
        upstreams = [{ address = "127.0.0.1:6379" }, { address = "unix:/run/redis.sock" }]
        [timeouts]
        connect = "250ms"
        idle = "2h"
        half_close = "10s"
        drain = "3s"
        dead_peer = "2m"
        udp_idle = "1s"
    """
    assert load(write(tmp_path, text)) == Config(
        engine="blocking",
        log=LogConfig(path="/var/log/triptych.jsonl", level="debug", progress=60.0, stats=1.5),
        limits=Limits(buffer=1024**2),
        listeners=(
            ListenerConfig(name="front", address=Address("tcp", "::1", 8000), service="proxy", pool="redis"),
            ListenerConfig(
                name="low", address=Address("udp", "127.0.0.1", 7), service="echo", answer_low_ports=True
            ),
        ),
        pools={
            "redis": PoolConfig(
                upstreams=(
                    UpstreamConfig(address=Address("tcp", "127.0.0.1", 6379)),
                    UpstreamConfig(address=Address("unix", "/run/redis.sock")),
                )
            )
        },
        timeouts=Timeouts(
            connect=0.25, idle=7200, half_close=10, drain=3, dead_peer=120, udp_idle=1, progress=60
        ),
    )


def test_the_progress_interval_of_the_log_reaches_the_core(tmp_path: Path) -> None:
    assert load(write(tmp_path, f'{ECHO}[log]\nprogress = "5s"\n')).timeouts.progress == 5


def test_all_faults_are_told_at_once_each_with_its_path(tmp_path: Path) -> None:
    text = """
        engine = "asyncio"
        colour = 3
        [log]
        progress = "0s"
        stats = 60
        [limits]
        buffer = "0B"
        [[listener]]
        name = "a"
        adress = "127.0.0.1:1"
        service = "proxy"
        [[listener]]
        name = "a"
        address = "127.0.0.1:8000"
        service = "proxy"
        pool = "redsi"
        [[listener]]
        name = ""
        address = "127.0.0.1:8000"
        service = "echo"
        pool = "redis"
        answer_low_ports = "yes"
        [[listener]]
        name = "u"
        address = "udp:127.0.0.1:8000"
        service = "proxy"
        pool = "redis"
        [pool.redis]
        upstreams = [{ adress = "127.0.0.1:6379" }, { address = "systemd:x" }, 3]
        [pool.empty]
        upstreams = []
        [pool."a b"]
        upstreams = {}
        [timeouts]
        idle = 60
        connect = "-5s"
        drain = "9999h"
        progress = "1s"
    """
    assert set(faults(tmp_path, text)) == {
        "colour: unknown key",
        'engine: expected "blocking", "nonblocking" or "twisted", not "asyncio"',
        "log.progress: must be from 1ms to 596h",
        'log.stats: expected a duration such as "60s", not 60',
        "limits.buffer: must be from 1B to 1GiB",
        'listener[0].adress: unknown key (did you mean "address"?)',
        "listener[0].address: missing",
        "listener[0].pool: a proxy needs a pool",
        'listener[1].name: "a" is the name of listener[0] already',
        'listener[1].pool: there is no pool "redsi" (did you mean "redis"?)',
        'listener[2].name: expected text that is not empty, not ""',
        'listener[2].address: "127.0.0.1:8000" is the address of listener[1] already',
        "listener[2].pool: an echo has no upstreams, so no pool",
        'listener[2].answer_low_ports: expected true or false, not "yes"',
        'pool.redis.upstreams[0].adress: unknown key (did you mean "address"?)',
        "pool.redis.upstreams[0].address: missing",
        "pool.redis.upstreams[1].address: an upstream is HOST:PORT, udp:HOST:PORT or unix:/PATH, not systemd:",
        "pool.redis.upstreams[2]: expected a table, not 3",
        "pool.empty.upstreams: at least one upstream is needed",
        'pool."a b".upstreams: expected an array of tables, not a table',
        'timeouts.idle: expected a duration such as "60s", not 60',
        'timeouts.connect: expected a duration such as "60s", not "-5s"',
        "timeouts.drain: must be from 1ms to 596h",
        "timeouts.progress: unknown key",
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param("", "listener: at least one is needed", id="no listener at all"),
        pytest.param(
            "listener = 3", "listener: expected an array of tables, not 3", id="listener is a number"
        ),
        pytest.param(
            "[listener]", "listener: expected an array of tables, not a table", id="one bracket short"
        ),
        pytest.param("pool = 4", "pool: expected a table, not 4", id="pool is a number"),
        pytest.param("pool.x = 4", "pool.x: expected a table, not 4", id="one pool is a number"),
        pytest.param("[[timeouts]]", "timeouts: expected a table, not an array", id="one bracket too many"),
        pytest.param("engine = 2020-01-01", 'not "2020-01-01"', id="a date"),
        pytest.param("limits.buffer = inf", "limits.buffer: expected a size", id="infinity"),
        pytest.param(
            'limits.buffer = "64kb"', "limits.buffer: expected a size", id="a unit that is not known"
        ),
        pytest.param('limits.buffer = "1.5KiB"', "limits.buffer: expected a size", id="half a KiB"),
        pytest.param(
            'timeouts.idle = "٣s"', "timeouts.idle: expected a duration", id="digits of another script"
        ),
        pytest.param('"\\n" = 1', '"\\n": unknown key', id="a key with a line end"),
    ],
)
def test_a_wrong_kind_is_told_in_one_line(tmp_path: Path, text: str, fault: str) -> None:
    told = faults(tmp_path, text)
    assert any(fault in each for each in told)
    assert all(len(each.splitlines()) == 1 for each in told)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param(b"a = \n", "not TOML: Invalid value (at line 1, column 5)", id="syntax"),
        pytest.param(b"\xff", "not UTF-8 text at byte 0", id="not text"),
        pytest.param(b"a = " + b"[" * 100_000, "not TOML: nested too deeply", id="nested"),
    ],
)
def test_what_is_not_toml_is_told_in_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "triptych.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.faults == [fault]


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.faults == [f"cannot be read: {reason}"]


def test_port_0_may_be_asked_for_twice(tmp_path: Path) -> None:
    text = "".join(
        f'[[listener]]\nname = "{name}"\naddress = "127.0.0.1:0"\nservice = "echo"\n' for name in ("a", "b")
    )
    assert [listener.name for listener in load(write(tmp_path, text)).listeners] == ["a", "b"]


def test_one_port_may_be_had_by_tcp_and_by_udp(tmp_path: Path) -> None:
    text = f'{ECHO}[[listener]]\nname = "u"\naddress = "udp:127.0.0.1:7007"\nservice = "echo"\n'
    assert len(load(write(tmp_path, text)).listeners) == 2


@pytest.mark.parametrize("address", ["unix:/tmp/x.sock", "systemd:x"])
def test_a_path_or_a_descriptor_cannot_be_had_twice(tmp_path: Path, address: str) -> None:
    text = "".join(
        f'[[listener]]\nname = "{name}"\naddress = "{address}"\nservice = "echo"\n' for name in ("a", "b")
    )
    assert faults(tmp_path, text) == [
        f'listener[1].address: "{address}" is the address of listener[0] already'
    ]


def test_only_a_udp_echo_answers_low_ports(tmp_path: Path) -> None:
    assert faults(tmp_path, f"{ECHO}answer_low_ports = true") == [
        "listener[0].answer_low_ports: only a udp echo has use for it"
    ]


KEYS = ["engine", "log", "limits", "listener", "pool", "timeouts", "name", "address", "service", "upstreams"]
VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["echo", "proxy", "1s"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
)


# a busy machine is slow, and that is no fault of the configuration
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_document_is_a_configuration_or_faults_of_one_line_each(document: dict[str, Any]) -> None:
    try:
        read(document)
    except ConfigError as error:
        assert error.faults  # noqa: PT017  a document may be good, so `raises` cannot say it
        assert all(len(fault.splitlines()) == 1 for fault in error.faults)  # noqa: PT017  as above


def test_flags_are_read_as_a_file_is() -> None:
    config = from_flags(
        engine="twisted",
        service="proxy",
        listen=["127.0.0.1:0", "unix:/tmp/x.sock"],
        upstreams=["localhost:6379"],
        log_path="/tmp/log",  # noqa: S108  a path that is read here, not a file
        log_level="error",
    )
    assert config.engine == "twisted"
    assert config.log == LogConfig(path="/tmp/log", level="error")  # noqa: S108  as above
    assert [(each.name, str(each.address), each.pool) for each in config.listeners] == [
        ("proxy-1", "127.0.0.1:0", "upstream"),
        ("proxy-2", "unix:/tmp/x.sock", "upstream"),
    ]
    assert config.pools["upstream"].upstreams == (UpstreamConfig(address=Address("tcp", "localhost", 6379)),)


def test_faults_of_flags_name_the_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        from_flags(
            engine="x",
            service="proxy",
            listen=["nowhere", "udp:127.0.0.1:1"],
            upstreams=["127.0.0.1:0", "udp:127.0.0.1:1", "::1"],
            log_path="",
            log_level="loud",
        )
    assert sorted(caught.value.faults) == [
        '--engine: expected "blocking", "nonblocking" or "twisted", not "x"',
        "--listen: 'nowhere': expected HOST:PORT, as in 127.0.0.1:7007",
        "--listen: a udp listener needs upstreams as in udp:127.0.0.1:53, and upstream has others",
        '--log-level: expected "debug", "info", "warning" or "error", not "loud"',
        '--log: expected text that is not empty, not ""',
        "--upstream: '::1': put an IPv6 address in brackets, as in [::1]:7007",
        "--upstream: an upstream needs a port from 1 to 65535",
        "--upstream: datagrams and streams do not mix: all of them are udp:, or none is",
    ]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ('{ type = "latenzy" }', ".type: expected"),
        ("{ delay = '1s' }", ".type: missing"),
        ("{ type = 5 }", ".type: expected"),
        ("3", ": expected a table, not 3"),
        ('{ type = "latency", deley = "1s" }', '.deley: unknown key (did you mean "delay"?)'),
        ('{ type = "latency" }', ".delay: missing"),
        ('{ type = "latency", delay = 5 }', '.delay: expected a duration such as "60s", not 5'),
        ('{ type = "reset", probability = 2 }', ".probability: expected a number from 0 to 1, not 2"),
        (
            '{ type = "reset", probability = "often" }',
            '.probability: expected a number from 0 to 1, not "often"',
        ),
        ('{ type = "reset", seed = 0.5 }', ".seed: expected a whole number from 0 on, not 0.5"),
        ('{ type = "reset", seed = true }', ".seed: expected a whole number from 0 on, not true"),
        (
            '{ type = "reset", direction = "left" }',
            '.direction: expected "upstream" or "downstream", not "left"',
        ),
        ('{ type = "loss" }', '.type: "loss" is for datagrams, not streams'),
    ],
)
def test_a_fault_that_cannot_be_met_is_told_with_its_path(tmp_path: Path, fault: str, told: str) -> None:
    found = faults(tmp_path, ECHO + f"faults = [{fault}]")
    assert any(line.startswith(f"listener[0].faults[0]{told}") for line in found), found


def test_faults_of_one_name_are_told_apart_or_refused(tmp_path: Path) -> None:
    twice = '{ type = "latency", delay = "1s" }'
    assert faults(tmp_path, ECHO + f"faults = [{twice}, {twice}]") == [
        'listener[0].faults[1].name: "latency_downstream" is the name of listener[0].faults[0] already'
    ]
    named = '{ type = "latency", delay = "1s", name = "other" }'
    assert len(load(write(tmp_path, ECHO + f"faults = [{twice}, {named}]")).listeners[0].faults) == 2


def test_a_stream_fault_is_nothing_for_datagrams(tmp_path: Path) -> None:
    text = ECHO.replace("127", "udp:127") + 'faults = [{ type = "reset" }, { type = "reorder" }]'
    assert faults(tmp_path, text) == ['listener[0].faults[0].type: "reset" is for streams, not datagrams']


def test_fault_flags_go_to_the_listeners_that_can_suffer_them() -> None:
    config = from_flags(
        engine="twisted",
        service="echo",
        listen=["127.0.0.1:1", "udp:127.0.0.1:1"],
        faults=["latency:delay=2ms,probability=0.5,seed=7,direction=upstream", "loss:probability=1", "reset"],
        faults_address="127.0.0.1:8474",
    )
    stream, datagrams = (listener.faults for listener in config.listeners)
    latency = Latency(delay=0.002, probability=0.5, seed=7, direction="upstream")
    assert stream == (latency, Reset())
    assert datagrams == (latency, Drop(probability=1.0))
    assert config.faults is not None


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("latency:delay", "--fault: latency:delay: expected TYPE:KEY=VALUE,..., as in latency:delay=2ms"),
        ("latency:delay=5", '--fault.delay: expected a duration such as "60s", not 5'),
        ("loss", "--fault: loss: no --listen has what this fault is for"),
    ],
)
def test_a_fault_flag_that_cannot_be_met_is_told_as_a_flag(flag: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flags(engine="twisted", service="echo", listen=["127.0.0.1:1", "[::1]:1"], faults=[flag])
    assert caught.value.faults == [told]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("allow = ['10.0.0.0']", None),
        ("allow = ['10.0.0.1/8']", "listener[0].allow[0]: 10.0.0.1/8 has host bits set"),
        ("deny = ['x']", "listener[0].deny[0]: 'x' does not appear to be an IPv4 or IPv6 network"),
        ("deny = [5]", 'listener[0].deny[0]: expected a network such as "192.0.2.0/24", not 5'),
        ("deny = 'x'", 'listener[0].deny: expected an array of networks, not "x"'),
        ("[limits]\nsessions = 0", "limits.sessions: expected a whole number from 1 on, not 0"),
        ("[limits]\nsessions = '5'", 'limits.sessions: expected a whole number from 1 on, not "5"'),
        ("[limits]\nipv4_prefix = 33", "limits.ipv4_prefix: expected a whole number from 1 to 32, not 33"),
    ],
)
def test_a_limit_or_a_list_that_means_nothing_is_told(tmp_path: Path, text: str, told: str | None) -> None:
    if told is None:
        assert load(write(tmp_path, ECHO + text)).listeners[0].lists is not None
    else:
        assert faults(tmp_path, ECHO + text) == [told]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mode = '0660'", "listener[0].mode: only a unix: socket has one"),
        ("owner = 'root'", "listener[0].owner: only a unix: socket has one"),
    ],
)
def test_a_mode_or_an_owner_is_a_unix_socket_s(tmp_path: Path, text: str, told: str) -> None:
    assert faults(tmp_path, ECHO + text) == [told]
    assert not load(write(tmp_path, ECHO.replace("127.0.0.1:7007", "unix:/x") + text)).faults


def test_a_mode_is_octal_and_a_source_is_an_address(tmp_path: Path) -> None:
    text = ECHO.replace("127.0.0.1:7007", "unix:/x") + "mode = 'rw'\n"
    text += '[pool.p]\nupstreams = [{ address = "127.0.0.1:1" }]\nsource = "here"\n'
    assert faults(tmp_path, text) == [
        'listener[0].mode: expected an octal mode such as "0660", not "rw"',
        'pool.p.source: expected an IP address, not "here"',
    ]
