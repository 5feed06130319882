"""`fedbt doctor`: does this machine have what a run needs?"""

import platform
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedbt_app.config import APP_DIR, NO_DATA, RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    ok: bool
    subject: str
    detail: str


def examine(config: RunConfig) -> list[Finding]:
    """Check installation, Flower's version, device, model, data and folders, each on its own."""
    checks: dict[str, Callable[[RunConfig], str]] = {
        "Python": _python,
        "packages": _packages,
        "device": _device,
        "model": _model,
        "data": _data,
        "cache folder": lambda config: _writable(config.cache_folder),
        "pool folder": lambda config: _writable(config.pool_folder),
        "local SuperLink": _superlink,
    }
    findings = []
    for subject, check in checks.items():
        try:
            findings.append(Finding(True, subject, check(config)))
        except FedBTError as error:
            findings.append(Finding(False, subject, str(error)))
    return findings


def _python(config: RunConfig) -> str:
    return platform.python_version()


def _packages(config: RunConfig) -> str:
    from packaging.requirements import Requirement

    project = tomllib.loads((APP_DIR / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            raise FedBTError(f"{requirement.name} is not installed: pip install '{requirement}'") from None
        if not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            raise FedBTError(f"{requirement.name} {installed} is installed: pip install '{requirement}'")
        found.append(f"{requirement.name} {installed}")
    return ", ".join(found)


def _device(config: RunConfig) -> str:
    import torch

    from fedbt_app.model.device import pick_device

    device = pick_device(config.device)
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"


def _model(config: RunConfig) -> str:
    from fedbt_app.model.checkpoint import Checkpoint, find_model

    checkpoint = Checkpoint(find_model(config.model), config.cache_folder)
    arch = checkpoint.architecture
    fingerprint = checkpoint.fingerprint(TASKS[config.task].head)[:12]
    return f"{config.model}: {arch.depth} blocks, hidden {arch.hidden}, fingerprint {fingerprint}"


def _data(config: RunConfig) -> str:
    from fedbt_app.data import examples

    return "none at the server" if config.dataset == NO_DATA else examples.describe(config)


def _writable(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise FedBTError(f"{folder} is not writable ({error.strerror}): set cache-dir and pool-dir") from None


def _superlink(config: RunConfig) -> str:
    from fedbt_app.cli.launch import check_local_superlink

    check_local_superlink()
    return "in order, or not running yet (the first run starts it)"
