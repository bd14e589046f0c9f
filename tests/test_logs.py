"""The log layer: whole lines in order, and traffic that never waits for them."""

import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services import logs
from services.logs import Log
from services.vocabulary import ConfigReloaded, EngineStalled, ServiceReady, SessionOpened

ENVELOPE = ["timestamp", "level", "event", "schema", "engine", "instance", "pid", "worker", "seq"]


def note(path: str = "x") -> ConfigReloaded:
    return ConfigReloaded(path=path, added=[], removed=[], kept=[])


OPENED = SessionOpened(
    session="0" * 26,
    pair=None,
    service="echo",
    listener="e",
    transport="tcp",
    client_ip=None,
    client_port=None,
    local_ip=None,
    local_port=None,
)


def lines_of(data: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def script(source: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process with a log of its own, since stdout is a process's."""
    prelude = "import os, sys\nfrom services.logs import Log\nfrom services.vocabulary import *\n"
    return subprocess.Popen([sys.executable, "-c", prelude + source], **options)


def output_of(source: str, **options: Any) -> bytes:
    with script(source, stdout=subprocess.PIPE, **options) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return output


# What a line is ----------------------------------------------------------------------------------


def test_a_line_is_one_flat_object_that_opens_with_the_envelope(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), "info", "blocking", instance="blue", worker=2)
    log.emit(EngineStalled(loop_lag_us=9, open_sessions=4))
    log.close()
    (line,) = lines_of((tmp_path / "log").read_bytes())
    assert list(line) == [*ENVELOPE, "loop_lag_us", "open_sessions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line == {
        "level": "warning",
        "event": "engine_stalled",
        "schema": 1,
        "engine": "blocking",
        "instance": "blue",
        "pid": os.getpid(),
        "worker": 2,
        "seq": 0,
        "loop_lag_us": 9,
        "open_sessions": 4,
    }


def test_lines_of_many_threads_stand_in_the_order_of_seq_without_a_gap(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), "info", "blocking")

    def say() -> None:
        for _ in range(1000):
            log.emit(note())

    threads = [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [line["seq"] for line in lines_of((tmp_path / "log").read_bytes())] == list(range(4000))


def test_what_is_below_the_level_takes_no_seq(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), "warning", "blocking")
    for _ in range(2):
        log.emit(OPENED)
        log.emit(note())
        log.emit(EngineStalled(loop_lag_us=9, open_sessions=4))
    log.close()
    written = lines_of((tmp_path / "log").read_bytes())
    assert [(line["event"], line["seq"]) for line in written] == [
        ("engine_stalled", 0),
        ("engine_stalled", 1),
    ]


def test_timestamps_are_now_in_utc(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), "info", "blocking")
    before = time.time()
    log.emit(note())
    after = time.time()
    log.close()
    (line,) = lines_of((tmp_path / "log").read_bytes())
    fraction = float(f"0.{line['timestamp'][20:26]}")
    moments = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) for moment in (before, after)]
    assert line["timestamp"][:19] in moments
    # truncated to microseconds
    assert moments[0] != moments[1] or before % 1 - 2e-6 <= fraction <= after % 1


# a file that is made for every example is what takes the time
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(st.characters()), min_size=1, max_size=5))
def test_any_text_becomes_one_line_of_ascii_that_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    log = Log(str(path), "info", "blocking")
    log.emit(ServiceReady(addresses=texts, start_us=0))
    for text in texts:
        log.emit(note(text))
    log.close()
    data = path.read_bytes()
    assert data.isascii()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", data)
    first, *others = lines_of(data)
    # what is no text at all (a file name that is not UTF-8) is told as an escape
    expected = [text.encode(errors="backslashreplace").decode() for text in texts]
    assert first["addresses"] == expected
    assert [line["path"] for line in others] == expected


# What becomes of the traffic ---------------------------------------------------------------------

