"""The command `triptych`: flags in, one line for every fault, sysexits codes out.

A command imports what it needs when it runs: `triptych echo` with a loop of its own loads neither
Twisted nor anything of `comparisons`, which this package names here only, as text.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
from msgspec.structs import replace

from services import systemd
from services.config import ENGINES, Config, ConfigError, Source, from_flags, load
from services.lazy import LazyGroup
from services.vocabulary import Level

USAGE, UNAVAILABLE, OS_ERROR, NO_PERMISSION, CONFIGURATION = 64, 69, 71, 77, 78
# as a shell tells a death by SIGINT
INTERRUPTED = 130

# name: where the command is, and its line in `triptych --help`, which must not load it
LAZY = {
    "status": ("services.operate:status", "Show what the running daemons do."),
    "upstream": ("services.operate:upstream", "Drain, enable or weight an upstream."),
    "session": ("services.operate:session", "Close a session."),
    "compare": ("comparisons.compare:command", "Run the three engines on the same workloads."),
    "split": ("comparisons.sidebyside.split:command", "Deal the sessions of one port to the three engines."),
    "shadow": (
        "comparisons.sidebyside.shadow:command",
        "One engine answers, the others' answers are compared.",
    ),
    "record": ("comparisons.recordings.record:command", "Keep real conversations with their timing."),
    "replay": ("comparisons.recordings.replay:command", "Play them again."),
    "recording": ("comparisons.recordings.commands:group", "Look into a recording, or export it."),
    "conform": ("comparisons.conform:command", "Test any proxy against the behaviour table."),
    "logs": ("comparisons.logs.commands:group", "Read what the daemons wrote."),
}

# where a context remembers which of them was asked for
LAZY_COMMAND = "services.cli.lazy_command"


class NeedsExtra(click.ClickException):
    exit_code = UNAVAILABLE


class Commands(LazyGroup):
    """The commands of this package, and those of `comparisons`, which an extra may be missing for."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.lazy:
            ctx.meta[LAZY_COMMAND] = cmd_name
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            # a module of ours that is missing is a bug, which no extra mends
            if LAZY_COMMAND not in ctx.meta or (error.name or "").startswith(("comparisons.", "services")):
                raise
            command = ctx.meta[LAZY_COMMAND]
            raise NeedsExtra(f"{command} needs the extra: pip install 'triptych[compare]'") from error


class Flags(NamedTuple):
    """What `echo` and `proxy` were given, but for the engine."""

    listen: tuple[str, ...]
    upstream: tuple[str, ...]
    faults: tuple[str, ...]
    fault_api: str | None
    log: str
    log_level: str

    def config(self, service: str, engine: str) -> Config:
        """ConfigError as `config.from_flags`."""
        return from_flags(
            engine=engine,
            service=service,
            listen=self.listen,
            upstreams=self.upstream,
            faults=self.faults,
            faults_address=self.fault_api,
            log_path=self.log,
            log_level=self.log_level,
        )

    def arguments(self, service: str, engine: str) -> list[str]:
        """The command of a process with this engine and these flags."""
        several = {"--listen": self.listen, "--upstream": self.upstream, "--fault": self.faults}
        several["--fault-api"] = (self.fault_api,) if self.fault_api else ()
        command = [service, "--engine", engine, "--log", self.log, "--log-level", self.log_level]
        return command + [part for flag, texts in several.items() for text in texts for part in (flag, text)]


@click.group(cls=Commands, lazy=LAZY)
def triptych() -> None:
    """One echo and proxy service, three I/O models."""


LEVELS = click.Choice(get_args(Level))
listen_option = click.option(
    "--listen", metavar="ADDR", multiple=True, required=True, help="HOST:PORT, udp:HOST:PORT or unix:/PATH."
)
engine_option = click.option(
    "--engine", type=click.Choice([*ENGINES, "all"]), default="nonblocking", show_default=True
)
log_option = click.option("--log", default="-", metavar="PATH", help="A file instead of stdout.")
level_option = click.option("--log-level", type=LEVELS, default="info", show_default=True)
fault_option = click.option(
    "--fault",
    "faults",
    metavar="TYPE:KEY=VALUE,...",
    multiple=True,
    help="Met on purpose, as in latency:delay=20ms,probability=0.5 or reset:after=1s.",
)
fault_api_option = click.option(
    "--fault-api", metavar="ADDR", help="Where Toxiproxy's clients control faults, as in 127.0.0.1:8474."
)


