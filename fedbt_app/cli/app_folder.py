"""The folder that Flower takes for an app: the checkout, or one made of what the wheel installed.

A wheel unpacks the package alone. The three files that Flower wants beside it travel in the wheel's
metadata, and the app is laid out below the cache once for each content. It is the checkout's app,
file for file: every node gets the same code, wherever the run was started.
"""

import hashlib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from fedbt_app.config import APP_DIR, default_cache_folder
from fedbt_app.errors import FedBTError
from fedbt_app.files import replaced_folder

DISTRIBUTION = "fedbt-app"
# the package; pyproject.toml puts them into the wheel
BESIDE = ("pyproject.toml", "server_app.py", "client_app.py")


def installed() -> Distribution:
    """Return the metadata of the installed FedBT."""
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError:
        raise FedBTError(
            f"{DISTRIBUTION} is not installed: pip install it, from a wheel or a checkout"
        ) from None


def app_folder() -> Path:
    """Return the app's folder, laid out first if need be."""
    if all((APP_DIR / name).is_file() for name in BESIDE):
        return APP_DIR
    files = _files()
    folder = default_cache_folder() / "app" / f"{installed().version}-{_digest(files)[:12]}"
    if folder.is_dir():
        return folder
    try:
        _lay_out(folder, files)
    except OSError as error:
        raise FedBTError(
            f"{folder} cannot be written ({error.strerror}): free some space, or set HOME to a folder of yours"
        ) from None
    return folder


def _files() -> dict[str, bytes]:
    files = {}
    for name in BESIDE:
        text = installed().read_text(f"extra_metadata/{name}")
        if text is None:
            raise FedBTError(f"the installed {DISTRIBUTION} lacks {name}: install it again")
        files[name] = text.encode()
    package = APP_DIR / "fedbt_app"
    for path in sorted(package.rglob("*.py")):
        files[path.relative_to(APP_DIR).as_posix()] = path.read_bytes()
    return files


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """Write the folder whole or not at all; another process may have been first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder, keep=lambda: True) as scratch:
        for name, content in files.items():
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
