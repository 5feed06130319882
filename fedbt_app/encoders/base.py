"""What a model family has to say of itself; all else follows from transformers' own model of it."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, HeadKind, adapter_part, block_part

# Of a checkpoint's config.json: what a run decides itself, or what says nothing of the model.
_NOT_PASSED_ON = {
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "num_labels",
    "transformers_version",
    "_name_or_path",
    "problem_type",
    "classifier_dropout",
}


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one model of a family."""

    depth: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int


@dataclass(frozen=True)
class Demand:
    """The one value of a config key with which a model is trained as what it is.

    Attributes
    ----------
    value : it is the library's default, too
    mend : why, and what to do about another value
    head : the head that it matters to; None for any
    """

    value: Any
    mend: str
    head: HeadKind | None = None


class Encoder(ABC):
    """A model family: where its parts are in transformers' model, and how a block and heads run.

    Attributes
    ----------
    title : what people call it
    model_types : values of config.json's `model_type` that are of this family
    class_prefix
        how the names of transformers' classes for it begin: tells a config.json without a type
    embeddings_at, blocks_at : dotted names of the embeddings' module and of the list of blocks
    bare_names
        beginnings of tensor names in a checkpoint of the encoder alone, which lack the model's
        prefix
    dimension_keys : config key of each field of Dimensions
    required_keys : config keys that a checkpoint must have beside those
    identity
        config keys that change what the encoder computes, with the library's defaults: part of the
        fingerprint
    demands : config keys that change it in a way that is not run here
    dropout_keys : config keys of all dropout probabilities
    adapted_modules : linear layers in a block that LoRA adapts
    skips_queries : whether the last block may compute its outputs only where the loss reads
    plain_blocks
        whether a block is BERT's in what it computes: the closed FLOP formulas hold for it
    """

    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    class_prefix: ClassVar[str] = ""
    embeddings_at: ClassVar[str]
    blocks_at: ClassVar[str]
    bare_names: ClassVar[tuple[str, ...]]
    dimension_keys: ClassVar[Mapping[str, str]]
    required_keys: ClassVar[tuple[str, ...]] = ()
    identity: ClassVar[Mapping[str, Any]]
    demands: ClassVar[Mapping[str, Demand]] = {}
    dropout_keys: ClassVar[tuple[str, ...]]
    adapted_modules: ClassVar[tuple[str, ...]]
    skips_queries: ClassVar[bool] = False
    plain_blocks: ClassVar[bool] = False

    # -- names -------------------------------------------------------------------------------------

    def part_of(self, name: str) -> str:
        """Return the part that a canonical tensor name belongs to."""
        found = re.match(rf"{re.escape(self.blocks_at)}\.(\d+)\.", name)
        if found:
            index = int(found[1])
            if ".lora_" in name:
                return adapter_part(index)
            return block_part(index)
        if name.startswith(f"{self.embeddings_at}."):
            return EMBEDDINGS
        return HEAD

    def at_block(self, name: str, index: int) -> str:
        """Rename a block's tensor to the same tensor of block `index`; other names stay."""
        any_block = rf"^{re.escape(self.blocks_at)}\.\d+\."
        return re.sub(any_block, f"{self.blocks_at}.{index}.", name)

    def canonical(self, stored: str) -> str:
        """Return transformers' own name for a stored one; bare encoders lack the prefix."""
        # old files call a norm's tensors gamma and beta
        name = stored.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(self.bare_names):
            prefix = self.blocks_at.partition(".")[0]
            return f"{prefix}.{name}"
        return name

    def dimensions(self, config: Mapping[str, Any], source: str) -> Dimensions:
        """Read the sizes off a config.json; `source` names it in errors.

        Raises
        ------
        FedBTError
            When the config lacks a key, for which the library would guess the size of another
            model.
        """
        keys = self.dimension_keys
        for key in (*self.required_keys, *keys.values()):
            if key not in config:
                raise FedBTError(
                    f"{source} has no {key!r} in its config.json: the checkpoint is incomplete"
                )
        sizes = {field: int(config[key]) for field, key in keys.items()}
        return Dimensions(**sizes)

    def has_class(self, name: str) -> bool:
        """Say whether transformers' class of that name makes a model of this family."""
        kinds = rf"{re.escape(self.class_prefix)}(Model|LMHeadModel|For[A-Z]\w+)"
        return bool(self.class_prefix) and bool(re.fullmatch(kinds, name))

    def check(self, config: Mapping[str, Any], source: str, head: HeadKind | None = None) -> None:
        """Refuse a config that makes a model which would not be trained as what it is.

        Without `head` that is any model of it, with one only those with that head.
        """
        for key, demand in self.demands.items():
            value = config.get(key)
            if demand.head == head and value not in (None, demand.value):
                written = json.dumps(value)
                raise FedBTError(f"{source} has {key}={written} in its config.json: {demand.mend}")

    # -- transformers' model -----------------------------------------------------------------------

    def weightless(
        self,
        config: Mapping[str, Any],
        head: HeadKind,
        labels: Sequence[str],
        depth: int,
        dropout: float = 0.0,
    ) -> Any:
        """Make transformers' stock model of `depth` blocks: modules and shapes, but no memory."""
        import transformers

        own = {key: value for key, value in config.items() if key not in _NOT_PASSED_ON}
        own[self.dimension_keys["depth"]] = depth
        own |= dict.fromkeys(self.dropout_keys, dropout)
        names = labels or ("LABEL_0",)
        own["id2label"] = dict(enumerate(names))
        own["label2id"] = {name: index for index, name in enumerate(names)}
        settings = transformers.AutoConfig.for_model(config["model_type"], **own)
        model_class = getattr(transformers, head.value)
        with torch.device("meta"):
            return model_class.from_config(settings)

    def fill(self, module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `tensors` (canonical names) into a weightless model as they are, without a copy.

        Raises
        ------
        FedBTError
            When a parameter or buffer is left without a value.
        """
        module.load_state_dict(tensors, strict=False, assign=True)
        self.fill_buffers(module)
        module.tie_weights()
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_meta:
                raise FedBTError(
                    f"the base checkpoint gives no value for {name}: "
                    f"it is not a complete {self.title}"
                )

    def fill_buffers(self, module: Any) -> None:
        """Make the buffers that no checkpoint holds."""
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "position_ids":
                    positions = torch.arange(buffer.shape[-1])
                    setattr(owner, name, positions.expand(buffer.shape))
                elif name == "token_type_ids":
                    zeros = torch.zeros(buffer.shape, dtype=buffer.dtype)
                    setattr(owner, name, zeros)

    def embeddings(self, module: Any) -> Any:
        """Return the embeddings' module."""
        return module.get_submodule(self.embeddings_at)

    def blocks(self, module: Any) -> Any:
        """Return the list of blocks."""
        return module.get_submodule(self.blocks_at)

    # -- the exact step ----------------------------------------------------------------------------

    def embed(self, module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states (B, T, H) below the first block for word pieces (B, T)."""
        embeddings = self.embeddings(module)
        states: torch.Tensor = embeddings(input_ids=input_ids)
        return states

    @abstractmethod
    def run_block(
        self,
        layer: Any,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        at: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run one block.

        Parameters
        ----------
        hidden : (B, T, H)
        mask : (B, 1, 1, T) bool, True where attention may look; None for everywhere
        at
            (B, P) positions whose outputs are wanted; None for all, and always None unless
            `skips_queries`

        Returns
        -------
        torch.Tensor
            (B, P, H), or (B, T, H) for all.
        """

    def run_head(
        self,
        module: Any,
        head: HeadKind,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """Return the head's outputs (B, P, outputs) for the states (B, P, H) at loss positions."""
        run = {
            HeadKind.MASKED_LM: self.masked_lm,
            HeadKind.SEQUENCE: self.sequence,
            HeadKind.TOKEN: self.token,
        }
        return run[head](module, states)

    @abstractmethod
    def masked_lm(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Run the head that predicts word pieces."""

    @abstractmethod
    def sequence(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Run the head that reads a whole row, from the states (B, 1, H) of its first piece."""

    @abstractmethod
    def token(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Run the head that reads single positions."""


def taken_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the states (B, P, H) at `positions` (B, P) of `hidden` (B, T, H)."""
    # expanded, not copied: gather wants an index for each of the H numbers of a state
    index = positions[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)
