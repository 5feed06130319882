"""ParameterPool: a client's own copy, on disk, of every part that differs from the base checkpoint.

Version 0 of a part is what the run starts from: the base checkpoint's tensors, plus those that the
base lacks and the server made (a new head, adapters). Each aggregation raises a part's version by
one. A part is one file, replaced atomically, with its version and digest inside: a part whose file
is missing, damaged or of another run counts as not held, and the server sends it again.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedbt_app.errors import FedBTError
from fedbt_app.parts import BASE, PartState
from fedbt_app.tensors import Tensors, read_tensors, state_in, write_tensors

RUNS_KEPT = 3
_LINEAGE = re.compile(r"[0-9a-f]{32}")


class ParameterPool:
    """The parts of one client in one run (*lineage*), under `root`."""

    def __init__(self, root: Path, lineage: str, client: str) -> None:
        if not _LINEAGE.fullmatch(lineage):  # it comes from a message and names a folder
            raise FedBTError("the server sent a malformed run lineage: update FedBT on both sides")
        self.folder = root / lineage / re.sub(r"[^A-Za-z0-9_-]", "_", client)
        with _writing(root):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(root / lineage)
            _drop_old_runs(root)

    def states(self) -> dict[str, PartState]:
        """Return every part held whole, reading each to verify its digest."""
        held = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            read = read_tensors(path)
            if read is not None:
                state, _ = read
                held[path.stem] = state
        return held

    def tensors(self, part: str) -> Tensors:
        """Return the pool's tensors of `part`; none when it holds only what the base does."""
        return _tensors_in(self._path(part))

    def store(self, part: str, version: int, tensors: Tensors) -> PartState:
        """Write `part` whole, or not at all."""
        with _writing(self.folder):
            return write_tensors(self._path(part), version, tensors)

    def drop(self, part: str) -> None:
        """Hold of `part` no more than the base does."""
        self._path(part).unlink(missing_ok=True)

    def residual(self, part: str) -> Tensors:
        """Return what this client's encodings of `part` dropped so far; nothing when that is lost.

        So far is before the version held now: a round that is done again, because its deltas did
        not come to count, encodes the same as the first time.
        """
        earlier = self._residuals_before(part, self._version(part))
        if not earlier:
            return {}
        return _tensors_in(earlier[-1])

    def store_residual(self, part: str, tensors: Tensors) -> None:
        """Keep what encoding a delta to the held version of `part` dropped, for later versions."""
        if not tensors:
            return
        version = self._version(part)
        path = self._residual(part, version)
        with _writing(self.folder):
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, version, tensors)
            # the last one before this stays: this round may be done again
            outdated = self._residuals_before(part, version)[:-1]
            for residual in outdated:
                residual.unlink()

    def _residual(self, part: str, version: int) -> Path:
        return self.folder / "residuals" / f"{part}@{version:06}.safetensors"

    def _residuals_before(self, part: str, version: int) -> list[Path]:
        found = sorted((self.folder / "residuals").glob(f"{part}@*.safetensors"))
        return [path for path in found if path < self._residual(part, version)]

    def _version(self, part: str) -> int:
        try:
            with safe_open(str(self._path(part)), framework="pt") as file:
                return state_in(file.metadata()).version
        except (OSError, SafetensorError, KeyError, ValueError):
            return BASE

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def _tensors_in(path: Path) -> Tensors:
    read = read_tensors(path)
    if read is None:
        return {}
    _, tensors = read
    return tensors


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    # safetensors has no errno: its text says what the system said
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FedBTError(
            f"the pool {folder} cannot be written ({reason}): "
            "free some space, or set pool-dir to a folder that can be written"
        ) from None


def _drop_old_runs(root: Path) -> None:
    """Keep the pools of the runs used last: an older run that comes back is sent all again."""
    runs = [path for path in root.iterdir() if _LINEAGE.fullmatch(path.name)]
    runs.sort(key=lambda path: path.stat().st_mtime)
    for path in runs[:-RUNS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
