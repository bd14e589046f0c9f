"""The operator's commands on a machine: they find the daemons that systemd runs, and change them."""

import json

from machine import ENGINES, Machine, until

pytest_plugins = ["installed"]

TRIPTYCH = "/opt/triptych/bin/triptych"


def test_root_finds_every_daemon_of_the_machine_and_drains_an_upstream_of_all(machine: Machine) -> None:
    machine("systemctl", "start", "triptych.target")
    told = [json.loads(line) for line in machine(TRIPTYCH, "status", "--json").splitlines()]
    assert sorted(each["engine"] for each in told) == sorted([*ENGINES, *ENGINES])
    assert {each["instance"] for each in told} == set(ENGINES)
    (proxy, *_) = [each for each in told if each["pools"]]
    (pool,) = proxy["pools"]
    upstream = pool["upstreams"][0]["upstream"]
    said = machine(TRIPTYCH, "upstream", "drain", pool["pool"], upstream)
    assert said.count(": draining, ") == len(ENGINES)
    machine(TRIPTYCH, "upstream", "enable", pool["pool"], upstream)
    machine("systemctl", "stop", "triptych.target")
    until(lambda: machine("find", "/run/triptych", "-type", "s") == "", "the sockets are gone")
