"""The real thing: `fedbt run` and plain `flwr run` through a local SuperLink and Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedbt_app.config import APP_DIR

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def superlinks() -> list[psutil.Process]:
    """Return the running local SuperLinks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--simulation" in words and any(word.endswith("flower-superlink") for word in words):
            found.append(process)
    return found


@pytest.fixture(scope="module", autouse=True)
def _stop_the_superlink_that_the_tests_start() -> Iterator[None]:
    before = {process.pid for process in superlinks()}
    yield
    for process in superlinks():
        if process.pid not in before:
            process.terminate()


def execute(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=APP_DIR, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_fedbt_run_trains_reports_and_exports(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = settings(num_rounds=2, output_dir=str(tmp_path / "run"))
    done = execute("fedbt", "run", "--clients", "2", *(f"{key}={json.dumps(value)}" for key, value in values.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["rounds"]) == 2
    assert all(one["clients"] == 2 for one in report["rounds"])
    assert report["cost"]["train_flops"] > 0
    assert report["cost"]["catch_up_bytes"] == 0
    assert report["refused"] == []
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "round 2/2" in done.stdout
    assert str(tmp_path / "run" / "model") in done.stdout


def test_fedbt_run_exits_non_zero_with_one_line_when_the_run_fails(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = settings(label_column="diagnosis", output_dir=str(tmp_path / "run"))
    done = execute("fedbt", "run", "--clients", "2", *(f"{key}={json.dumps(value)}" for key, value in values.items()))
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "'diagnosis'" in line
    assert "label-column" in line
    assert not (tmp_path / "run" / "report.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_plain_flwr_run_works_from_the_project_root(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    overrides = tmp_path / "run.toml"
    values = settings(num_rounds=1, output_dir=str(tmp_path / "plain"))
    overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    done = execute("flwr", "run", ".", "--stream", "--run-config", str(overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["rounds"][0]["clients"] == 2
