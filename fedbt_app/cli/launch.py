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
    for key in [key for key in _PATH_KEYS if key in values]:
        text = str(values[key])
        path = base / Path(text).expanduser()
        is_path = key not in ("model", "dataset") or path.exists() or text.startswith((".", "~"))
        if text and is_path and text not in (EMBEDDED, NO_DATA):
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
    resume = (
        f"the same command and resume={folder}" if superlink else f"`fedbt run --resume {folder}`"
    )
    go_on = f"go on with {resume}"
    flower = _Flower(
        app_folder(), superlink, local.environment(None if superlink else local.start())
    )
    options = (
        ["--federation-config", _resources(clients, str(values["device"]))]
        if superlink is None
        else []
    )
    with tempfile.TemporaryDirectory(prefix="fedbt-") as scratch:
        overrides = Path(scratch) / "run.toml"
        lines = (
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()
        )
        overrides.write_text("".join(lines), encoding="utf-8")
        try:
            run_id, reason = flower.run(["--run-config", str(overrides), *options], verbose, show)
        except KeyboardInterrupt:
            raise FedBTError(f"interrupted: the run was stopped; {go_on}") from None
    if run_id is None:
        raise FedBTError(
            f"Flower did not start the run: {reason or 'see its output with --verbose'}"
        )
    status = flower.status(run_id)
    if status != "finished:completed":
        raise FedBTError(
            reason or f"run {run_id} ended as {status}: see its output with --verbose, or {go_on}"
        )
    return folder if superlink is None else None


def _resources(clients: int, device: str) -> str:
    """Say what each simulated client gets: one that is given no share of the GPUs does
    not see any.
    """
    import torch  # not above: what needs no GPU need not wait for it

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    share = (
        f" client-resources-num-gpus={min(1.0, int(1e4 * gpus / clients) / 1e4)}" if gpus else ""
    )
    return f"num-supernodes={clients} client-resources-num-cpus=1{share}"


@dataclass(frozen=True)
class _Flower:
    """Flower's command line for one app and one SuperLink; without a name it is the one that the
    settings lead to.
    """

    app: Path
    superlink: str | None
    environment: dict[str, str]

    def run(
        self, options: list[str], verbose: bool, show: Callable[[str], None]
    ) -> tuple[str | None, str]:
        """Submit the app and follow it to its end; returns the run's id, if it started, and the
        reason if it failed.
        """
        run_id, reason, tail = None, "", ""
        command = self._command("run", str(self.app), options=["--stream", *options])
        try:
            process = subprocess.Popen(
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
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail = line.strip(" │╭╮╰╯─\n") or tail
                if found := _RUN_ID.search(line):
                    run_id = found.group(1)
                if ours := _OUR_LINE.search(line):
                    if ours.group(1).startswith("error: "):
                        reason = ours.group(1).removeprefix("error: ")
                    else:
                        show(ours.group(1))
                elif verbose:
                    show(line.rstrip())
        except KeyboardInterrupt:
            process.terminate()
            if run_id is not None:
                self._ask(self._command("stop", run_id))
            raise
        process.wait()
        return run_id, reason or ("" if run_id else tail)

    def status(self, run_id: str) -> str:
        """Return how a run stands, in Flower's words."""
        answer = self._ask(self._command("ls", options=["--run-id", run_id, "--format", "json"]))
        try:
            return str(json.loads(answer)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError, TypeError):
            return "unknown"

    def _command(self, *words: str, options: Sequence[str] = ()) -> list[str]:
        return [_flwr(), *words, *([self.superlink] if self.superlink else []), *options]

    def _ask(self, command: list[str]) -> str:
        answer = subprocess.run(
            command, cwd=self.app, env=self.environment, capture_output=True, text=True, check=False
        )
        return answer.stdout


def _flwr() -> str:
    return local.script("flwr")
