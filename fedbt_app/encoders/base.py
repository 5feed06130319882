"""What a model family has to say of itself; all else follows from transformers' own model of it."""

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
}
_NOT_PASSED_ON |= {"_name_or_path", "problem_type", "classifier_dropout"}


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one model of a family."""

    depth: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int


class Encoder(ABC):
    """A model family: where its parts are in transformers' model, and how one block and its heads
    run.

    Attributes
    ----------
    title : what people call it
    model_types : values of config.json's `model_type` that are of this family
    embeddings_at, blocks_at : dotted names of the embeddings' module and of the list of blocks
    bare_names
        beginnings of tensor names in a checkpoint of the encoder alone, which lack the model's
        prefix
    dimension_keys : config key of each field of Dimensions
    required_keys : config keys that a checkpoint must have beside those
    identity
        config keys that change what the encoder computes, with the library's defaults: part of the
        fingerprint
    dropout_keys : config keys of all dropout probabilities
    adapted_modules : linear layers in a block that LoRA adapts
    skips_queries : whether the last block may compute its outputs only where the loss reads
    plain_blocks
        whether a block is BERT's in what it computes: the closed FLOP formulas hold for it
    """

    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    embeddings_at: ClassVar[str]
    blocks_at: ClassVar[str]
    bare_names: ClassVar[tuple[str, ...]]
    dimension_keys: ClassVar[Mapping[str, str]]
    required_keys: ClassVar[tuple[str, ...]] = ()
    identity: ClassVar[Mapping[str, Any]]
    dropout_keys: ClassVar[tuple[str, ...]]
    adapted_modules: ClassVar[tuple[str, ...]]
    skips_queries: ClassVar[bool] = False
    plain_blocks: ClassVar[bool] = False

    # -- names -------------------------------------------------------------------------------------

    def part_of(self, name: str) -> str:
        """Return the part that a canonical tensor name belongs to."""
        if found := re.match(rf"{re.escape(self.blocks_at)}\.(\d+)\.", name):
            index = int(found.group(1))
            return adapter_part(index) if ".lora_" in name else block_part(index)
        return EMBEDDINGS if name.startswith(f"{self.embeddings_at}.") else HEAD

    def at_block(self, name: str, index: int) -> str:
        """Rename a block's tensor to the same tensor of block `index`; other names stay as they
        are.
        """
        return re.sub(rf"^{re.escape(self.blocks_at)}\.\d+\.", f"{self.blocks_at}.{index}.", name)

    def canonical(self, stored: str) -> str:
        """Return transformers' own name for a stored one: bare encoders lack the prefix, old files
        name norms anew.
        """
        name = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        prefix = self.blocks_at.partition(".")[0]
        return f"{prefix}.{name}" if name.startswith(self.bare_names) else name

    def dimensions(self, config: Mapping[str, Any], source: str) -> Dimensions:
        """Read the sizes off a config.json; `source` names it in errors.

        Raises
        ------
        FedBTError
            When the config lacks a key, for which the library would guess the size of another
            model.
        """
        try:
            for key in self.required_keys:
                config[key]
            return Dimensions(
                **{field: int(config[key]) for field, key in self.dimension_keys.items()}
            )
        except KeyError as missing:
            raise FedBTError(
                f"{source} has no {missing} in its config.json: the checkpoint is incomplete"
            ) from None

    # -- transformers' model -----------------------------------------------------------------------

    def weightless(
        self,
        config: Mapping[str, Any],
        head: HeadKind,
        labels: Sequence[str],
        depth: int,
        dropout: float = 0.0,
    ) -> Any:
        """Make transformers' stock model of `depth` blocks on the meta device: modules and shapes
        without memory.
        """
        import transformers

        own = {name: value for name, value in config.items() if name not in _NOT_PASSED_ON}
        own |= {self.dimension_keys["depth"]: depth}
        own |= dict.fromkeys(self.dropout_keys, dropout)
        names = labels or ("LABEL_0",)
        own |= {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        settings = transformers.AutoConfig.for_model(config["model_type"], **own)
        with torch.device("meta"):
            return getattr(transformers, head.value).from_config(settings)

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
                    f"the base checkpoint gives no value for {name}: it is not a complete {self.title}"
                )

    def fill_buffers(self, module: Any) -> None:
        """Make the buffers that no checkpoint holds."""
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "position_ids":
                    setattr(owner, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
                elif name == "token_type_ids":
                    setattr(owner, name, torch.zeros(buffer.shape, dtype=buffer.dtype))

    def embeddings(self, module: Any) -> Any:
        """Return the embeddings' module."""
        return module.get_submodule(self.embeddings_at)

    def blocks(self, module: Any) -> Any:
        """Return the list of blocks."""
        return module.get_submodule(self.blocks_at)

    # -- the exact step ----------------------------------------------------------------------------

    def embed(self, module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states (B, T, H) below the first block for word pieces (B, T)."""
        states: torch.Tensor = self.embeddings(module)(input_ids=input_ids)
        return states

    @abstractmethod
    def run_block(
        self, layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor | None
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

    def run_head(self, module: Any, head: HeadKind, states: torch.Tensor) -> torch.Tensor:
        """Return the head's outputs (B, P, outputs) for the states (B, P, H) at the positions that
        the loss reads.
        """
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
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))
