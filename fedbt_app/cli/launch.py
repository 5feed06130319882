"""`fedbt run`: submit the app to Flower, show its progress, and fail when the run failed.

`flwr run --stream` exits 0 even then, so the run's status is asked for afterwards.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedbt_app.config import APP_DIR, EMBEDDED, NO_DATA, RunConfig
from fedbt_app.errors import FedBTError

KEEP_ENVIRONMENT = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
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
    values: Mapping[str, Any], clients: int, superlink: str | None, verbose: bool, show: Callable[[str], None]
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
    resume = f"the same command and resume={folder}" if superlink else f"`fedbt run --resume {folder}`"
    go_on = f"go on with {resume}"
    if superlink is None:
        check_local_superlink()
    with tempfile.TemporaryDirectory(prefix="fedbt-") as scratch:
        overrides = Path(scratch) / "run.toml"
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
        overrides.write_text("".join(lines), encoding="utf-8")
        command = [_flwr(), "run", str(APP_DIR), *([superlink] if superlink else []), "--stream"]
        command += ["--run-config", str(overrides)]
        if superlink is None:
            command += ["--federation-config", _resources(clients, str(values["device"]))]
        try:
            run_id, reason = _stream(command, [superlink] if superlink else [], verbose, show)
        except KeyboardInterrupt:
            raise FedBTError(f"interrupted: the run was stopped; {go_on}") from None
    if run_id is None:
        raise FedBTError(f"Flower did not start the run: {reason or 'see its output with --verbose'}")
    status = _status(run_id, superlink)
    if status != "finished:completed":
        raise FedBTError(reason or f"run {run_id} ended as {status}: see its output with --verbose, or {go_on}")
    return folder if superlink is None else None


def _resources(clients: int, device: str) -> str:
    """Say what each simulated client gets: one that is given no share of the GPUs does not see any."""
    import torch  # not above: what needs no GPU need not wait for it

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    share = f" client-resources-num-gpus={min(1.0, int(1e4 * gpus / clients) / 1e4)}" if gpus else ""
    return f"num-supernodes={clients} client-resources-num-cpus=1{share}"


def _stream(
    command: list[str], superlink: list[str], verbose: bool, show: Callable[[str], None]
) -> tuple[str | None, str]:
    environment = os.environ | {KEEP_ENVIRONMENT: "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    beside = Path(sys.executable).parent  # Flower looks for its other commands on the path
    environment |= {
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    run_id, reason, tail = None, "", ""
    try:
        process = subprocess.Popen(
            command, cwd=APP_DIR, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        raise FedBTError(f"{command[0]} is not installed: pip install 'flwr[simulation]'") from None
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
            stop = [_flwr(), "stop", run_id, *superlink]
            subprocess.run(stop, cwd=APP_DIR, env=environment, capture_output=True, check=False)
        raise
    process.wait()
    return run_id, reason or ("" if run_id else tail)


def _status(run_id: str, superlink: str | None) -> str:
    command = [_flwr(), "ls", *([superlink] if superlink else []), "--run-id", run_id, "--format", "json"]
    answer = subprocess.run(command, cwd=APP_DIR, capture_output=True, text=True, check=False)
    try:
        return str(json.loads(answer.stdout)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"


def check_local_superlink() -> None:
    """Refuse a local SuperLink that would reinstall torch for the run, or load another project's client app."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not any(word.endswith("flower-superlink") for word in words) or "--simulation" not in words:
            continue
        try:
            environment, folder = process.environ(), Path(process.cwd())
        except psutil.Error:
            continue
        mend = f"stop it with `kill {process.pid}` and run again"
        if environment.get(KEEP_ENVIRONMENT) != "1":
            raise FedBTError(
                f"the running local SuperLink installs dependencies for each run ({KEEP_ENVIRONMENT}): {mend}"
            )
        if folder != APP_DIR and (folder / "client_app.py").exists():
            raise FedBTError(
                f"the running local SuperLink was started in {folder}, whose client_app.py it loads: {mend}"
            )


def _flwr() -> str:
    beside = Path(sys.executable).with_name("flwr")
    return str(beside) if beside.exists() else "flwr"
