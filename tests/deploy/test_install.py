"""What the installer, its removal and the Debian package leave on a machine: what they promise, and
nothing else. These machines have a network of their own, so that no port is in the others' way.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import ROOT, Machine, run, until

pytest_plugins = ["installed"]

UNITS = "/usr/local/lib/systemd/system"
INSTALL = ROOT / "deploy/install"
UNINSTALL = "/opt/triptych/uninstall"
# where files come and go without us: the first start of a machine, the journal, what systemd notes
RESTLESS = ("/dev", "/proc", "/run", "/sys", "/*tmp", "/var/*tmp", "/var/lib/systemd", "/var/log/journal")
# of dpkg itself, not of a package
RESTLESS_DPKG = ("/var/lib/dpkg", "/var/log/dpkg.log", "/var/cache")


@pytest.fixture
def bare(root: Path, wheels: Path, tmp_path: Path) -> Iterator[Machine]:
    """A machine without Triptych; it finds the test's folder by the name that it has here."""
    machine = Machine(root, [ROOT / "deploy", wheels, tmp_path], network=False)
    try:
        yield machine
    finally:
        machine.off()


def files(machine: Machine) -> set[str]:
    pruned = [word for path in (*RESTLESS, *RESTLESS_DPKG) for word in ("-path", path, "-o")][:-1]
    return set(machine("find", "/", "(", *pruned, ")", "-prune", "-o", "-print").splitlines())


def start(machine: Machine) -> None:
    machine("systemctl", "enable", "--now", "triptych.target")
    for service in ("echo", "proxy"):
        unit = f"triptych-{service}@twisted.service"
        until(lambda unit=unit: machine.show(unit, "ActiveState") == "active", unit)  # type: ignore[misc]


def test_uninstall_leaves_what_it_names_and_nothing_else(bare: Machine, wheels: Path) -> None:
    before = files(bare)
    said = bare(INSTALL, "--wheels", wheels)
    assert "installed triptych-" in said
    assert "systemctl enable --now triptych.target" in said
    # nothing runs and nothing will, until somebody says so
    assert bare("systemctl", "list-units", "--plain", "--no-legend", "triptych*") == ""
    start(bare)
    said = bare(UNINSTALL)
    named = {line.strip() for line in said.splitlines()[1:]}
    assert named == {
        "/etc/triptych",
        "/etc/logrotate.d/triptych",
        "/var/log/triptych",
        "/var/log/private/triptych",
    }
    left = files(bare) - before - {"/var/log/private"}
    assert {
        path for path in left if not any(path == each or path.startswith(f"{each}/") for each in named)
    } == set()
    assert named <= left
    assert before <= files(bare)
    assert bare("systemctl", "list-units", "--all", "--plain", "--no-legend", "triptych*") == ""


def test_installing_again_upgrades_and_keeps_configuration_and_what_runs(bare: Machine, wheels: Path) -> None:
    bare(INSTALL, "--wheels", wheels)
    start(bare)
    pid = bare.show("triptych-proxy@twisted.service", "MainPID")
    bare.write("/etc/triptych/proxy.toml", bare.path("/etc/triptych/proxy.toml").read_text() + "# mine\n")
    # a unit that this version has no more
    bare.write(f"{UNITS}/triptych-old.service", "[Service]\nExecStart=/bin/true\n")
    bare.write(
        "/opt/triptych/installed",
        f"{UNITS}/triptych-old.service\n" + bare.path("/opt/triptych/installed").read_text(),
    )
    said = bare(INSTALL, "--wheels", wheels)
    assert "kept /etc/triptych/proxy.toml; this version's is /etc/triptych/proxy.toml.new" in said
    assert bare.path("/etc/triptych/proxy.toml").read_text().endswith("# mine\n")
    assert (
        bare.path("/etc/triptych/proxy.toml.new").read_text()
        == (ROOT / "deploy/config/proxy.toml").read_text()
    )
    assert not bare.path("/etc/triptych/echo.toml.new").exists()
    assert not bare.path(f"{UNITS}/triptych-old.service").exists()
    assert bare.show("triptych-proxy@twisted.service", "MainPID") == pid
    bare("systemctl", "restart", "triptych-proxy@twisted.service")


def test_an_image_is_installed_into_and_runs_it_once_it_is_booted(
    root: Path, wheels: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    run("cp", "-a", root, image)
    said = run(INSTALL, "--root", image, "--wheels", wheels)
    assert f"systemctl --root={image} enable triptych.target" in said
    machine = Machine(image, network=False)
    try:
        # the first boot enables whatever no preset forbids
        assert machine("systemctl", "is-enabled", "triptych.target", code=1) == "disabled\n"
        start(machine)
    finally:
        machine.off()
    run("systemctl", f"--root={image}", "enable", "triptych.target")
    machine = Machine(image, network=False)
    try:
        assert machine.show("triptych-proxy@twisted.service", "ActiveState") == "active"
    finally:
        machine.off()
    said = run(image / "opt/triptych/uninstall", "--root", image)
    assert f"{image}/etc/triptych" in said
    left = [path for path in image.rglob("*triptych*") if "var/log/journal" not in str(path)]
    assert {str(path.relative_to(image)) for path in left} == {"etc/triptych", "etc/logrotate.d/triptych"}
    shutil.rmtree(image)


def test_wrong_use_of_the_installer_is_one_line(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--bogus"], 64, "install: --bogus: unknown; see"),
        (["--root", tmp_path / "none"], 64, "install: --root needs a folder, not"),
        ([tmp_path / "none.whl"], 64, "no such file"),
        (["--root", ROOT], 69, "has no"),
    ):
        done = subprocess.run([INSTALL, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
        assert message in done.stderr
    assert "--root DIR" in run(INSTALL, "--help")


def test_the_debian_package_comes_runs_and_goes(bare: Machine, tmp_path: Path, wheels: Path) -> None:
    # from the checkout itself, without the wheels made before
    run(ROOT / "deploy/debian/build", tmp_path)
    [package] = tmp_path.glob("triptych_*.deb")
    before = files(bare)
    bare("dpkg", "--install", package)
    # the two ways to install keep out of each other's way
    bare(INSTALL, "--wheels", wheels, code=69)
    bare.write("/etc/triptych/echo.toml", bare.path("/etc/triptych/echo.toml").read_text() + "# mine\n")
    start(bare)
    # all that was written is the package's: Python found its modules compiled
    assert bare("sh", "-c", "dpkg --verify triptych | grep -v '/etc/triptych/echo.toml$' || :") == ""
    bare("dpkg", "--install", package)
    assert bare.path("/etc/triptych/echo.toml").read_text().endswith("# mine\n")
    bare("dpkg", "--remove", "triptych")
    left = {path for path in files(bare) - before if not path.startswith(("/var/log/", "/etc/triptych/"))}
    assert left == {"/etc/triptych", "/etc/logrotate.d/triptych"}
    bare("dpkg", "--purge", "triptych")
    assert files(bare) - before <= {"/var/log/private"}
    # dpkg takes a folder with it that it brought something into, if no other package names it
    assert before - files(bare) <= {"/opt"}