STALL = """
import time
os.set_blocking(1, {blocking})
log = Log("-", "info", "blocking")
slowest = 0
for _ in range(30_000):
    before = time.perf_counter()
    log.emit(ServiceDraining(reason="x" * 100, open_sessions=0, deadline_us=0))
    slowest = max(slowest, time.perf_counter() - before)
print(slowest, log.dropped, file=sys.stderr, flush=True)
sys.stdin.readline()
time.sleep(0.3)
for _ in range(5):
    log.emit(ConfigReloaded(path="after", added=[], removed=[], kept=[]))
log.close()
print(log.dropped, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "blocking", [pytest.param(True, id="blocking"), pytest.param(False, id="non-blocking")]
)
def test_a_stalled_reader_costs_lines_that_are_counted_and_no_time(blocking: bool) -> None:
    pipe = subprocess.PIPE
    with script(STALL.format(blocking=blocking), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stderr is not None
        slowest, dropped = process.stderr.readline().split()
        # nobody has read a byte so far; a pipe holds far less than 30,000 lines
        assert int(dropped) >= 30_000 - 2 * logs.QUEUE - 1000
        assert float(slowest) < 1
        output, rest = process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    lines = lines_of(output)
    told = sum(line["lines"] for line in lines if line["event"] == "log_dropped")
    gaps = sum(after["seq"] - before["seq"] - 1 for before, after in pairwise(lines))
    assert told == gaps == int(dropped) == int(rest)
    # as soon as there was room, and not at the end
    assert [line["event"] for line in lines[-6:]] == ["log_dropped", *["config_reloaded"] * 5]
    assert lines[0]["seq"] == 0


def test_a_line_of_a_quiet_time_goes_out_at_once() -> None:
    reader, writer = os.pipe()
    log = Log(f"/dev/fd/{writer}", "info", "blocking")
    try:
        for number in range(3):
            log.emit(note(str(number)))
            readable, _, _ = select.select([reader], [], [], 5)
            assert readable
            assert f'"path":"{number}"' in os.read(reader, 65536).decode()
    finally:
        log.close()
        os.close(reader)
        os.close(writer)


def test_close_ends_within_its_deadline_though_nobody_reads() -> None:
    reader, writer = os.pipe()
    log = Log(f"/dev/fd/{writer}", "info", "blocking")
    try:
        for _ in range(2000):
            log.emit(note("x" * 100))
        before = time.monotonic()
        log.close(timeout=0.2)
        assert 0.1 < time.monotonic() - before < 5
    finally:
        os.close(reader)
        os.close(writer)


def test_a_process_ends_though_its_blocking_stdout_is_stalled() -> None:
    source = """
log = Log("-", "info", "blocking")
for _ in range(2000):
    log.emit(ConfigReloaded(path="x" * 100, added=[], removed=[], kept=[]))
log.close(timeout=0.2)
"""
    with script(source, stdout=subprocess.PIPE) as process:
        assert process.wait(timeout=30) == 0


def test_what_is_emitted_after_close_is_dropped_and_counted(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), "info", "blocking")
    log.close()
    log.emit(note())
    log.close()
    assert log.dropped == 1
    assert not (tmp_path / "log").read_bytes()


def test_a_reader_that_is_gone_costs_lines_but_neither_errors_nor_processor_time() -> None:
    reader, writer = os.pipe()
    log = Log(f"/dev/fd/{writer}", "info", "blocking")
    os.close(reader)
    os.close(writer)
    log.emit(note())
    log.emit(note())
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25
    log.close()
    assert log.dropped == 2


def test_a_full_disk_costs_lines_but_no_errors() -> None:
    log = Log("/dev/full", "info", "blocking")
    for _ in range(5):
        log.emit(note())
    log.close()
    assert log.dropped == 5


def test_lines_go_on_whole_once_a_full_disk_has_room_again(tmp_path: Path) -> None:
    source = """
import resource, time
log = Log(sys.argv[1], "info", "blocking")
# a file that may not grow beyond this is a disk that is full in the middle of a line
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
for _ in range(10):
    log.emit(ConfigReloaded(path="before", added=[], removed=[], kept=[]))
while not log.dropped:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
time.sleep(0.1)
log.emit(ConfigReloaded(path="after", added=[], removed=[], kept=[]))
log.close()
print(log.dropped)
"""
    path = tmp_path / "log"
    prelude = "import os, sys\nfrom services.logs import Log\nfrom services.vocabulary import *\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + source, path], check=True, capture_output=True, timeout=30
    )
    whole, torn = [], 0
    for line in path.read_bytes().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn += 1
    assert torn == 1
    assert [line["event"] for line in whole[-2:]] == ["config_reloaded", "log_dropped"]
    assert whole[-2]["path"] == "after"
    assert whole[-1]["lines"] == int(done.stdout) == 12 - len(whole)


# Where lines go ----------------------------------------------------------------------------------


def test_a_file_is_appended_to_and_not_for_everybody_to_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        log = Log(str(path), "info", "blocking")
        log.emit(note())
        log.close()
    assert len(lines_of(path.read_bytes())) == 2
    assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0


def test_a_log_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Log(str(tmp_path / "none" / "log"), "info", "blocking")
    with pytest.raises(IsADirectoryError):
        Log(str(tmp_path), "info", "blocking")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device"):
        Log(str(tmp_path / "fifo"), "info", "blocking")


def test_a_closed_stdout_is_an_error_at_the_start_and_not_a_socket_later() -> None:
    source = """
