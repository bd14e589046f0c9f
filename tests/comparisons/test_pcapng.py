"""Recordings as captures, read by tshark."""

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparisons.recordings.format import SHIPPED, VERSION, Conversation, Header, Recording, Side, Step, load
from comparisons.recordings.pcapng import export
from services.cli import main

BEGAN = 1_700_000_000_000_000
HEADER = Header(VERSION, began_us=BEGAN)
# what is no fault of the frames: Wireshark remarks on who closes first
REMARKS = {"This frame initiates the connection closing", "This frame undergoes the connection closing"}

TALK = [
    Step(10, "client", "data", b"question"),
    Step(250_000, "server", "data", b"answer" * 1000),
    Step(250_100, "client", "end"),
    Step(250_200, "server", "end"),
]


def tshark(path: Path, *arguments: str) -> str:
    checked = ["-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"]
    done = subprocess.run(
        ["tshark", "-r", str(path), *checked, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def written(path: Path, conversations: Sequence[Conversation]) -> Path:
    path.write_bytes(b"".join(export(Recording(HEADER, list(conversations)))))
    return path


def read(path: Path, streams: int) -> tuple[list[str], list[dict[Side, bytes]]]:
    """What tshark finds wrong with any packet, from a note upwards, and what it puts together of the first streams:
    lines of hexadecimal, the server's with a tab. One run, since starting it takes the most time.
    """
    follow = [part for number in range(streams) for part in ("-z", f"follow,tcp,raw,{number}")]
    complaints: list[str] = []
    followed: list[dict[Side, bytes]] = [{"client": b"", "server": b""} for _ in range(streams)]
    stream = -1
    for line in tshark(path, "-q", "-z", "expert,note", *follow).splitlines():
        if line.startswith("Filter: tcp.stream eq "):
            stream = int(line.split()[-1])
        elif line.startswith("==="):
            stream = -1
        elif stream >= 0:
            with contextlib.suppress(ValueError):  # the frame around it
                followed[stream]["server" if line.startswith("\t") else "client"] += bytes.fromhex(line)
        elif line.strip() and line.split()[0].isdigit() and not any(each in line for each in REMARKS):
            complaints.append(line)
    return complaints, followed


def said(conversation: Conversation) -> dict[Side, bytes]:
    found: dict[Side, bytes] = {"client": b"", "server": b""}
    for step in conversation.steps:
        found[step.who] += step.data
    return found


@pytest.mark.parametrize("name", ["http", "redis"])
def test_tshark_reads_a_shipped_recording_without_a_complaint_and_with_the_same_bytes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{name}.pcapng"
    assert main(["recording", "export", name, str(path)]) == 0
    recording = load(name)
    # streams are numbered as they begin
    assert read(path, 4) == ([], [said(each) for each in recording.conversations[:4]])
    assert path.stat().st_mode & 0o777 == 0o600
    assert f"{len(recording.conversations)} conversations" in capsys.readouterr().out


def test_a_spoilt_packet_would_be_complained_of(tmp_path: Path) -> None:
    path = written(tmp_path / "spoilt.pcapng", [Conversation(0, TALK, "127.0.0.1:5", "127.0.0.1:7")])
    path.write_bytes(path.read_bytes().replace(b"question", b"quastion"))
    complaints, _ = read(path, 1)
    assert "Checksum" in complaints[0]


def test_http_is_dissected_in_the_order_of_the_requests(tmp_path: Path) -> None:
    path = written(tmp_path / "http.pcapng", load("http").conversations)
    found = tshark(path, "-Y", "tcp.stream == 0 && http", "-T", "fields", "-e", "http.request.uri")
    assert found.split() == ["/", "/style.css", "/missing", "/book.txt"]
    answers = tshark(
        path, "-Y", "tcp.stream == 0 && http.response", "-T", "fields", "-e", "http.response.code"
    )
    assert answers.split() == ["200", "200", "404", "200"]


@pytest.mark.parametrize(
    ("client", "server", "shown"),
    [
        ("10.1.2.3:50000", "10.9.8.7:80", ("10.1.2.3", "10.9.8.7", "50000", "80")),
        ("[2001:db8::7]:50000", "[::1]:80", ("2001:db8::7", "::1", "50000", "80")),
        ("10.1.2.3:50000", "[fe80::1%eth0]:80", ("::ffff:10.1.2.3", "fe80::1", "50000", "80")),
        ("", "unix:/run/x.sock", ("192.0.2.2", "192.0.2.1", "49152", "1")),
    ],
)
def test_addresses_and_times_are_those_of_the_recording(
    client: str, server: str, shown: tuple[str, ...], tmp_path: Path
) -> None:
    path = written(tmp_path / "one.pcapng", [Conversation(2_000_000, TALK, client, server)])
    fields = ["_ws.col.Source", "_ws.col.Destination", "tcp.srcport", "tcp.dstport", "frame.time_epoch"]
    rows = [
        line.split("\t")
        for line in tshark(
            path, "-Y", "tcp.len > 0", "-T", "fields", *(part for each in fields for part in ("-e", each))
        ).splitlines()
    ]
    assert tuple(rows[0][:4]) == shown
    assert rows[0][4] == "1700000002.000010000"
    assert rows[1][4] == "1700000002.250000000"


def test_a_reset_is_a_reset_of_the_side_that_sent_it(tmp_path: Path) -> None:
    steps = [Step(0, "client", "data", b"x"), Step(1, "server", "reset")]
    path = written(tmp_path / "reset.pcapng", [Conversation(0, steps, "127.0.0.1:5", "127.0.0.1:6")])
    found = tshark(path, "-Y", "tcp.flags.reset == 1", "-T", "fields", "-e", "tcp.srcport", "-e", "tcp.seq")
    assert found.split() == ["6", "1"]


streams = st.lists(
    st.tuples(
        st.sampled_from(["client", "server"]), st.binary(min_size=1, max_size=40), st.sampled_from([1, 100])
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=5, deadline=None)  # each starts tshark
@given(st.lists(streams, min_size=1, max_size=4), st.booleans())
def test_whatever_was_said_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, given: list[list[tuple[Side, bytes, int]]], six: bool
) -> None:
    host = "[::1]" if six else "127.0.0.1"
    conversations = [
        Conversation(
            number,
            [Step(0, who, "data", data * times) for who, data, times in each]
            + [Step(9, "server", "end"), Step(9, "client", "end")],
            f"{host}:{5000 + number}",
            f"{host}:7",
        )
        for number, each in enumerate(given)
    ]
    path = written(tmp_path_factory.mktemp("capture") / "some.pcapng", conversations)
    # port 7 is echo's, which has no rules to complain of
    assert read(path, len(given)) == ([], [said(each) for each in conversations])


def test_an_export_never_overwrites_and_is_named_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pcapng"
    path.write_bytes(b"mine")
    recording = str(SHIPPED / "http.recording")
    assert main(["recording", "export", recording, str(path)]) == 64
    assert main(["recording", "export", recording, str(tmp_path / "x.pcap")]) == 64
    assert path.read_bytes() == b"mine"
    first, second = capsys.readouterr().err.splitlines()
    assert "exists; remove it or name another" in first
    assert "name it .pcapng" in second
