"""The files that a checkpoint's tensors lie in: one or several, of either of two formats.

A tensor that is read is a view of its mapped file.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fedbt_app.errors import FedBTError

SAFETENSORS = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
_INDEX = ".index.json"  # after the name of the whole file: says which shard holds which tensor
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".index")
_NAMED = 5  # so many of what is there are named


class WeightFile(Protocol):
    """Stored tensors, read one by one by the names that they are stored by."""

    names: list[str]
    paths: list[Path]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor as it is stored."""


def open_weights(folder: Path) -> WeightFile:
    """Open the weights of a checkpoint: safetensors before PyTorch's own, whole before shards.

    Raises
    ------
    FedBTError
        When there are none, or they cannot be read; it names what is there.
    """
    for name in (SAFETENSORS, TORCH_FILE):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / f"{name}{_INDEX}").is_file():
            return _Shards(folder / f"{name}{_INDEX}")
    there = sorted(path.name for path in folder.iterdir() if path.name.endswith(_WEIGHTS))
    wanted = f"{folder} has neither {SAFETENSORS} nor {TORCH_FILE}, nor the {_INDEX} of either"
    if not there:
        raise FedBTError(f"{wanted}: download its weights")
    raise FedBTError(
        f"{wanted}, but {_listed(there)}: load it with transformers and call save_pretrained, "
        "or download what is missing"
    )


def open_file(path: Path) -> WeightFile:
    """Open one file of weights."""
    if path.name.endswith(".safetensors"):
        return _Safetensors(path)
    return _TorchFile(path)


def _listed(names: list[str]) -> str:
    dots = ", .." if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + dots


class _Safetensors:
    def __init__(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                self.names = list(file.keys())
        except (SafetensorError, OSError, struct.error):
            raise FedBTError(f"{path} is not a whole safetensors file: download it again") from None
        self.paths = [path]

    def read(self, name: str) -> torch.Tensor:
        # A tensor is a view of the mapped file. Opened for each, its pages count as this process's
        # memory only when they are looked at, and go with the tensor instead of with the last one.
        with safe_open(str(self.paths[0]), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


class _TorchFile:
    def __init__(self, path: Path) -> None:
        try:
            # weights_only: a checkpoint from the hub may not run code here
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # of many kinds, for a file that may hold anything
            stored = None
        if not isinstance(stored, Mapping):
            raise FedBTError(
                f"{path} is not a plain PyTorch weights file: convert it to {SAFETENSORS}"
            )
        self._tensors = dict(_tensors_in(_unwrapped(stored, path)))
        self.paths = [path]
        self.names = list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _tensors_in(stored: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(stored, Mapping):
        for name, value in stored.items():
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                yield name, value


def _unwrapped(stored: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """Return the one set of tensors in what a trainer has saved, beside whatever else it kept."""
    inner = {str(key): value for key, value in stored.items() if any(_tensors_in(value))}
    if len(inner) == 1:
        (only,) = inner.values()
        weights: Mapping[Any, Any] = only
        return weights
    if inner:
        raise FedBTError(
            f"{path} holds several sets of tensors ({_listed(sorted(inner))}): save the one that is meant alone"
        )
    if not any(_tensors_in(stored)):
        keys = _listed(sorted(map(str, stored)))
        raise FedBTError(f"{path} holds no tensors, but {keys or 'nothing'}: save a state dict")
    return stored


class _Shards:
    """The several files that an index names."""

    def __init__(self, index: Path) -> None:
        try:
            shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._shard_of = {str(name): str(shard) for name, shard in shard_of.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise FedBTError(f"{index} is not an index of shards: download it again") from None
        self._files: dict[str, WeightFile] = {}
        for shard in sorted(set(self._shard_of.values())):
            path = index.parent / shard
            if path.parent != index.parent or not path.is_file():
                raise FedBTError(f"{index} names {shard}, which is not there: download it, too")
            self._files[shard] = open_file(path)
        held = {(name, shard) for shard, file in self._files.items() for name in file.names}
        for name, shard in self._shard_of.items():
            if (name, shard) not in held:
                raise FedBTError(f"{index.parent / shard} lacks {name}: download it again")
        self.names = list(self._shard_of)
        self.paths = [path for file in self._files.values() for path in file.paths]

    def read(self, name: str) -> torch.Tensor:
        return self._files[self._shard_of[name]].read(name)
