"""`triptych conform`: what is wrong is found out, what is right is kept, and what cannot be shown is said."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Daemon
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from comparisons.conformance import junit, play, report
from comparisons.conformance.play import Verdict
from comparisons.peers import custom, standing
from comparisons.peers.known import KNOWN
from comparisons.scenarios.rules import RULES, TABLE, Rule
from comparisons.scenarios.wire import bound, listen
from services import cli
from services.core.addresses import Address

CONFORM = (sys.executable, "-m", "services.cli", "conform")
FAULTY = (
    f"{sys.executable} {Path(__file__).with_name('faulty_proxy.py')} {{fault}} {{port}} {{upstream_port}}"
)
OURS = (
    f"{sys.executable} -m services.cli proxy --engine nonblocking --listen {{listen}} --upstream {{upstream}}"
)


def conform(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*CONFORM, *arguments], capture_output=True, text=True, timeout=60, check=False)


def rules(*scenarios: str) -> list[Rule]:
    """The first rule that each of these scenarios shows."""
    by_name = {rule.name: rule for rule in reversed(RULES)}
    return [by_name[name] for name in scenarios]


def verdicts_on(fault: str, *scenarios: str) -> dict[str, Verdict]:
    peer = custom.by_command(FAULTY.replace("{fault}", shlex.quote(fault)), None, echo=False)
    return {verdict.rule.name: verdict for verdict in play.play(peer, rules(*scenarios), lambda _: None)}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a proxy that is known to fail."""
    monkeypatch.setattr(play, "LIMIT", 3.0)
    monkeypatch.setattr(standing, "PATIENCE", 3.0)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("fault", "scenario", "seen"),
    [
        pytest.param(fault, scenario, seen, id=fault)
        for fault, scenario, seen in (
            ("truncates", "every_byte_before_the_end", "bytes, not 70001"),
            ("ends both ways", "reply_after_client_end", "the client heard 0 bytes, not 300000"),
            ("swallows half-close", "reply_after_client_end", "the upstream saw timeout, not eof"),
            ("hides resets", "upstream_resets", "the client saw eof, not reset"),
            ("waits for the client", "server_speaks_first", "could not be played to its end: timed out"),
            ("floods", "server_speaks_first", "the client heard"),
            ("leaks", "vanishing_clients", "descriptors_left_over is"),
            ("crashes at a reset", "upstream_resets", "it ended with signal SIGABRT"),
            ("never listens", "server_speaks_first", "does not listen on 127.0.0.1"),
            ("does not start", "server_speaks_first", "status 1, saying 'faulty: no such luck'"),
        )
    ],
)
def test_a_fault_is_found_out_by_the_rule_that_it_breaks(fault: str, scenario: str, seen: str) -> None:
    verdict = verdicts_on(fault, scenario)[scenario]
    assert verdict.status == "broken"
    assert seen in verdict.seen


def test_the_same_proxy_without_a_fault_keeps_those_rules() -> None:
    scenarios = (
        "reply_after_client_end",
        "every_byte_before_the_end",
        "upstream_resets",
        "server_speaks_first",
        "vanishing_clients",
    )
    verdicts = verdicts_on("none", *scenarios)
    assert {name: verdict.status for name, verdict in verdicts.items()} == dict.fromkeys(scenarios, "kept")


@pytest.mark.usefixtures("soon")
def test_a_proxy_that_crashed_is_started_anew_for_the_next_rule() -> None:
    verdicts = verdicts_on("crashes at a reset", "upstream_resets", "server_speaks_first", "client_resets")
    assert [verdict.status for verdict in verdicts.values()] == ["broken", "kept", "broken"]


