"""The `fedbt` command: run, plan, report, doctor, check, stop."""

import argparse
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.cli.app_folder import installed
from fedbt_app.cli.presets import PRESETS
from fedbt_app.config import RunConfig, defaults, parse_assignment
from fedbt_app.errors import FedBTError

if TYPE_CHECKING:
    from fedbt_app.encoders.architecture import Architecture

SIMULATED_CLIENTS = 4

_Command = Callable[[argparse.Namespace], int | None]  # returns the exit status; None is 0
_AddArguments = Callable[[argparse.ArgumentParser], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 after one line on what to mend."""
    try:
        options = _options(arguments)
        return int(options.command(options) or 0)
    except FedBTError as error:
        print(f"fedbt: error: {error}", file=sys.stderr)
        return 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; settings may stand in any order with options.

    argparse takes KEY=VALUE only in one run: those behind an option are left over.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    stray = [word for word in left if word.startswith("-") or "=" not in word]
    if stray or (left and "settings" not in options):
        parser.error(f"unrecognized arguments: {' '.join(stray or left)}")
    if left:
        options.settings = [*options.settings, *left]
    return options


class _ShowVersion(argparse.Action):
    """Print the installed version, looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"fedbt {installed().version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedbt", description="Adapt one BERT across sites; pay for selected blocks only."
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, command, add_arguments) in _COMMANDS.items():
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=command)
        add_arguments(added)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of config keys, such as conf/*.toml",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="config keys (docs/config.md)"
    )
    group = parser.add_argument_group("config keys as options")
    for key in defaults():
        group.add_argument(f"--{key}", dest=f"key:{key}", metavar="VALUE", help=argparse.SUPPRESS)


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_settings(run)
    run.add_argument(
        "--clients", type=int, metavar="N", help=f"simulated clients (default {SIMULATED_CLIENTS})"
    )
    run.add_argument(
        "--superlink",
        metavar="NAME",
        help="a SuperLink of Flower's config.toml; default: simulate here",
    )
    run.add_argument("--verbose", action="store_true", help="show all of Flower's output")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    _add_settings(plan)
    plan.add_argument(
        "--arch",
        choices=sorted(PRESETS),
        help="dimensions of a well-known BERT, instead of `model`",
    )
    plan.add_argument(
        "--num-labels", type=int, default=2, metavar="N", help="classes or tags (default 2)"
    )
    plan.add_argument(
        "--examples", type=int, default=1000, metavar="N", help="a client's rows (default 1000)"
    )


def _add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument("path", type=Path, metavar="PATH", help="the site's file or folder")
    _add_settings(check)


def _add_stop(stop: argparse.ArgumentParser) -> None:
    stop.add_argument(
        "--all", action="store_true", help="those of all checkouts and environments of this user"
    )


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="output folders with a report.json"
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Merge all keys' defaults, then the file, then KEY=VALUE and --KEY VALUE."""
    values = defaults() | _given(options)
    RunConfig.load(values)
    return values


def _given(options: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if options.config is not None:
        values |= _read_settings(options.config)
    assigned = list(options.settings)
    for key in defaults():
        value = getattr(options, f"key:{key}")
        if value is not None:
            assigned.append(f"{key}={value}")
    return values | dict(map(parse_assignment, assigned))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedBTError(
            f"config file {path}: {error.strerror}; shipped ones are in conf/"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedBTError(f"config file {path} is not TOML: {error}") from None


def _run(options: argparse.Namespace) -> None:
    from fedbt_app.cli import launch
    from fedbt_app.progress import live
    from fedbt_app.report import comparison, report

    if options.clients is not None and options.clients < 1:
        raise FedBTError(f"--clients {options.clients} is too few: simulate at least 1")
    values, clients = _job(options)
    # whoever ends this command ends the run
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with live.progress(values["num-rounds"], options.verbose) as show:
        folder = launch.run(values, clients, options.superlink, options.verbose, show)
    if folder is None:
        kept = RunConfig.load(values).output_folder
        print(f"finished: the report is in {kept} on the SuperLink's machine")
    else:
        comparison.print_result(report.load(folder))


def _job(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return the settings of the run to do, and how many clients to simulate."""
    from fedbt_app.cli.launch import absolute_paths

    clients = options.clients or SIMULATED_CLIENTS
    if options.superlink is not None:  # a run to resume, too, is on the SuperLink's machine
        return settings_of(options), clients
    given = _given(options)
    if given.get("resume"):
        values, clients = _stopped_run(absolute_paths(given, Path.cwd()), options.clients)
    else:
        values = absolute_paths(settings_of(options), Path.cwd())
    values["min-clients"] = min(values["min-clients"], clients)
    return values, clients


def _stopped_run(given: dict[str, Any], clients: int | None) -> tuple[dict[str, Any], int]:
    """Return the settings of the run that `resume` names, and its clients: both are its own."""
    from fedbt_app.server.snapshot import Snapshot

    stopped = Snapshot(Path(given["resume"]))
    config = RunConfig.load(stopped.settings | given)
    stopped.check(config)
    if clients not in (None, stopped.nodes):
        raise FedBTError(
            f"--clients {clients} but the run in {given['resume']} has {stopped.nodes}: drop --clients"
        )
    return config.values(), stopped.nodes


def _plan(options: argparse.Namespace) -> None:
    from fedbt_app.cli.plan_table import preview, print_preview

    config = RunConfig.load(settings_of(options))
    for name, value in (("--num-labels", options.num_labels), ("--examples", options.examples)):
        if value < 1:
            raise FedBTError(f"{name} {value} is too few: give at least 1")
    architecture = _architecture(options.arch, config.model)
    title = (
        f"{config.method}, {config.task}, {options.arch or config.model}: "
        f"one client, {options.examples} rows of {config.max_length} pieces, "
        f"batch {config.batch_size}"
    )
    print_preview(preview(config, architecture, options.num_labels, options.examples), title)


def _architecture(preset: str | None, model: str) -> "Architecture":
    from fedbt_app.encoders.architecture import Architecture
    from fedbt_app.model.checkpoint import find_model, read_config

    if preset:
        return Architecture.from_config(PRESETS[preset], preset)
    folder = find_model(model)
    return Architecture.from_config(read_config(folder), str(folder))


def _doctor(options: argparse.Namespace) -> int:
    from fedbt_app.cli.doctor import examine
    from fedbt_app.cli.findings import unlogged

    with unlogged():
        findings = examine(RunConfig.load(settings_of(options)))
    for finding in findings:
        print(finding)
    return int(not all(finding.ok for finding in findings))


def _check(options: argparse.Namespace) -> int:
    from fedbt_app.cli.check import check_site
    from fedbt_app.cli.findings import unlogged

    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported, which comes later
    values = settings_of(options) | {"dataset": str(options.path.expanduser())}
    with unlogged():
        return check_site(options.path.expanduser(), RunConfig.load(values))


def _stop(options: argparse.Namespace) -> None:
    from fedbt_app.cli import superlink

    if options.all:
        ended = superlink.stop_all()
    else:
        ended = superlink.stop(superlink.settings_folder())
    for process in ended:
        print(f"ended the local SuperLink of {process.app} (process {process.pid})")
    if not ended:
        print("no local SuperLink runs")


def _report(options: argparse.Namespace) -> None:
    from fedbt_app.report import comparison

    print(comparison.compare(options.folders))


# By name: what it does, the function that does it, and what adds its arguments.
_COMMANDS: dict[str, tuple[str, _Command, _AddArguments]] = {
    "run": (
        "Run a federated job, show its progress and its result; --resume DIR goes on with a stopped one.",
        _run,
        _add_run,
    ),
    "plan": (
        "Predict blocks, FLOPs, bytes and memory of a run; trains nothing.",
        _plan,
        _add_plan,
    ),
    "doctor": (
        "Check installation, device, Flower version, model and data path.",
        _doctor,
        _add_settings,
    ),
    "check": (
        "Look at a site's data, offline: would it be accepted, and what would leave the site?",
        _check,
        _add_check,
    ),
    "stop": (
        "End the local SuperLink that `fedbt run` left running, and the run in it.",
        _stop,
        _add_stop,
    ),
    "report": (
        "Compare finished runs.",
        _report,
        _add_report,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
