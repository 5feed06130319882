"""`fedbt doctor`: does this machine have what a run needs?"""

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedbt_app.cli import superlink
from fedbt_app.cli.app_folder import installed
from fedbt_app.config import NO_DATA, RunConfig
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

    found = []
    for requirement in map(Requirement, installed().requires or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra, or of another system
        name = requirement.name
        try:
            present = version(name)
        except PackageNotFoundError:
            raise FedBTError(f"{name} is not installed: pip install '{requirement}'") from None
        public, *_ = present.split("+")  # without the build, as in 2.13.0+cpu
        if not requirement.specifier.contains(public, prereleases=True):
            raise FedBTError(f"{name} {present} is installed: pip install '{requirement}'")
        found.append(f"{name} {present}")
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

    if config.dataset == NO_DATA:
        return "none at the server"
    return examples.describe(config)


def _writable(folder: Path, mend: str = "set cache-dir and pool-dir") -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise FedBTError(f"{folder} is not writable ({error.strerror}): {mend}") from None


def _superlink(config: RunConfig) -> str:
    folder = superlink.settings_folder()
    _writable(folder, "set HOME to a folder of yours")
    if found := superlink.running(folder):
        return f"runs as process {found.pid}; for Flower's own commands: FLWR_HOME={folder}"
    return f"the first run starts it; for Flower's own commands: FLWR_HOME={folder}"
