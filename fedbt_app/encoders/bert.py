"""The block map of a BERT: which tensor belongs to which part, and how large each is.

A *part* is the unit that is trained, versioned and sent: `embeddings`, `block.3`, `adapter.3`
(the LoRA adapters of block 3) or `head`. Tensors go by their names in transformers' BertForMaskedLM,
BertForSequenceClassification and BertForTokenClassification (the *canonical* names).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, Shapes, adapter_part, block_part

SUPPORTED_MODEL_TYPES = ("bert",)
ADAPTED_MODULES = ("query", "value")  # where LoRA goes in BERT by peft's own default

_BLOCK = re.compile(r"^bert\.encoder\.layer\.(\d+)\.")
_HEAD_PREFIXES = ("bert.pooler.", "cls.predictions.", "classifier.")


def part_of(name: str) -> str:
    """Return the part that canonical tensor `name` belongs to."""
    if match := _BLOCK.match(name):
        index = int(match.group(1))
        return adapter_part(index) if ".lora_" in name else block_part(index)
    if name.startswith("bert.embeddings."):
        return EMBEDDINGS
    if name.startswith(_HEAD_PREFIXES):
        return HEAD
    raise FedBTError(f"tensor {name!r} is not part of a BERT: the checkpoint is of another model")


def at_block(name: str, index: int) -> str:
    """Rename a block's tensor to the same tensor of block `index`."""
    return _BLOCK.sub(f"bert.encoder.layer.{index}.", name)


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a BERT, from its config alone."""

    depth: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 512
    token_types: int = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "Architecture":
        """Read a transformers config.json; `source` names it in errors."""
        kind = config.get("model_type")
        if kind not in SUPPORTED_MODEL_TYPES:
            supported = ", ".join(SUPPORTED_MODEL_TYPES)
            raise FedBTError(f"{source} is of model type {kind!r}; supported: {supported} - choose a BERT checkpoint")
        try:
            return cls(
                depth=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                positions=int(config["max_position_embeddings"]),
                token_types=int(config["type_vocab_size"]),
            )
        except KeyError as missing:
            raise FedBTError(f"{source} has no {missing} in its config.json: the checkpoint is incomplete") from None

    def embeddings(self) -> Shapes:
        """Shapes of the embedding tensors."""
        h, at = self.hidden, "bert.embeddings"
        return {
            f"{at}.word_embeddings.weight": (self.vocabulary, h),
            f"{at}.position_embeddings.weight": (self.positions, h),
            f"{at}.token_type_embeddings.weight": (self.token_types, h),
            f"{at}.LayerNorm.weight": (h,),
            f"{at}.LayerNorm.bias": (h,),
        }

    def block(self, index: int) -> Shapes:
        """Shapes of the 16 tensors of encoder block `index`."""
        h, f, at = self.hidden, self.intermediate, f"bert.encoder.layer.{index}"
        shapes: Shapes = {}
        for module, rows, columns in (
            ("attention.self.query", h, h),
            ("attention.self.key", h, h),
            ("attention.self.value", h, h),
            ("attention.output.dense", h, h),
            ("attention.output.LayerNorm", h, 0),
            ("intermediate.dense", f, h),
            ("output.dense", h, f),
            ("output.LayerNorm", h, 0),
        ):
            shapes[f"{at}.{module}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"{at}.{module}.bias"] = (rows,)
        return shapes

    def adapter(self, index: int, rank: int) -> Shapes:
        """Shapes of the LoRA tensors on encoder block `index`."""
        shapes: Shapes = {}
        for module in ADAPTED_MODULES:
            at = f"bert.encoder.layer.{index}.attention.self.{module}"
            shapes[f"{at}.lora_A.weight"] = (rank, self.hidden)
            shapes[f"{at}.lora_B.weight"] = (self.hidden, rank)
        return shapes

    def head(self, task: str, num_labels: int) -> Shapes:
        """Shapes of the trained output head; the MLM decoder is tied to the word embeddings."""
        h = self.hidden
        if task == "mlm":
            at = "cls.predictions"
            return {
                f"{at}.bias": (self.vocabulary,),
                f"{at}.transform.dense.weight": (h, h),
                f"{at}.transform.dense.bias": (h,),
                f"{at}.transform.LayerNorm.weight": (h,),
                f"{at}.transform.LayerNorm.bias": (h,),
            }
        pooler: Shapes = {"bert.pooler.dense.weight": (h, h), "bert.pooler.dense.bias": (h,)}
        classifier: Shapes = {"classifier.weight": (num_labels, h), "classifier.bias": (num_labels,)}
        return pooler | classifier if task == "classification" else classifier

    def part(self, part: str, task: str, num_labels: int, rank: int) -> Shapes:
        """Shapes of one part, by its name."""
        kind, _, index = part.partition(".")
        if part == EMBEDDINGS:
            return self.embeddings()
        if part == HEAD:
            return self.head(task, num_labels)
        if index.isdecimal() and int(index) < self.depth and kind in ("block", "adapter"):
            return self.block(int(index)) if kind == "block" else self.adapter(int(index), rank)
        raise FedBTError(f"{part!r} is not a part of a BERT of {self.depth} blocks")

    def model(self, task: str, num_labels: int) -> Shapes:
        """Shapes of every tensor of the whole model for `task`."""
        shapes = self.embeddings()
        for index in range(self.depth):
            shapes |= self.block(index)
        return shapes | self.head(task, num_labels)


PRESETS = {
    "bert-base": Architecture(12, 768, 3072, 30522),
    "bert-base-cased": Architecture(12, 768, 3072, 28996),
    "bert-base-chinese": Architecture(12, 768, 3072, 21128),
    "bert-large": Architecture(24, 1024, 4096, 30522),
    "minilm-l6": Architecture(6, 384, 1536, 30522),
}
