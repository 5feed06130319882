"""A copy in float32, on disk, of a checkpoint whose weights are stored in another format.

The tensors of a float32 file are views of it: they take no memory until they are looked at, and
what is looked at the system may drop again. Half precision has to be converted, which would make
copies in memory of all that is frozen. So it is converted once, into the cache, for all processes
of this machine.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedbt_app.files import PARTIAL, alone_in, replace_file

COPIES_KEPT = 3  # those used last: each takes 4 bytes a parameter

Read = Callable[[str], torch.Tensor]  # by name


def float32_copy(
    folder: Path,
    identity: str,
    names: Sequence[str],
    read: Read,
) -> Path:
    """Return the file in `folder` of what `read` gives for `names`, in float32; write it if needed.

    Parameters
    ----------
    identity : tells the source from any other file, and from its own earlier and later states

    Raises
    ------
    OSError
        When it is not there and cannot be written.
    """
    key = hashlib.sha256(identity.encode()).hexdigest()
    path = folder / f"{key}.safetensors"
    if not _is_whole(path):
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            if not _is_whole(path):  # no other process was faster
                _make_room(folder)
                replace_file(path, lambda temporary: _write(temporary, names, read))
    # its time says when it was used last; a cache that may only be read serves as well
    with contextlib.suppress(OSError):
        os.utime(path)
    return path


def _write(path: Path, names: Sequence[str], read: Read) -> None:
    """Write a safetensors file one tensor at a time: its own writer wants all at once in memory."""
    header = {}
    begin = 0
    for name in names:
        tensor = read(name)
        end = begin + 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            values = read(name).to(torch.float32).contiguous()
            file.write(values.reshape(-1).numpy().data)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _last_used(path: Path) -> float:
    return path.stat().st_mtime


def _make_room(folder: Path) -> None:
    """Drop all but the copies used last, with room for one more, and what killed writers left."""
    copies = list(folder.glob("*.safetensors"))
    copies.sort(key=_last_used, reverse=True)
    outdated = copies[COPIES_KEPT - 1 :]
    for path in (*outdated, *folder.glob(f"*{PARTIAL}")):
        path.unlink()
