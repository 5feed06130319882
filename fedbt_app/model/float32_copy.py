"""A copy in float32, on disk, of a checkpoint whose weights are stored in another format.

The tensors of a float32 file are views of it: they take no memory until they are looked at, and
what is looked at the system may drop again. Half precision has to be converted, which would make
copies in memory of all that is frozen. So it is converted once, into the cache, for all processes
of this machine.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedbt_app.files import PARTIAL, replace_file

COPIES_KEPT = 3  # those used last: each takes 4 bytes a parameter
_LOCK = "lock"

Read = Callable[[str], torch.Tensor]  # by name


def float32_copy(folder: Path, identity: str, names: Sequence[str], read: Read) -> Path:
    """Return the file in `folder` that holds what `read` gives for `names`, in float32; write it if
    it is not there.

    Parameters
    ----------
    identity : tells the source from any other file, and from its own earlier and later states

    Raises
    ------
    OSError
        When it is not there and cannot be written.
    """
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"
    if not _is_whole(path):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_whole(path):  # no other process was faster
                _make_room(folder)
                replace_file(path, lambda temporary: _write(temporary, names, read))
    with contextlib.suppress(OSError):  # a cache that may only be read serves as well
        os.utime(path)
    return path


def _write(path: Path, names: Sequence[str], read: Read) -> None:
    """Write a safetensors file one tensor at a time: its own writer wants all of them in memory at
    once.
    """
    header, end = {}, 0
    for name in names:
        tensor = read(name)
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(read(name).to(torch.float32).contiguous().reshape(-1).numpy().data)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write in `folder`; the lock goes with the process that holds it."""
    with (folder / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path) -> None:
    """Drop the copies used longest ago but for one less than are kept, and what killed writers have
    left.
    """
    newest_first = sorted(
        folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in [*newest_first[COPIES_KEPT - 1 :], *folder.glob(f"*{PARTIAL}")]:
        path.unlink()
