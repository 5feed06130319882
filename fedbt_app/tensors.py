"""Named tensors: their digest, and files of them that are whole or count as missing."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedbt_app.files import replace_file
from fedbt_app.parts import PartState

Tensors = dict[str, torch.Tensor]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and float32 values; server and clients compare it."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        values = tensors[name].contiguous().numpy()
        state.update(values.data)  # its bytes, without a copy
    return state.hexdigest()


def write_tensors(path: Path, version: int, tensors: Tensors) -> PartState:
    """Replace `path` by `tensors` with their version and digest."""
    state = PartState(version, digest(tensors))
    metadata = {"version": str(version), "digest": state.digest}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return state


def read_tensors(path: Path) -> tuple[PartState, Tensors] | None:
    """Read what `write_tensors` wrote; None when it is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            state = state_in(file.metadata())
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if digest(tensors) != state.digest:
        return None
    return state, tensors


def state_in(metadata: Mapping[str, str] | None) -> PartState:
    """Return the state that a file's metadata tells; KeyError or ValueError where it tells none."""
    found = metadata or {}
    return PartState(int(found["version"]), found["digest"])
