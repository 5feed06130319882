"""ParameterPool: a client's own copy, on disk, of every part that differs from the base checkpoint.

Version 0 of a part is what the run starts from: the base checkpoint's tensors, plus those that the
base lacks and the server made (a new head, adapters). Each aggregation raises a part's version by
one. A part is one file, replaced atomically, with its version and digest inside: a part whose file
is missing, damaged or of another run counts as not held, and the server sends it again.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedbt_app.errors import FedBTError

BASE = 0  # the version that a run starts from
RUNS_KEPT = 3
_LINEAGE = re.compile(r"[0-9a-f]{32}")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PartState:
    """Which state of a part this is: equal digests are equal bits."""

    version: int
    digest: str


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and float32 values; server and clients compare it."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].contiguous().numpy().data)
    return state.hexdigest()


class ParameterPool:
    """The parts of one client in one run (*lineage*), under `root`."""

    def __init__(self, root: Path, lineage: str, client: str) -> None:
        if not _LINEAGE.fullmatch(lineage):  # it comes from a message and names a folder
            raise FedBTError("the server sent a malformed run lineage: update FedBT on both sides")
        self.folder = root / lineage / re.sub(r"[^A-Za-z0-9_-]", "_", client)
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(root / lineage)
        _drop_old_runs(root)

    def states(self) -> dict[str, PartState]:
        """Return every part held whole, reading each to verify its digest."""
        held = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if (read := _read(path)) is not None:
                held[path.stem] = read[0]
        return held

    def tensors(self, part: str) -> Tensors:
        """Return the pool's tensors of `part`; none when it holds only what the base does."""
        read = _read(self._path(part))
        return read[1] if read else {}

    def store(self, part: str, version: int, tensors: Tensors) -> PartState:
        """Write `part` whole, or not at all."""
        state = PartState(version, digest(tensors))
        self._write(self._path(part), state, tensors)
        return state

    def _write(self, path: Path, state: PartState, tensors: Tensors) -> None:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"version": str(state.version), "digest": state.digest})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def residual(self, part: str) -> Tensors:
        """Return what this client's encodings of `part` have dropped so far; nothing when that is lost."""
        read = _read(self._residuals / f"{part}.safetensors")
        return read[1] if read else {}

    def store_residual(self, part: str, tensors: Tensors) -> None:
        """Keep what the last encoding of `part` dropped, for the next one."""
        if tensors:
            self._residuals.mkdir(exist_ok=True)
            self._write(self._residuals / f"{part}.safetensors", PartState(BASE, digest(tensors)), tensors)

    @property
    def _residuals(self) -> Path:
        return self.folder / "residuals"

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def _read(path: Path) -> tuple[PartState, Tensors] | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        state = PartState(int(metadata["version"]), metadata["digest"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (state, tensors) if digest(tensors) == state.digest else None


def _drop_old_runs(root: Path) -> None:
    """Keep the pools of the runs used last: an older run that comes back is simply sent its parts again."""
    runs = sorted(
        (path for path in root.iterdir() if _LINEAGE.fullmatch(path.name)), key=lambda path: path.stat().st_mtime
    )
    for path in runs[:-RUNS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