try:
    Log("-", "info", "blocking")
except OSError as error:
    print(error, file=sys.stderr)
"""
    with script(source, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1)) as process:
        _, told = process.communicate(timeout=30)
    assert told == b"stdout is closed; use --log FILE\n"


def test_lines_for_journald_carry_their_priority() -> None:
    source = """
status = os.fstat(1)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
log = Log("-", "info", "blocking")
log.emit(ConfigReloaded(path="x", added=[], removed=[], kept=[]))
log.emit(EngineStalled(loop_lag_us=1, open_sessions=1))
log.emit(UpstreamDown(pool="p", upstream="u", reason="r"))
log.close()
"""
    lines = output_of(source).splitlines()
    assert [line[:3] for line in lines] == [b"<6>", b"<4>", b"<3>"]
    assert [json.loads(line[3:])["seq"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("stream", ["1:2", "", "x", "1:2:3"])
def test_another_stream_than_journald_gave_has_no_priorities(stream: str) -> None:
    source = 'log = Log("-", "info", "blocking")\nlog.emit(ConfigReloaded(path="x", added=[], removed=[], kept=[]))\nlog.close()'
    (line,) = lines_of(output_of(source, env={**os.environ, "JOURNAL_STREAM": stream}))
    assert line["path"] == "x"


def test_twisted_taking_over_stdout_does_not_break_the_log() -> None:
    source = """
from twisted.logger import globalLogBeginner
log = Log("-", "info", "twisted")
globalLogBeginner.beginLoggingTo([lambda event: None])
print("not a line of the log")
log.emit(ConfigReloaded(path="x", added=[], removed=[], kept=[]))
log.close()
"""
    (line,) = lines_of(output_of(source))
    assert line["path"] == "x"


# What a terminal gets ----------------------------------------------------------------------------


def on_terminal(source: str, **environment: str) -> str:
    """What `source` writes when its stdout is a terminal."""
    ours, theirs = pty.openpty()
    base = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    try:
        with script(source, stdout=theirs, env={**base, "TERM": "xterm", **environment}) as process:
            assert process.wait(timeout=30) == 0
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def sourced(events: Sequence[str]) -> str:
    said = "\n".join(f"log.emit({event})" for event in events)
    return f'log = Log("-", "debug", "blocking")\n{said}\nlog.close()'


def test_a_terminal_gets_text_without_what_is_null_or_always_the_same() -> None:
    opened = 'SessionOpened(session="0"*26, pair=None, service="echo", listener="e", transport="tcp", '
    opened += "client_ip=None, client_port=None, local_ip=None, local_port=None)"
    text = on_terminal(
        sourced(['ServiceReady(addresses=["127.0.0.1:7", "[::1]:7"], start_us=5)', opened]), NO_COLOR="1"
    )
    ready, session = text.splitlines()
    assert re.match(r"\S+Z \[info +\] service_ready +engine=blocking addresses=\S+ start_us=5$", ready)
    assert "addresses=127.0.0.1:7,[::1]:7" in ready
    assert re.match(r"\S+Z \[debug +\] session_opened +engine=blocking session=0{26} service=echo", session)
    assert not {"pair", "client_ip", "seq", "pid", "None"} & set(re.findall(r"\w+", session))


def test_a_terminal_gets_colours_unless_they_are_refused() -> None:
    source = sourced(['ConfigReloaded(path="x", added=[], removed=[], kept=[])'])
    assert "\x1b[" in on_terminal(source)
    assert "\x1b[" not in on_terminal(source, NO_COLOR="1")
    assert "\x1b[" not in on_terminal(source, TERM="dumb")
    assert "\x1b[" in on_terminal(source, TERM="dumb", FORCE_COLOR="1")


def test_logged_input_cannot_drive_a_terminal() -> None:
    source = sourced(
        [r'ConfigReloaded(path="\x1b[31mred\x9b0m\r\n\u202e\udcff", added=[], removed=[], kept=[])']
    )
    text = on_terminal(source, NO_COLOR="1")
    assert r"path=\x1b[31mred\x9b0m\r\n\u202e\udcff" in text
    assert len(text.splitlines()) == 1


# What it costs -----------------------------------------------------------------------------------


def test_the_log_layer_brings_neither_twisted_nor_rich_and_leaves_both_importable() -> None:
    source = """
print([name for name in ("twisted", "rich") if name in sys.modules])
import rich, twisted.internet
"""
    assert output_of(source) == b"[]\n"