@triptych.command()
@engine_option
@listen_option
@fault_option
@fault_api_option
@log_option
@level_option
def echo(engine: str, **flags: Any) -> int:
    """Send back what comes in."""
    return _serve_flags("echo", engine, Flags(upstream=(), **flags))


@triptych.command()
@engine_option
@listen_option
@click.option("--upstream", metavar="ADDR", multiple=True, required=True, help="HOST:PORT or unix:/PATH.")
@fault_option
@fault_api_option
@log_option
@level_option
def proxy(engine: str, **flags: Any) -> int:
    """Pass sessions on to upstreams, in turn."""
    return _serve_flags("proxy", engine, Flags(**flags))


@triptych.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, metavar="FILE")
@click.option("--engine", type=click.Choice(ENGINES), help="Instead of the file's.")
@click.option("--log", metavar="PATH", help="Instead of the file's.")
@click.option("--log-level", type=LEVELS, help="Instead of the file's.")
@click.option("--instance", default="-", metavar="NAME", help="Of the unit; stands in every log line.")
def serve(path: Path, engine: Any, log: str | None, log_level: Any, instance: str) -> int:
    """Run the daemon that a file describes."""

    def read() -> Config:
        config = load(path)
        return replace(
            config,
            engine=engine or config.engine,
            log=replace(config.log, path=log or config.log.path, level=log_level or config.log.level),
        )

    try:
        config = read()
    except ConfigError as error:
        return _fail_all([f"{path}: {fault}" for fault in error.faults], CONFIGURATION)
    return _run(config, instance, Source(path, read))


@triptych.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, metavar="FILE")
def check(path: Path) -> int:
    """Tell every fault of a configuration file."""
    try:
        load(path)
    except ConfigError as error:
        return _fail_all([f"{path}: {fault}" for fault in error.faults], CONFIGURATION)
    click.echo(f"{'<6>' if systemd.is_journal(1) else ''}{path}: ok")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code."""
    try:
        result = triptych.main(arguments, prog_name="triptych", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "triptych"
        return _fail(f"{error.format_message().rstrip('.')}; see {path} --help", USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except click.Abort:
        return INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = NO_PERMISSION if isinstance(error, PermissionError) else OS_ERROR
        return _fail(f"{where}{error.strerror or error}", code)
    return int(result or 0)


def _serve_flags(service: str, engine: str, flags: Flags) -> int:
    try:
        if engine == "all":
            return _run_all(service, flags)
        config = flags.config(service, engine)
    except ConfigError as error:
        return _fail_all(error.faults, USAGE)
    return _run(config)


def _run_all(service: str, flags: Flags) -> int:
    from services import supervisor  # noqa: PLC0415  only `all` pays for it

    commands = {}
    spread = supervisor.spread(flags.listen)
    apis = supervisor.spread([flags.fault_api]) if flags.fault_api else {}
    for engine, addresses in spread.items():
        api = apis[engine][0] if apis else None
        own = flags._replace(listen=tuple(addresses), fault_api=api)
        # a fault is told once, here, and not by three children
        own.config(service, engine)
        commands[engine] = own.arguments(service, engine)
    for engine, addresses in spread.items():
        # a free port is told by the child that takes it
        known = [address for address in addresses if not address.endswith(":0")]
        if known:
            click.echo(f"triptych: {engine} on {', '.join(known)}", err=True)
    return supervisor.run(commands)


def _run(config: Config, instance: str = "-", source: Source | None = None) -> int:
    from services import daemon  # noqa: PLC0415  `check` and --help need no sockets
    from services.endpoints import EndpointError  # noqa: PLC0415  as above

    try:
        return daemon.run(config, instance=instance, source=source)
    except EndpointError as error:
        return _fail(error.message, error.exit_code)


def _fail_all(faults: Sequence[str], code: int) -> int:
    for fault in faults:
        _fail(fault, code)
    return code


def _fail(message: str, code: int) -> int:
    # sd-daemon(3): an error, also where the journal took stderr for something milder
    priority = "<3>" if systemd.is_journal(2) else ""
    # click breaks some of its messages into lines
    click.echo(f"{priority}triptych: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
