"""Whole or not at all: a write that fails leaves what was there, and nothing else."""

import os
import stat
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fedbt_app import files
from fedbt_app.files import PARTIAL, READABLE, replace_file, replace_text, replaced_folder

FULL = OSError(28, "No space left on device")


def fail(*_: Any, **__: Any) -> None:
    raise FULL


def half(path: Path) -> None:
    path.write_text("half of what")
    raise FULL


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a folder that stands where another is to come."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    return folder


def fill(path: Path, content: str = "new", keep: Callable[[], bool] = lambda: False) -> None:
    with replaced_folder(path, keep) as folder:
        (folder / "weights").write_text(content)


# Files --------------------------------------------------------------------------------------------


def test_file_is_made_and_replaced(tmp_path: Path) -> None:
    for text in ("first", "second, Köln"):
        replace_text(tmp_path / "note.json", text)
        assert (tmp_path / "note.json").read_text(encoding="utf-8") == text
    assert names_in(tmp_path) == ["note.json"]


def test_failing_write_leaves_the_old_file_whole_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, half)
    assert names_in(tmp_path) == []
    replace_text(path, "old")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, half)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["note.json"]


def test_file_that_cannot_be_seen_onto_the_disk_or_moved_does_not_replace_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.json"
    replace_text(path, "old")
    for failing, error in product(("fsync", "replace"), (FULL, KeyboardInterrupt())):

        def stop(*_: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(files.os, failing, stop)
            with pytest.raises(type(error)):
                replace_text(path, "new")
        assert path.read_text() == "old"
        assert names_in(tmp_path) == ["note.json"]


def test_file_is_private_unless_it_is_to_be_read(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        replace_text(tmp_path / "mine", "")
        replace_text(tmp_path / "report", "", READABLE)
    finally:
        os.umask(umask)
    assert [mode_of(tmp_path / name) for name in ("mine", "report")] == [0o600, 0o640]


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path: Path) -> None:
    seen: list[str] = []
    replace_file(tmp_path / "note.json", lambda path: (path.write_text(""), seen.append(path.name)))
    with replaced_folder(tmp_path / "model"):
        seen += [name for name in names_in(tmp_path) if name != "note.json"]
    assert len(seen) == 2
    assert all(name.endswith(PARTIAL) for name in seen)
    assert [name.partition(".")[0] for name in seen] == ["note", "model"]


# Folders ------------------------------------------------------------------------------------------


def test_folder_is_made_and_replaced_with_all_that_was_in_it(tmp_path: Path, old: Path) -> None:
    (old / "left-over").touch()
    fill(old)
    fill(tmp_path / "another")
    assert names_in(tmp_path) == ["another", "model"]
    assert names_in(old) == ["weights"]
    assert (old / "weights").read_text() == "new"
    assert mode_of(tmp_path / "another") == 0o700


def test_failing_block_leaves_the_old_folder_whole_and_no_litter(tmp_path: Path, old: Path) -> None:
    with pytest.raises(OSError, match="No space left"), replaced_folder(old) as folder:
        half(folder / "weights")
    assert names_in(tmp_path) == ["model"]
    assert (old / "weights").read_text() == "old"


@pytest.mark.parametrize("failing", ["fsync", "second rename"])
def test_folder_that_cannot_take_the_place_leaves_the_old_one_whole(
    failing: str, tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_but_not_the_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise FULL
        return rename(path, target)

    with monkeypatch.context() as patch:
        if failing == "fsync":
            patch.setattr(files.os, "fsync", fail)
        else:
            patch.setattr(Path, "rename", rename_but_not_the_new)
        with pytest.raises(OSError, match="No space left"):
            fill(old)
    assert names_in(tmp_path) == ["model"]
    assert (old / "weights").read_text() == "old"


def test_folder_that_another_process_put_there_meanwhile_stays_if_it_may(
    tmp_path: Path, old: Path
) -> None:
    fill(old, keep=lambda: True)
    assert (old / "weights").read_text() == "old"
    fill(tmp_path / "another", keep=lambda: True)  # nothing stood there
    assert names_in(tmp_path) == ["another", "model"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_file_or_link_in_the_place_is_replaced_and_what_the_link_leads_to_stays(
    kind: str, tmp_path: Path, old: Path
) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("a file")
    else:
        path.symlink_to(old)
    fill(path)
    assert not path.is_symlink()
    assert (path / "weights").read_text() == "new"
    assert (old / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["model", "place"]
