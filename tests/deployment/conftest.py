"""A federation for each test, keys for its nodes, and the book of what was observed."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployment.federation import DEPLOY, Federation
from fedbt_app.errors import without_folders

NODES = ("alice", "bob", "carol", "stranger")


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate authority, the SuperLink's certificate and the nodes' keys."""
    folder = tmp_path_factory.mktemp("certs")
    subprocess.run(
        [str(DEPLOY / "make_certs.sh"), *NODES], env=os.environ | {"CERTS": str(folder)}, check=True
    )
    return folder


@pytest.fixture
def federation(
    tmp_path: Path, certs: Path, settings: Callable[..., dict[str, Any]], site_data: Path
) -> Iterator[Federation]:
    """Start a SuperLink that knows alice, bob and carol; end all of its processes after the test."""
    (tmp_path / "federation").mkdir()
    federation = Federation(tmp_path / "federation", certs, settings, site_data)
    try:
        federation.register("alice", "bob", "carol")
        yield federation
    finally:
        federation.close()


@pytest.fixture
def many_rows(site_data: Path, tmp_path: Path) -> Path:
    """Write the site's rows thirty times over: whoever has them trains longer than the others."""
    folder = tmp_path / "many-rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text((site_data / "train.jsonl").read_text() * 30)
    return folder


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], None]]:
    """Return a function that makes `folder` and mounts a disk of that size on it."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def note(kind: str, name: str, seen: Any) -> None:
    """Add what was seen to the book that OBSERVED names, if it names one."""
    if file := os.environ.get("OBSERVED"):
        book = (
            json.loads(Path(file).read_text())
            if Path(file).exists()
            else {"faults": {}, "wire": {}}
        )
        book[kind][name] = seen
        Path(file).write_text(json.dumps(book, indent=2) + "\n")


@pytest.fixture
def observe() -> Callable[..., None]:
    """Return a function that notes what a fault led to."""

    def fault(name: str, outcome: str, line: str = "", seconds: float = 0.0) -> None:
        note(
            "faults",
            name,
            {"outcome": outcome, "log": without_folders(line), "seconds": round(seconds)},
        )

    return fault


@pytest.fixture
def observe_wire() -> Callable[..., None]:
    """Return a function that notes what crossed the interface."""
    return lambda **seen: [note("wire", name, value) for name, value in seen.items()]
