"""The app that is laid out where there is no checkout: whole or not at all, once for each content."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.cli import app_folder
from fedbt_app.config import APP_DIR
from fedbt_app.errors import FedBTError


class Installed:
    """The metadata of a wheel."""

    version = "9.9"

    def read_text(self, name: str) -> str | None:
        return (APP_DIR / Path(name).name).read_text(encoding="utf-8")


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the package alone, as a wheel leaves it."""
    package = tmp_path / "site-packages" / "fedbt_app"
    package.mkdir(parents=True)
    for name in ("__init__.py", "config.py", "cli/main.py"):
        (package / name).parent.mkdir(exist_ok=True)
        shutil.copy(APP_DIR / "fedbt_app" / name, package / name)
    monkeypatch.setattr(app_folder, "APP_DIR", package.parent)
    monkeypatch.setattr(app_folder, "installed", Installed)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return package


def test_checkout_is_the_app_itself() -> None:
    assert app_folder.app_folder() == APP_DIR


def test_app_of_a_wheel_holds_the_package_and_what_flower_wants_beside_it(unpacked: Path) -> None:
    folder = app_folder.app_folder()
    assert folder.name.startswith("9.9-")
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    names = [
        *app_folder.BESIDE,
        "fedbt_app/__init__.py",
        "fedbt_app/config.py",
        "fedbt_app/cli/main.py",
    ]
    assert found == {name: (APP_DIR / name).read_bytes() for name in names}
    assert list(folder.parent.iterdir()) == [folder]


def test_app_is_laid_out_once_for_each_content(unpacked: Path) -> None:
    folder = app_folder.app_folder()
    (folder / "seen").touch()
    assert app_folder.app_folder() == folder
    assert (folder / "seen").exists()
    (unpacked / "config.py").write_text("other")
    other = app_folder.app_folder()
    assert other != folder
    assert (other / "fedbt_app" / "config.py").read_text() == "other"


def test_app_that_cannot_be_written_whole_is_not_there_at_all(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "config.py":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FedBTError, match=r"No space left on device.*set HOME"):
        app_folder.app_folder()
    assert list((app_folder.default_cache_folder() / "app").iterdir()) == []


def test_app_that_another_process_laid_out_first_is_taken(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def second(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second)
    folder = app_folder.app_folder()
    assert (folder / "pyproject.toml").is_file()
    assert list(folder.parent.iterdir()) == [folder]


def test_wheel_without_what_flower_wants_is_one_line(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Installed, "read_text", lambda self, name: None)
    with pytest.raises(FedBTError, match=r"lacks pyproject\.toml: install it again"):
        app_folder.app_folder()


def test_fedbt_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise app_folder.PackageNotFoundError(name)

    monkeypatch.setattr(app_folder, "distribution", missing)
    with pytest.raises(FedBTError, match="fedbt-app is not installed"):
        app_folder.installed()
