"""`triptych logs tail`, as a process of its own on files, pipes and terminals that are really there."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import NOT_OURS, Process, closed

from comparisons.logs import tail
from comparisons.logs.synthetic import lines
from services.logs import Log
from services.vocabulary import EngineStalled, UpstreamDown

PATIENCE = 20.0
TAIL = (sys.executable, "-m", "services.cli", "logs", "tail")
PLAIN = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}


class Tail:
    """A running `logs tail`, and what it has shown so far."""

    def __init__(self, *arguments: str, terminal: bool = False, **environment: str) -> None:
        # a pty puts a carriage return before each newline
        self._descriptor, end = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [*TAIL, *arguments],
            stdin=subprocess.PIPE,
            stdout=end,
            stderr=subprocess.PIPE,
            env={**PLAIN, "TERM": "xterm", **environment},
        )
        os.close(end)
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def read(self, wait: float = 0.0) -> bool:
        """Reads what there is; False at the end."""
        if not select.select([self._descriptor], (), (), wait)[0]:
            return True
        try:
            data = os.read(self._descriptor, 1 << 16)
        except OSError:
            # the other end of a pty is gone
            return False
        self.text += self._decode(data).replace("\r", "")
        return bool(data)

    def wait_for(self, what: str, count: int = 1) -> str:
        """All that was shown, once this was so often."""
        deadline = time.monotonic() + PATIENCE
        while self.text.count(what) < count:
            assert time.monotonic() < deadline, f"no {count} {what!r} in {self.text[-2000:]!r}"
            assert self.read(0.1), f"ended without {count} {what!r}: {self.text!r}"
        return self.text

    def say(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Its exit code at the end of its input, and all that it showed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        while self.read(PATIENCE):
            pass
        return self.process.wait(PATIENCE), self.text

    def close(self) -> None:
        self.process.kill()
        # what was said last may wait in our buffer
        with suppress(BrokenPipeError), self.process:
            pass
        os.close(self._descriptor)


@pytest.fixture
def start() -> Iterator[Callable[..., Tail]]:
    started: list[Tail] = []

    def start(*arguments: str, **options: bool | str) -> Tail:
        started.append(Tail(*arguments, **options))  # type: ignore[arg-type]  # one is no environment
        return started[-1]

    yield start
    for each in started:
        each.close()


Start = Callable[..., Tail]


def shown(start: Start, text: bytes, *arguments: str, **environment: str) -> str:
    """What is shown of this on standard input."""
    running = start(*arguments, "-", **environment)
    running.say(text)
    code, shown = running.end()
    assert code == 0
    return shown


def test_the_end_of_a_file_is_shown_and_then_what_a_daemon_writes(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "log"
    log = Log(str(path), "info", "twisted")
    for number in range(20):
        log.emit(closed(number, client_ip="127.0.0.1", client_port=number))
    log.close()
    running = start(str(path), "-n", "3")
    text = running.wait_for("127.0.0.1:19 ")
    assert text.count("\n") == 3
    assert "127.0.0.1:17 > proxy" in text.splitlines()[0]
    log = Log(str(path), "info", "twisted")
    log.emit(closed(client_ip="::1", client_port=7, duration_us=12_345, bytes_s2c=1_500, error="ECONNRESET"))
    log.emit(UpstreamDown(pool="redis", upstream="r1", reason="refused"))
    log.close()
    *_, session, down = running.wait_for("upstream_down").splitlines()
    assert (
        "twisted     SF   --  ::1:7 > proxy  12.3 ms  0 B up, 1.50 kB down  ShDdFf  error=ECONNRESET"
        in session
    )
    assert down.endswith("upstream_down pool=redis upstream=r1 reason=refused")


def test_ctrl_c_ends_it_without_a_word(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "log"
    path.write_bytes(Process("twisted").line(closed()) + b"\n")
    running = start(str(path))
    running.wait_for("ShDdFf")
    running.process.send_signal(signal.SIGINT)
    _, errors = running.process.communicate(timeout=PATIENCE)
    # a line end, for the ^C that a terminal shows
    assert (running.process.returncode, errors) == (130, b"\n")


def test_it_ends_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(Process("twisted").line(closed()) + b"\n")
    with subprocess.Popen([*TAIL, str(path)], stdout=subprocess.PIPE, env=PLAIN) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE) == 0


def test_a_rotated_file_is_followed_and_the_old_one_is_read_to_its_end(tmp_path: Path, start: Start) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    said = [Process("twisted").line(closed(bytes_c2s=number)) + b"\n" for number in range(1, 6)]
    path.write_bytes(said[0])
    running = start(str(path))
    running.wait_for("1 B up")
    path.rename(old)
    # a daemon that has not been told yet
    with old.open("ab") as file:
        file.write(said[1])
    running.wait_for("2 B up")
    path.write_bytes(said[2])
    running.wait_for("3 B up")
    with old.open("ab") as file:
        file.write(said[3])
    running.wait_for("4 B up")
    with path.open("ab") as file:
        file.write(said[4])
    assert [int(each) for each in re.findall(r"(\d) B up", running.wait_for("5 B up"))] == [1, 2, 3, 4, 5]


def test_a_truncated_file_is_read_from_its_beginning(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "log"
    process = Process("twisted")
    path.write_bytes(b"".join(process.line(closed()) + b"\n" for _ in range(3)))
    running = start(str(path))
    running.wait_for("ShDdFf", 3)
    path.write_bytes(process.line(closed(history="ShR")) + b"\n")
    running.wait_for("ShR")


def test_a_line_that_is_written_in_two_halves_is_one_line(tmp_path: Path, start: Start) -> None:
    line = Process("twisted").line(closed())
    path = tmp_path / "log"
    path.write_bytes(line[:100])
    running = start(str(path))
    with path.open("ab") as file:
        file.write(line[100:] + b"\n")
        file.write(b"end\n")
    assert "not ours" not in running.wait_for("end").splitlines()[0]


@pytest.mark.parametrize("line", NOT_OURS.values(), ids=list(NOT_OURS))
def test_what_is_not_ours_is_shown_as_such_and_does_nothing_to_a_terminal(line: bytes) -> None:
    assert tail._decoded(line) is None  # noqa: SLF001  a process for each would take half a minute
    text = tail._Renderer(coloured=False).not_ours(line)  # noqa: SLF001  as above
    assert text.startswith("not ours: ")
    assert text.isprintable()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LINE: dict[str, Any] = json.loads(Process("twisted").line(closed(client_ip="::1", error="EPIPE")))


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(sorted(LINE)), ANYTHING, max_size=4).map(
        lambda changed: json.dumps({**LINE, **changed}).encode()
    )
)
def test_any_line_is_shown_as_one_line(raw: bytes) -> None:
    line = tail._decoded(raw)  # noqa: SLF001  as above
    render = tail._Renderer(coloured=False)  # noqa: SLF001  as above
    assert (render.not_ours(raw) if line is None else render(line)).isprintable()


def test_a_name_in_the_log_cannot_act_on_the_terminal(start: Start) -> None:
    process = Process("twisted")
    down = UpstreamDown(pool="\x1b]0;gotcha\x07", upstream="\x9b2J\n", reason="")
    text = shown(start, process.line(down) + b"\n" + process.line(closed(error="\x1b[2J")) + b"\n\x1b[2J\n")
    assert "\x1b" not in text
    assert text.count("\n") == 3
    assert "pool=\\x1b]0;gotcha\\x07" in text


def test_lines_are_chosen_by_engine_event_and_fields(start: Start) -> None:
    log = b""
    for engine in ("blocking", "twisted"):
        process = Process(engine)
        log += process.line(EngineStalled(loop_lag_us=7, open_sessions=1)) + b"\n"
        for termination, took, ip in (("--", 10, "::1"), ("CD", 20, None), ("sC", 30, "::1")):
            log += process.line(closed(termination=termination, duration_us=took, client_ip=ip)) + b"\n"

    def count(*arguments: str) -> int:
        return shown(start, log, *arguments).count("\n")

    assert count() == 8
    assert count("--engine", "twisted") == 4
    assert count("--event", "engine_stalled", "--event", "session_opened") == 2
    assert count("--where", "duration_us>10", "--where", "duration_us<=20") == 2
    assert count("--where", "termination!=--", "--event", "session_closed") == 4
    assert count("--where", "client_ip=null", "--event", "session_closed", "--engine", "blocking") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["-", "--where", "duration>3"], "duration: no such field", id="an unknown field"),
        pytest.param(["-", "--where", "duration_us"], "is no FIELD=VALUE", id="no comparison"),
        pytest.param(["-", "--where", "pid=x"], "pid is a number, and 'x' is none", id="no number"),
        pytest.param(["-", "--event", "opened"], "'opened' is not one of", id="an unknown event"),
    ],
)
def test_a_filter_that_cannot_hold_is_one_line(start: Start, arguments: list[str], said: str) -> None:
    running = start(*arguments)
    _, errors = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 64
    assert said in errors.decode()
    assert errors.count(b"\n") == 1


def test_a_file_that_cannot_be_followed_is_one_line(tmp_path: Path, start: Start) -> None:
    (tmp_path / "log.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name, code in (("absent", 66), ("", 66), ("log.gz", 64)):
        running = start(str(tmp_path / name))
        _, errors = running.process.communicate(timeout=PATIENCE)
        assert running.process.returncode == code
        assert errors.count(b"\n") == 1
        assert str(tmp_path / name) in errors.decode()


def test_the_journal_and_the_logs_of_peers_are_read_too(start: Start) -> None:
    message = Process("twisted").line(closed(history="ShDdfF")).decode()
    journal = json.dumps({"__REALTIME_TIMESTAMP": "1", "MESSAGE": message})
    haproxy = "127.0.0.1:5 [22/Nov/2026:10:00:00.000] front back/r1 0/1/25 190 CD 4/4/4/4/0 0/0"
    text = shown(start, f"{journal}\n{haproxy}\n".encode())
    assert re.search(r"twisted +SF .*ShDdfF\n.*haproxy +- +CD +127.0.0.1:5 > r1  25.0 ms", text)


def test_colours_are_for_terminals_and_for_those_who_ask(start: Start, tmp_path: Path) -> None:
    line = Process("twisted").line(closed()) + b"\n"
    path = tmp_path / "log"
    path.write_bytes(line)
    assert "\x1b[" not in shown(start, line)
    assert "\x1b[33mtwisted" in shown(start, line, FORCE_COLOR="1")
    assert "\x1b[33mtwisted" in start(str(path), terminal=True).wait_for("ShDdFf")
    assert "\x1b[" not in start(str(path), terminal=True, NO_COLOR="1").wait_for("ShDdFf")


def test_a_pipe_gets_every_line_however_slow_it_is(start: Start) -> None:
    text = b"".join(line for line, _ in lines(3_000))
    running = start("-")
    assert running.process.stdin is not None
    feeding = threading.Thread(target=running.say, args=(text,))
    feeding.start()
    # longer than a line would wait for a terminal
    feeding.join(2 * tail.PATIENCE)
    assert feeding.is_alive()
    while running.text.count("\n") < 3_000:
        assert running.read(PATIENCE)
    feeding.join()
    code, text_shown = running.end()
    assert code == 0
    assert text_shown.count("\n") == 3_000


def test_a_terminal_that_does_not_keep_up_is_told_what_it_missed_and_sees_the_newest(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "log"
    path.touch()
    running = start(str(path), terminal=True)
    process = Process("twisted")
    written = 0
    with path.open("ab", buffering=0) as file:
        file.write(process.line(closed()) + b"\n")
        running.wait_for("ShDdFf")
        deadline = time.monotonic() + 3 * tail.PATIENCE
        # nobody reads this terminal, which holds some lines itself
        while time.monotonic() < deadline:
            file.write(b"".join(process.line(closed()) + b"\n" for _ in range(100)))
            written += 100
            time.sleep(0.01)
        file.write(process.line(closed(history="ShR")) + b"\n")
        text = running.wait_for("ShR")
    missed = [int(each.replace(",", "")) for each in re.findall(r"\(([\d,]+) lines not shown", text)]
    assert missed
    assert text.count("ShDdFf") - 1 + sum(missed) == written


def test_it_is_less_than_a_second_behind_a_writer_of_10000_lines_a_second(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "log"
    # a machine that does other things at the time has three tries
    for _ in range(3):
        path.write_bytes(b"")
        behind = lag(path, start(str(path), terminal=True))
        if behind < 1:
            break
    assert behind < 1


def lag(path: Path, running: Tail, rate: int = 10_000, seconds: float = 2.0) -> float:
    """The largest time between the writing of a line and its showing, in seconds."""
    tails = [line[line.index(b",") :] for line, _ in lines(1_000)]
    stop = threading.Event()

    def write() -> None:
        count, start = 0, time.monotonic()
        with path.open("ab", buffering=0) as file:
            while not stop.is_set() and (passed := time.monotonic() - start) < seconds:
                due = int(passed * rate) - count
                now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z".encode()
                file.write(
                    b"".join(
                        b'{"timestamp":"%b"%b' % (now, tails[(count + each) % 1_000]) for each in range(due)
                    )
                )
                count += due
                time.sleep(0.01)
            file.write(Process("twisted").line(closed(history="ShR")) + b"\n")

    # it must have begun before the clock does
    with path.open("ab") as file:
        file.write(Process("twisted").line(closed(history="^")) + b"\n")
    running.wait_for("^")
    writer = threading.Thread(target=write)
    writer.start()
    most = 0.0
    with suppress(AssertionError):
        while "ShR" not in running.text:
            running.text = ""
            assert running.read(PATIENCE)
            now = datetime.now(UTC)
            for stamp in re.findall(r"(\d\d:\d\d:\d\d\.\d{3}) (?!.*\^)", running.text)[:1]:
                then = datetime.strptime(f"{now:%Y-%m-%d} {stamp}+0000", "%Y-%m-%d %H:%M:%S.%f%z")
                # the end's own time is made up
                if "ShR" not in running.text:
                    most = max(most, (now - then).total_seconds())
    stop.set()
    writer.join()
    return most
