"""The local SuperLink: one for each app folder, used again, ended by its process id and no other."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedbt_app.cli import superlink
from fedbt_app.errors import FedBTError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the test a home of its own, and end what it leaves running there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    superlink.stop_all()


def started(app: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, superlink.Running]:
    """Start the SuperLink of the installation in `app`."""
    monkeypatch.setattr(superlink, "APP_DIR", app)
    folder = superlink.start()
    found = superlink.running(folder)
    assert found is not None
    return folder, found


def test_two_checkouts_have_a_superlink_each_and_stopping_one_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, first = started(tmp_path / "one", monkeypatch)
    other, second = started(tmp_path / "other", monkeypatch)
    assert one != other
    assert first.pid != second.pid
    assert first.port != second.port
    assert f"127.0.0.1:{first.port}" in (one / "config.toml").read_text()
    assert started(tmp_path / "one", monkeypatch) == (one, first)  # used again
    process = psutil.Process(first.pid)
    assert Path(process.cwd()) == one  # where no code lies
    assert process.environ()[superlink.KEEP_ENVIRONMENT] == "1"
    family = [process, *process.children(recursive=True)]
    assert superlink.stop(one) == [first]
    assert [
        member
        for member in family
        if member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    ] == []
    assert superlink.running(one) is None
    assert superlink.running(other) == second
    assert superlink.stop_all() == [second]
    assert superlink.stop_all() == []


def test_process_that_was_given_an_old_id_is_neither_used_nor_ended() -> None:
    folder = superlink.settings_folder()
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        record = {"pid": innocent.pid, "port": 1, "app": "x"}
        (folder / superlink.RECORD).write_text(json.dumps(record))
        assert superlink.running(folder) is None
        assert superlink.stop(folder) == []
        assert innocent.poll() is None
        innocent.communicate(b"\n", timeout=60)
    assert innocent.returncode == 0


@pytest.mark.parametrize(
    "content", ["", "[]", '{"pid": 1}', '{"pid": "x", "port": 1, "app": ""}', "\x00"]
)
def test_unreadable_record_is_that_of_no_superlink(content: str) -> None:
    folder = superlink.settings_folder()
    folder.mkdir(parents=True)
    (folder / superlink.RECORD).write_text(content)
    assert superlink.running(folder) is None


def test_superlink_that_ends_at_once_is_one_line_with_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(superlink, "script", lambda name: "/bin/false")
    with pytest.raises(FedBTError, match=r"did not start: see .*superlink\.log$"):
        superlink.start()


def test_missing_superlink_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(superlink, "script", lambda name: str(tmp_path / name))
    with pytest.raises(FedBTError, match="flower-superlink is not installed"):
        superlink.start()


def test_home_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(FedBTError, match="set HOME"):
        superlink.start()


def test_only_the_simulation_has_settings_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/home/me/flower")
    assert superlink.environment(None)["FLWR_HOME"] == "/home/me/flower"
    assert superlink.environment(tmp_path)["FLWR_HOME"] == str(tmp_path)
    assert os.environ["FLWR_HOME"] == "/home/me/flower"
