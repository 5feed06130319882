"""The wheel, installed into a fresh environment and used in another folder: the checkout is not to be seen there."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
from flwr.cli.build import build_fab_from_disk

from fedbt_app.config import APP_DIR

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Elsewhere:
    """A fresh environment with the wheel, and a folder to use it in."""

    environment: Path
    folder: Path

    def run(self, command: str, *arguments: str) -> str:
        """Run one of its commands, which must succeed; returns what it printed."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        # Its own home, so that no SuperLink of another runs there; the fonts need not be searched again.
        variables |= {"HOME": str(self.folder / "home"), "MPLCONFIGDIR": matplotlib.get_cachedir()}
        done = subprocess.run(
            [str(self.environment / "bin" / command), *arguments],
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def lend(environment: Path) -> None:
    """Lend the environment what this one has installed beside FedBT: the libraries, and Flower's commands.

    A .pth file puts the folder on the path and reads none of its .pth files, so an editable FedBT stays out of sight.
    """
    python = environment / "bin" / "python"
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = (
        environment
        / "lib"
        / f"python{sys.version_info.major}.{sys.version_info.minor}"
        / "site-packages"
    )
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    for script in [*BIN.glob("flwr*"), *BIN.glob("flower*")]:
        first, rest = script.read_text().split("\n", maxsplit=1)
        assert first.startswith("#!")
        (environment / "bin" / script.name).write_text(f"#!{python}\n{rest}")
        (environment / "bin" / script.name).chmod(0o755)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("wheel")
    made = Elsewhere(folder / "environment", folder / "elsewhere")
    made.folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    checked(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(APP_DIR)
    )
    checked(sys.executable, "-m", "venv", "--without-pip", str(made.environment))
    (wheel,) = folder.glob("fedbt_app-*.whl")
    into = ["--python", str(made.environment / "bin" / "python")]
    checked(*pip, *into, "install", "--no-deps", "--no-index", str(wheel))
    lend(made.environment)
    yield made
    made.run("fedbt", "stop")


def test_wheel_is_what_is_imported_there(elsewhere: Elsewhere) -> None:
    found = elsewhere.run("python", "-c", "import fedbt_app; print(fedbt_app.__file__)").strip()
    assert Path(found).is_relative_to(elsewhere.environment)


def test_commands_that_need_no_run_work_in_any_folder(elsewhere: Elsewhere) -> None:
    import tomllib

    project = tomllib.loads((APP_DIR / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "Run a federated job" in elsewhere.run("fedbt", "--help")
    assert elsewhere.run("fedbt", "--version") == f"fedbt {project['version']}\n"
    assert "of full-model averaging" in elsewhere.run("fedbt", "plan", "--arch", "bert-base")
    found = elsewhere.run("fedbt", "doctor")
    assert "ok   packages: " in found
    assert "FAIL" not in found


def test_run_on_the_embedded_data_works_in_any_folder(elsewhere: Elsewhere) -> None:
    small = [
        "num-rounds=1",
        "max-train-examples=32",
        "max-test-examples=16",
        "max-length=16",
        "device=cpu",
    ]
    elsewhere.run("fedbt", "run", "--clients", "2", *small, "output-dir=out")
    report = json.loads((elsewhere.folder / "out" / "report.json").read_text())
    assert [entry["clients"] for entry in report["rounds"]] == [2]
    assert (elsewhere.folder / "out" / "model" / "model.safetensors").is_file()
    (app,) = (elsewhere.folder / "home" / ".cache" / "fedbt" / "app").iterdir()
    assert build_fab_from_disk(app) == build_fab_from_disk(
        APP_DIR
    )  # what every node gets, from here or from there