def test_a_good_command_passes_and_its_timeouts_are_not_guessed() -> None:
    done = conform("--command", OURS, "--rule", "2,3,8", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (peer,) = json.loads(done.stdout)["peers"]
    statuses = {(verdict["rule"], verdict["status"]) for verdict in peer["verdicts"]}
    assert statuses == {(2, "not configured"), (3, "kept"), (8, "kept")}


def test_a_timeout_that_the_configuration_names_is_set_for_its_rule(tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text(
        """
timeouts = { idle = "{idle_ms}ms", half_close = "{half_close_ms}ms" }
listener = [{ name = "own", address = "{listen}", service = "proxy", pool = "own" }]
pool.own.upstreams = [{ address = "{upstream}" }]
""",
        encoding="utf-8",
    )
    peer = custom.by_command(
        f"{sys.executable} -m services.cli serve --config {{config}}", config, echo=False
    )
    wanted = rules("idle_from_the_start", "half_closed_by_the_client", "dial_never_answered")
    statuses = [verdict.status for verdict in play.play(peer, wanted, lambda _: None)]
    assert statuses == ["kept", "kept", "not configured"]


def test_an_address_that_is_up_is_tested_as_far_as_it_can_be_seen(daemon: Callable[..., Daemon]) -> None:
    with listen(Address("tcp", "127.0.0.1")) as chooser:
        upstream = bound(chooser)
    listener = {"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "own"}
    running = daemon("nonblocking", [listener], {"own": [upstream]})
    addresses = ("--address", str(running.addresses[0]), "--upstream-listen", str(upstream))
    done = conform(*addresses, "--rule", "0,8,15,18", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (peer,) = json.loads(done.stdout)["peers"]
    statuses = {(verdict["rule"], verdict["status"]) for verdict in peer["verdicts"]}
    assert statuses == {
        (0, "not observable"),
        (8, "kept"),
        (15, "kept"),
        (18, "not configured"),
        (18, "not observable"),
    }


def test_an_echo_service_is_asked_only_what_is_about_echo(daemon: Callable[..., Daemon]) -> None:
    running = daemon("blocking", [{"name": "echo", "address": "udp:127.0.0.1:0", "service": "echo"}])
    done = conform("--echo", "--address", str(running.addresses[0]), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (peer,) = json.loads(done.stdout)["peers"]
    kept = {verdict["rule"] for verdict in peer["verdicts"] if verdict["status"] == "kept"}
    assert kept == {19, 20}
    assert not [verdict for verdict in peer["verdicts"] if verdict["status"] in {"broken", "needs root"}]


def test_an_engine_is_judged_by_its_log_too_and_a_finding_is_none_of_its_faults() -> None:
    verdicts = play.play(KNOWN["twisted"], rules("upstream_resets", "client_dies_idle"), lambda _: None)
    assert [verdict.status for verdict in verdicts] == ["kept", "finding"]
    assert "drops the errno" in verdicts[1].seen


def test_what_is_broken_crosses_the_gate_and_is_told_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    done = conform("--peer", "haproxy", "--peer", "nginx", "--rule", "3,8,19", "--junit", str(path))
    assert done.returncode == 99, done.stdout + done.stderr
    assert done.stderr == ""
    suites = {str(suite.name).split()[0]: cases(suite) for suite in JUnitXml.fromfile(str(path))}
    assert list(suites) == ["haproxy", "nginx"]
    told = {
        (peer, str(case.classname)): [(type(result), str(result.message)) for result in case.result]
        for peer, found in suites.items()
        for case in found
    }
    ((kind, seen),) = told["nginx", "nginx.rule-3"]
    assert kind is Failure
    assert "intact is 0, not 20 to 20" in seen
    title = "FIN follows the last byte, both ways, when nobody read before it"
    assert f"nginx, rule 3: {title}: BROKEN, {seen}" in " ".join(done.stdout.split())
    assert told["haproxy", "haproxy.rule-3"] == told["nginx", "nginx.rule-8"] == []
    assert told["nginx", "nginx.rule-19"] == [(Skipped, "not applicable: this is about an echo")]


def cases(suite: TestSuite) -> list[TestCase]:
    """The cases of a suite whose own counts are true of them."""
    found: list[TestCase] = list(suite)
    kinds = [type(result) for case in found for result in case.result]
    assert (suite.tests, suite.failures, suite.skipped) == (
        len(found),
        kinds.count(Failure),
        kinds.count(Skipped),
    )
    return found


def test_a_peers_last_words_cannot_break_the_xml() -> None:
    (rule,) = rules("upstream_resets")
    said = "it ended, saying '\x1b[31m\x00 <&>\"]]> \ud800'"
    results = report.Results(peers=[report.PeerResults.of("own", "", [Verdict(rule, "broken", said)])])
    (suite,) = JUnitXml.fromstring(junit.document(results))
    ((result,),) = (case.result for case in cases(suite))
    assert result.message == "it ended, saying '\ufffd[31m\ufffd <&>\"]]> \ufffd'"


def test_markdown_counts_what_could_be_played() -> None:
    resets, echoes, grave = rules("upstream_resets", "echo_of_nothing", "write_after_a_complete_response")
    results = report.Results(
        peers=[
            report.PeerResults.of(
                "own",
                "1.2",
                [
                    Verdict(resets, "broken", ""),
                    Verdict(resets, "kept", ""),
                    Verdict(echoes, "not applicable", ""),
                    Verdict(grave, "finding", ""),
                    Verdict(grave, "kept", ""),
                ],
            )
        ]
    )
    head, line, *rows = report.markdown(results).splitlines()
    assert (head, line) == ("| rule | own 1.2 |", "|---|---|")
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["**1 of 2**", "1 of 2 (finding)", ""]
    assert rows[0].startswith("| 4 A reset on one leg")


def test_without_the_rights_it_says_so_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65_534)
    assert cli.main(["conform", "--peer", "haproxy", "--rule", "7"]) == cli.NO_PERMISSION
    assert "haproxy: 4 needs root" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 64, "nothing to test: give --peer, --command or --address"),
        (["--peer", "nginx", "--rule", "24"], 64, "'24' is no rule"),
        (["--peer", "nginx", "--rule", "x"], 64, "'x' is no rule"),
        (["--peer", "nginx", "--rule", "16,17"], 64, "no scenario shows rule 16 and 17 yet"),
        (["--peer", "nginx", "--json", "--markdown"], 64, "give one of them"),
        (["--peer", "nginx", "--echo"], 64, "--echo tells what a --command or an --address is"),
        (["--peer", "nginx", "--upstream-listen", "127.0.0.1:9"], 64, "--upstream-listen is where"),
        (["--command", ""], 64, "the command is empty"),
        (["--command", "proxy '"], 64, "No closing quotation"),
        (["--command", "proxy {listen}"], 64, "nothing says where it dials"),
        (["--command", "proxy {listen} {upstream} {config}"], 64, "--config and {config}"),
        (["--command", "no-such-proxy {listen} {upstream}"], 69, "no-such-proxy is not installed"),
        (["--address", "192.0.2.1:80", "--echo"], 64, "expected a port of 127.0.0.1"),
        (["--address", "127.0.0.1:80"], 64, "a proxy needs one"),
        (["--address", "127.0.0.1:80", "--upstream-listen", "[::1]:9"], 64, "must be of one kind"),
        (["--address", "udp:127.0.0.1:80", "--upstream-listen", "udp:127.0.0.1:9"], 64, "no rule is about"),
    ],
)
def test_bad_usage_costs_one_line(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["conform", *arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("triptych: ")
    assert said in output.err
    assert output.err.count("\n") == 1


def test_every_rule_of_the_table_has_its_sentence_and_every_scenario_a_title_of_its_own() -> None:
    assert sorted(TABLE) == list(range(24))
    assert {rule.number for rule in RULES} | set(play.without_scenario()) == set(TABLE)
    assert not {rule.number for rule in RULES} & set(play.without_scenario())
    assert len({rule.title for rule in RULES}) == len(RULES)
