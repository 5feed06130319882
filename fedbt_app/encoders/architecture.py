"""One model of a family: its sizes and the shapes of its tensors, from its config alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedbt_app.encoders import ENCODERS
from fedbt_app.encoders.base import Dimensions, Encoder
from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, HeadKind, Shapes, block_part

ANY_HEAD = HeadKind.TOKEN  # embeddings and blocks have the same shapes under every head


@dataclass(frozen=True)
class Architecture:
    """A family's model of certain dimensions.

    `settings` is the config.json as text: a value that can be compared, hashed and kept.
    """

    encoder: Encoder
    dimensions: Dimensions
    settings: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "Architecture":
        """Read a transformers config.json; `source` names it in errors.

        Raises
        ------
        FedBTError
            For a model type that no family here has, for an incomplete config, and for one of a
            model that would not be trained as what it is.
        """
        kind = config.get("model_type") or _type_by_class(config)
        if kind not in ENCODERS:
            supported = ", ".join(ENCODERS)
            mend = "choose such a checkpoint"
            if kind is None:
                mend = 'if it is one, say so in its config.json, as in "model_type": "bert"'
            raise FedBTError(f"{source} is of model type {kind!r}; supported: {supported} - {mend}")
        encoder = ENCODERS[kind]
        encoder.check(config, source)
        return cls(
            encoder=encoder,
            dimensions=encoder.dimensions(config, source),
            settings=json.dumps({**config, "model_type": kind}, sort_keys=True),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The config.json."""
        config: dict[str, Any] = json.loads(self.settings)
        return config

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.dimensions.depth

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.dimensions.hidden

    def embeddings(self) -> Shapes:
        """Shapes of the embedding tensors."""
        parts = _parts(self, ANY_HEAD, num_labels=1)
        return dict(parts[EMBEDDINGS])

    def block(self, index: int) -> Shapes:
        """Shapes of the tensors of encoder block `index`."""
        parts = _parts(self, ANY_HEAD, num_labels=1)
        return dict(parts[block_part(index)])

    def adapter(self, index: int, rank: int) -> Shapes:
        """Shapes of the LoRA tensors on encoder block `index`."""
        shapes: Shapes = {}
        for name, shape in self.block(index).items():
            module, _, kind = name.rpartition(".")
            module_name = module.rpartition(".")[2]
            if kind == "weight" and module_name in self.encoder.adapted_modules:
                outputs, inputs = shape
                shapes[f"{module}.lora_A.weight"] = (rank, inputs)
                shapes[f"{module}.lora_B.weight"] = (outputs, rank)
        return shapes

    def head(self, kind: HeadKind, num_labels: int) -> Shapes:
        """Shapes of the trained output head, without a decoder that is tied to the embeddings."""
        return dict(_parts(self, kind, num_labels)[HEAD])

    def label_tensors(self, kind: HeadKind) -> set[str]:
        """Names of the head's tensors that are made for one set of labels: their shapes tell."""
        for_one = self.head(kind, num_labels=1)
        for_two = self.head(kind, num_labels=2)
        return {name for name, shape in for_one.items() if shape != for_two[name]}

    def part(
        self,
        part: str,
        kind: HeadKind,
        num_labels: int,
        rank: int,
    ) -> Shapes:
        """Shapes of one part, by its name; FedBTError when there is none of that name."""
        if part == EMBEDDINGS:
            return self.embeddings()
        if part == HEAD:
            return self.head(kind, num_labels)
        group, _, number = part.partition(".")
        if number.isdecimal() and int(number) < self.depth:
            index = int(number)
            if group == "block":
                return self.block(index)
            if group == "adapter":
                return self.adapter(index, rank)
        raise FedBTError(f"{part!r} is not a part of a {self.encoder.title} of {self.depth} blocks")

    def model(self, kind: HeadKind, num_labels: int) -> Shapes:
        """Shapes of every tensor of the whole model with such a head."""
        whole: Shapes = {}
        for shapes in _parts(self, kind, num_labels).values():
            whole |= shapes
        return whole


def _type_by_class(config: Mapping[str, Any]) -> str | None:
    """Return the type of an older config.json by the class that wrote it."""
    for kind, encoder in ENCODERS.items():
        classes = config.get("architectures") or ()
        if classes and all(encoder.has_class(str(name)) for name in classes):
            return kind
    return None


# cached, as every question about shapes ends here and the answer takes making a whole model
@cache
def _parts(
    architecture: Architecture,
    kind: HeadKind,
    num_labels: int,
) -> dict[str, Shapes]:
    """Read the shapes off transformers' model, by part; tensors tied to each other count once."""
    labels = [f"LABEL_{index}" for index in range(max(1, num_labels))]
    encoder = architecture.encoder
    module = encoder.weightless(architecture.config, kind, labels, architecture.depth)
    parts: dict[str, Shapes] = {}
    for name, parameter in module.named_parameters():
        shapes = parts.setdefault(encoder.part_of(name), {})
        shapes[name] = tuple(parameter.shape)
    return parts
