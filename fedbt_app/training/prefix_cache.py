"""The frozen-prefix cache: what the blocks below every trained one give, computed once.

A file of float32 hidden states, one (T, H) slab an example, read and written by position, never
mapped, so that it does not count as the process's memory. Its folder is named after what the states
follow from (the base's file, number of blocks, the examples' word pieces, number format): a change
of any is another cache. It lies in the folder of the run's parameter pool and goes with it: what an
earlier run computed is computed again, so that a run's FLOPs are its own.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fedbt_app.files import replace_file
from fedbt_app.tasks.batch import Batch

_STATES = "states.f32"
_FILLED = "filled.npy"  # which examples are in it: one bool each
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class FrozenBlocks:
    """What the states of given examples follow from.

    Attributes
    ----------
    base : identifies weights and number format
    depth : how many blocks no round trains; none leaves nothing to keep
    hidden : size of a state
    """

    base: str
    depth: int
    hidden: int


class PrefixCache:
    """Hidden states after `depth` blocks, for the examples of one client.

    A `with` block closes it, also where training fails: what was computed until then is kept.

    Attributes
    ----------
    nbytes : size of the file when every example is in it
    hits, fills : examples read and written by this object
    """

    def __init__(
        self,
        folder: Path,
        depth: int,
        lengths: Sequence[int],
        hidden: int,
    ) -> None:
        self.depth = depth
        self.hits = 0
        self.fills = 0
        self._folder = folder
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])  # in states, by example
        self._hidden = hidden
        self.nbytes = int(self._offsets[-1]) * hidden * _FLOAT_BYTES
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / _STATES, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self._file, self.nbytes)
        self._filled = self._read_filled()

    @classmethod
    def open(
        cls,
        root: Path,
        blocks: FrozenBlocks,
        rows: Sequence[Any],
        budget: int,
    ) -> "PrefixCache | None":
        """Open the cache for `rows`; None when there is nothing to keep, or more than `budget`."""
        lengths = [len(row["input_ids"]) for row in rows]
        needed = sum(lengths) * blocks.hidden * _FLOAT_BYTES
        if not blocks.depth or needed > budget:
            return None
        key = hashlib.sha256(f"{blocks.base} {blocks.depth} {blocks.hidden}".encode())
        for row in rows:
            pieces = np.asarray(row["input_ids"], dtype=np.int32)
            key.update(pieces.tobytes() + b"|")
        return cls(
            folder=root / key.hexdigest(),
            depth=blocks.depth,
            lengths=lengths,
            hidden=blocks.hidden,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, batch: Batch) -> torch.Tensor | None:
        """Return the examples' states (B, T, H), zeros for padding; None if any are missing."""
        if not all(self._filled[row] for row in batch.rows):
            return None
        size, length = batch.input_ids.shape
        states = np.zeros((size, length, self._hidden), dtype=np.float32)
        for index, row in enumerate(batch.rows):
            slab = states[index, : self._lengths[row]]
            target = slab.reshape(-1).view(np.uint8).data  # a view: the file is read into `states`
            read = os.preadv(self._file, [target], self._at(row))
            if read != slab.nbytes:  # the file has been cut short
                return None
        self.hits += len(batch.rows)
        return torch.from_numpy(states)

    def write(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the examples' states (B, T, H); what a full disk refuses is computed again."""
        values = states.detach().to("cpu", torch.float32).numpy()
        for index, row in enumerate(batch.rows):
            slab = np.ascontiguousarray(values[index, : self._lengths[row]])
            with contextlib.suppress(OSError):
                written = os.pwrite(self._file, slab.data, self._at(row))
                self._filled[row] = written == slab.nbytes
                self.fills += int(self._filled[row])

    def close(self) -> None:
        """See states onto the disk first and the note of what is filled second."""
        try:
            with contextlib.suppress(OSError):  # a full disk: the note of before still holds
                if self.fills:
                    os.fsync(self._file)
                    replace_file(self._folder / _FILLED, self._write_filled)
        finally:
            os.close(self._file)

    def _write_filled(self, path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, self._filled)

    def _at(self, row: int) -> int:
        return int(self._offsets[row]) * self._hidden * _FLOAT_BYTES

    def _read_filled(self) -> np.ndarray:
        none = np.zeros(len(self._lengths), dtype=bool)
        try:
            filled: np.ndarray = np.load(self._folder / _FILLED)
        except (OSError, ValueError):
            return none
        if filled.dtype != none.dtype or filled.shape != none.shape:
            return none
        return filled
