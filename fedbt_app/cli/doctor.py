"""`fedbt doctor`: does this machine have what a run needs?"""

import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedbt_app.cli import superlink
from fedbt_app.cli.app_folder import installed
from fedbt_app.cli.check import data_findings, model_findings
from fedbt_app.cli.findings import Finding, Mark
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError


def examine(config: RunConfig) -> list[Finding]:
    """Check installation, Flower's version, device, model, data and folders, each on its own."""
    findings = []
    for subject, check in (("Python", _python), ("packages", _packages), ("device", _device)):
        findings.append(_finding(subject, check, config))
    findings += model_findings(config)
    findings += data_findings(config)
    findings.append(_finding("cache folder", lambda _: _writable(config.cache_folder), config))
    findings.append(_finding("pool folder", lambda _: _writable(config.pool_folder), config))
    findings.append(_finding("local SuperLink", _superlink, config))
    return findings


def _finding(subject: str, check: Callable[[RunConfig], str], config: RunConfig) -> Finding:
    try:
        return Finding(Mark.OK, subject, check(config))
    except FedBTError as error:
        return Finding(Mark.FAILURE, subject, str(error))


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
