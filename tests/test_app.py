"""The real thing: `fedbt run` and plain `flwr run` through local SuperLinks and Ray."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import pytest

from fedbt_app.cli import superlink
from fedbt_app.config import APP_DIR

BIN = Path(sys.executable).parent
FEDBT = [
    sys.executable,
    "-m",
    "fedbt_app.cli.main",
]  # with the folder to take it from as PYTHONPATH
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment of the commands: with a home of its own, where no SuperLink of another runs."""
    home = tmp_path_factory.mktemp("home")
    changes = {
        "HOME": str(home),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # the fonts need not be searched again
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    made = {name: value for name, value in os.environ.items() if name != "FLWR_HOME"} | changes
    yield made
    stopped = end(begin([*FEDBT, "stop", "--all"], made))
    assert stopped.returncode == 0, stopped.stderr


def begin(
    command: list[str], variables: dict[str, str], folder: Path = APP_DIR
) -> "subprocess.Popen[str]":
    """Start a command in an app's folder, with the package that lies there."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=variables | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> subprocess.CompletedProcess[str]:
    """Wait for a command."""
    output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def fedbt_run(values: dict[str, Any]) -> list[str]:
    """Return the command of a run with these settings."""
    assigned = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [*FEDBT, "run", "--clients", "2", *assigned]


def test_two_checkouts_train_report_and_export_side_by_side(
    settings: Settings, variables: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copy(APP_DIR / name, copy)
    shutil.copytree(APP_DIR / "fedbt_app", copy / "fedbt_app")
    with (copy / "server_app.py").open("a") as file:
        file.write('\nlog.info("fedbt: this is the copy")\n')
    folder = tmp_path / "run"
    first = begin(fedbt_run(settings(output_dir=str(folder))), variables)
    second = begin(
        fedbt_run(settings(output_dir=str(tmp_path / "other"), num_rounds=1)), variables, copy
    )
    original, other = end(first), end(second)
    assert original.returncode == 0, original.stdout + original.stderr
    assert other.returncode == 0, other.stdout + other.stderr
    assert "this is the copy" in other.stdout
    assert "this is the copy" not in original.stdout
    report = json.loads((folder / "report.json").read_text())
    assert len(report["rounds"]) == 2
    assert all(one["clients"] == 2 for one in report["rounds"])
    assert report["cost"]["train_flops"] > 0
    assert report["cost"]["catch_up_bytes"] == 0
    assert report["refused"] == []
    assert (folder / "model" / "model.safetensors").is_file()
    assert "round 2/2" in original.stdout
    assert str(folder / "model") in original.stdout


def test_fedbt_run_exits_non_zero_with_one_line_when_the_run_fails(
    settings: Settings, variables: dict[str, str], tmp_path: Path
) -> None:
    done = end(
        begin(
            fedbt_run(settings(label_column="diagnosis", output_dir=str(tmp_path / "run"))),
            variables,
        )
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "'diagnosis'" in line
    assert "label-column" in line
    assert not (tmp_path / "run" / "report.json").exists()
    assert not (tmp_path / "run" / "model").exists()


@pytest.fixture
def plain(variables: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return an environment in which Flower starts its own local SuperLink, at a port of its own; ends that one."""
    port = str(superlink.free_port())
    changes = {
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        superlink.KEEP_ENVIRONMENT: "1",
    }
    yield variables | changes
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--simulation" in words and port in words:
            process.terminate()


def test_plain_flwr_run_works_from_the_project_root(
    settings: Settings, plain: dict[str, str], tmp_path: Path
) -> None:
    overrides = tmp_path / "run.toml"
    values = settings(num_rounds=1, output_dir=str(tmp_path / "plain"))
    overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    done = end(
        begin([str(BIN / "flwr"), "run", ".", "--stream", "--run-config", str(overrides)], plain)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["rounds"][0]["clients"] == 2
