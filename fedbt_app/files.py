"""Files and folders that are there whole or not at all, and a lock on a folder.

Each file or folder is made beside its place and moved there once it is on the disk. What a killed process leaves
behind has a name that ends in `.partial`.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
LOCK = "lock"
# Who may read a file: its owner; or everybody, less what the umask takes away.
PRIVATE = 0o600
READABLE = 0o666


def replace_file(path: Path, write: Callable[[Path], object], mode: int = PRIVATE) -> None:
    """Put what `write(temporary path)` makes in the place of `path`, which stays if that fails."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        # made here, empty: `write` then keeps the mode that it has from its first moment
        created = os.open(temporary, os.O_CREAT | os.O_EXCL, mode)
        os.close(created)
        write(temporary)
        _see_onto_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, mode: int = PRIVATE) -> None:
    """Put `text` in the place of `path`, as `replace_file` does."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), mode)


@contextmanager
def replaced_folder(path: Path, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield an empty, private folder that takes the place of `path` when the block ends.

    Where the block fails, `path` stays as it was.

    Parameters
    ----------
    keep
        asked at the end where something stands at `path`: true leaves that there and drops the new
        folder
    """
    around = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=PARTIAL))
    new = around / "new"
    old = around / "old"
    try:
        new.mkdir(0o700)
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _see_onto_disk(file)
        _take_place(new, path, old, keep)
    finally:
        shutil.rmtree(around, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time into `folder`; the lock goes with the process that holds it."""
    import fcntl  # not above: Windows has none, and much of FedBT needs no lock

    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _take_place(new: Path, path: Path, old: Path, keep: Callable[[], bool]) -> None:
    try:
        new.rename(path)  # at one stroke, but only where nothing stands
    except OSError:
        if not os.path.lexists(path):
            raise
        if keep():
            return
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise


def _see_onto_disk(file: Path) -> None:
    with file.open("rb") as content:
        os.fsync(content.fileno())
