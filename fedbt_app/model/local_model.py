"""Pool + plan -> the local torch model: which blocks it has, what of it is trained.

*Trained* means `requires_grad` after `build`; the optimizer, the delta, the bytes and the FLOPs all
follow from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fedbt_app.encoders.architecture import Architecture
from fedbt_app.encoders.base import Encoder
from fedbt_app.model.weights import ModelSpec, Weights
from fedbt_app.parts import EMBEDDINGS, HEAD, adapter_part, block_part
from fedbt_app.plan import RoundPlan
from fedbt_app.tensors import Tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LocalModel:
    """A built model; `trained` maps canonical (global) tensor names to its trained parameters."""

    module: Any  # transformers' model: a torch.nn.Module
    encoder: Encoder
    plan: RoundPlan
    spec: ModelSpec
    trained: dict[str, torch.nn.Parameter]
    device: torch.device = CPU
    bfloat16: bool = False

    def snapshot(self) -> Tensors:
        """Copy the trained tensors to the CPU, float32."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in self.trained.items()
        }

    def deltas(self, weights: Weights) -> Iterator[tuple[str, Tensors]]:
        """Yield each trained part with its trained minus its received tensors, float32 on the CPU.

        What was received is read from `weights` again, part by part: it does not take memory while
        training.
        """
        for part in self.plan.trained_parts:
            deltas = {}
            for name, received in weights.part(part).items():
                trained = self.trained[name].detach().to(CPU, torch.float32)
                deltas[name] = trained - received
            yield part, deltas


def build(
    weights: Weights,
    plan: RoundPlan,
    device: torch.device = CPU,
    bfloat16: bool = False,
) -> LocalModel:
    """Build the local model of `plan`: only its own blocks are read and held.

    Returns
    -------
    LocalModel
        With `requires_grad` set on exactly the tensors of `plan.trained_parts`, and dropout active
        only in trained blocks and the head.
    """
    architecture = weights.checkpoint.architecture
    encoder = architecture.encoder
    tensors: Tensors = {}
    for part in (EMBEDDINGS, HEAD):
        tensors |= _own_copy(weights.part(part), part, plan)
    adapted: tuple[int, ...] = ()
    if plan.adapters:
        adapted = plan.trained_blocks
    for position, index in enumerate(plan.local_blocks):
        # adapters in training stay beside their block; those of other blocks go into it
        block = weights.block(index, merge=index not in adapted)
        block = _own_copy(block, block_part(index), plan)
        for name, tensor in block.items():
            tensors[encoder.at_block(name, position)] = tensor
    module = _stock(architecture, weights.spec, plan)
    encoder.fill(module, tensors)
    if adapted:
        _inject_adapters(module, encoder, weights.spec, plan)
        _fill_adapters(module, weights, plan)
    module.to(device)
    return _prepared(module, encoder, weights.spec, plan, device, bfloat16)


def weightless(
    architecture: Architecture,
    spec: ModelSpec,
    plan: RoundPlan,
) -> LocalModel:
    """Build the local model of `plan` on the meta device: for shapes and FLOPs, not for numbers."""
    encoder = architecture.encoder
    module = _stock(architecture, spec, plan)
    if plan.adapters and plan.trained_blocks:
        _inject_adapters(module, encoder, spec, plan)
    meta = torch.device("meta")
    return _prepared(module, encoder, spec, plan, meta, bfloat16=False)


def _own_copy(tensors: Tensors, part: str, plan: RoundPlan) -> Tensors:
    """Copy what will be trained: what was read may be a view of a file."""
    if part not in plan.trained_parts:
        return tensors
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _stock(architecture: Architecture, spec: ModelSpec, plan: RoundPlan) -> Any:
    """Make transformers' stock model, as deep as the local one, without any random weights."""
    return architecture.encoder.weightless(
        architecture.config,
        head=spec.task.head,
        labels=spec.labels,
        depth=len(plan.local_blocks),
        dropout=spec.dropout,
    )


def _inject_adapters(
    module: Any,
    encoder: Encoder,
    spec: ModelSpec,
    plan: RoundPlan,
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # peft divides: a float is as good
        lora_dropout=spec.dropout,
        target_modules=list(encoder.adapted_modules),
        layers_to_transform=[plan.local_blocks.index(block) for block in plan.trained_blocks],
        layers_pattern=encoder.blocks_at.rpartition(".")[2],
    )
    inject_adapter_in_model(config, module)


def _fill_adapters(module: Any, weights: Weights, plan: RoundPlan) -> None:
    """Put the adapters' own values into what peft has made of them."""
    encoder = weights.checkpoint.architecture.encoder
    parameters = dict(module.named_parameters())
    for block in plan.trained_blocks:
        position = plan.local_blocks.index(block)
        for name, tensor in weights.part(adapter_part(block)).items():
            local_name = encoder.at_block(name, position)
            # peft's name for its one adapter
            local_name = local_name.replace(".weight", ".default.weight")
            parameters[local_name].data.copy_(tensor)


def _prepared(
    module: Any,
    encoder: Encoder,
    spec: ModelSpec,
    plan: RoundPlan,
    device: torch.device,
    bfloat16: bool,
) -> LocalModel:
    trained = _mark_trained(module, encoder, plan)
    _set_modes(module, encoder, plan)
    return LocalModel(module, encoder, plan, spec, trained, device, bfloat16)


def _mark_trained(
    module: Any,
    encoder: Encoder,
    plan: RoundPlan,
) -> dict[str, torch.nn.Parameter]:
    trained = {}
    for local_name, parameter in module.named_parameters():
        name = local_name.replace(".default.weight", ".weight")  # peft's name for its one adapter
        part = encoder.part_of(name)
        kind, _, position = part.partition(".")
        if position:  # a position of the local model: say which global block that is
            block = plan.local_blocks[int(position)]
            part = f"{kind}.{block}"
            name = encoder.at_block(name, block)
        parameter.requires_grad_(part in plan.trained_parts)
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def _set_modes(module: Any, encoder: Encoder, plan: RoundPlan) -> None:
    """Dropout noise only where something is learned: frozen blocks run as in evaluation."""
    module.train()
    if not plan.embeddings:
        encoder.embeddings(module).eval()
    for block, layer in zip(plan.local_blocks, encoder.blocks(module), strict=True):
        layer.train(block in plan.trained_blocks)
