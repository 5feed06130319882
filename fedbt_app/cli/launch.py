"""`fedbt run`: submit the app to Flower, show its progress, and fail when the run failed.

`flwr run --stream` exits 0 even then, so the run's status is asked for afterwards.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbt_app.cli import superlink as local
from fedbt_app.cli.app_folder import app_folder
from fedbt_app.config import EMBEDDED, NO_DATA, RunConfig
from fedbt_app.errors import FedBTError

_PATH_KEYS = ("model", "dataset", "output-dir", "resume", "cache-dir", "pool-dir", "reference")
_OUR_LINE = re.compile(r"fedbt: (.*)")
_RUN_ID = re.compile(r"started run (\d+)")


def absolute_paths(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Resolve local paths against `base`: the app runs in another working folder."""
    resolved = dict(values)
    for key in _PATH_KEYS:
        text = str(values.get(key, ""))
        if text in ("", EMBEDDED, NO_DATA):
            continue
        path = base / Path(text).expanduser()
        may_be_hub_name = key in ("model", "dataset") and not text.startswith((".", "~"))
        if path.exists() or not may_be_hub_name:
            resolved[key] = str(path.resolve())
    return resolved


def run(
    values: Mapping[str, Any],
    clients: int,
    superlink: str | None,
    verbose: bool,
    show: Callable[[str], None],
) -> Path | None:
    """Run the job with `values` (dashed keys, all of them) and wait for it.

    Returns
    -------
    Path | None
        The output folder with the report; None when a remote SuperLink keeps it.

    Raises
    ------
    FedBTError
        When the run failed, with the reason that the server gave.
    """
    folder = RunConfig.load(values).output_folder
    if superlink is None:
        go_on = f"go on with `fedbt run --resume {folder}`"
        flower = _Flower(app_folder(), superlink, local.environment(local.start()))
        options = ["--federation-config", _resources(clients, str(values["device"]))]
    else:
        go_on = f"go on with the same command and resume={folder}"
        flower = _Flower(app_folder(), superlink, local.environment(None))
        options = []
    with tempfile.TemporaryDirectory(prefix="fedbt-") as scratch:
        overrides = Path(scratch) / "run.toml"
        overrides.write_text(_toml(values), encoding="utf-8")
        options = ["--run-config", str(overrides), *options]
        try:
            run_id, reason = flower.run(options, verbose, show)
        except KeyboardInterrupt:
            raise FedBTError(f"interrupted: the run was stopped; {go_on}") from None
    if run_id is None:
        reason = reason or "see its output with --verbose"
        raise FedBTError(f"Flower did not start the run: {reason}")
    status = flower.status(run_id)
    if status != "finished:completed":
        raise FedBTError(
            reason or f"run {run_id} ended as {status}: see its output with --verbose, or {go_on}"
        )
    if superlink is not None:
        return None
    return folder


def _toml(values: Mapping[str, Any]) -> str:
    """Write the values as TOML, whose plain values are written as JSON's are."""
    lines = []
    for key, value in values.items():
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


def _resources(clients: int, device: str) -> str:
    """Say what each simulated client gets: one without a share of the GPUs sees none."""
    import torch  # not above: what needs no GPU need not wait for it

    resources = f"num-supernodes={clients} client-resources-num-cpus=1"
    if device != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        share = min(1.0, int(1e4 * gpus / clients) / 1e4)  # rounded down, so that all fit
        resources += f" client-resources-num-gpus={share}"
    return resources


@dataclass(frozen=True)
class _Flower:
    """Flower's command line for one app and one SuperLink: the settings' own if it has no name."""

    app: Path
    superlink: str | None
    environment: dict[str, str]

    def run(
        self, options: list[str], verbose: bool, show: Callable[[str], None]
    ) -> tuple[str | None, str]:
        """Submit the app and follow it to its end.

        Returns the run's id, None if it did not start, and the reason if it failed.
        """
        process = self._submit(options)
        assert process.stdout is not None
        output = _Output(verbose, show)
        try:
            for line in process.stdout:
                output.take(line)
        except KeyboardInterrupt:
            process.terminate()
            if output.run_id is not None:
                self._ask(self._command("stop", output.run_id))
            raise
        process.wait()
        if output.run_id is None:
            return None, output.reason or output.last_words
        return output.run_id, output.reason

    def _submit(self, options: list[str]) -> "subprocess.Popen[str]":
        command = self._command("run", str(self.app), options=["--stream", *options])
        try:
            return subprocess.Popen(
                command,
                cwd=self.app,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except FileNotFoundError:
            raise FedBTError(
                f"{command[0]} is not installed: pip install 'flwr[simulation]'"
            ) from None

    def status(self, run_id: str) -> str:
        """Return how a run stands, in Flower's words."""
        answer = self._ask(self._command("ls", options=["--run-id", run_id, "--format", "json"]))
        try:
            return str(json.loads(answer)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError, TypeError):
            return "unknown"

    def _command(self, *words: str, options: Sequence[str] = ()) -> list[str]:
        command = [_flwr(), *words]
        if self.superlink:
            command.append(self.superlink)
        return [*command, *options]

    def _ask(self, command: list[str]) -> str:
        answer = subprocess.run(
            command,
            cwd=self.app,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return answer.stdout


@dataclass
class _Output:
    """What Flower's output tells of a run, line by line; our own lines in it are shown."""

    verbose: bool
    show: Callable[[str], None]
    run_id: str | None = None
    reason: str = ""  # of the failure, as the server gave it
    last_words: str = ""

    def take(self, line: str) -> None:
        """Take in one line."""
        self.last_words = line.strip(" │╭╮╰╯─\n") or self.last_words
        if found := _RUN_ID.search(line):
            self.run_id = found.group(1)
        if found := _OUR_LINE.search(line):
            self._take_ours(found.group(1))
        elif self.verbose:
            self.show(line.rstrip())

    def _take_ours(self, text: str) -> None:
        if text.startswith("error: "):
            self.reason = text.removeprefix("error: ")
        else:
            self.show(text)


def _flwr() -> str:
    return local.script("flwr")
