"""Pool + plan -> the local torch model: which blocks it has, what of it is trained.

*Trained* means `requires_grad` after `build`; the optimizer, the delta, the bytes and the FLOPs all
follow from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fedbt_app.encoders.bert import at_block, part_of
from fedbt_app.errors import FedBTError
from fedbt_app.model.weights import ModelSpec, Weights
from fedbt_app.parts import EMBEDDINGS, HEAD, adapter_part, block_part
from fedbt_app.plan import RoundPlan
from fedbt_app.tensors import Tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LocalModel:
    """A built model; `trained` maps canonical (global) tensor names to its trained parameters."""

    module: Any  # transformers' model: a torch.nn.Module
    plan: RoundPlan
    spec: ModelSpec
    trained: dict[str, torch.nn.Parameter]
    device: torch.device = CPU
    bfloat16: bool = False

    def snapshot(self) -> Tensors:
        """Copy the trained tensors to the CPU, float32."""
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.trained.items()}

    def deltas(self, weights: Weights) -> Iterator[tuple[str, Tensors]]:
        """Yield each trained part with its trained minus its received tensors, float32 on the CPU.

        What was received is read from `weights` again, part by part: it does not take memory while training.
        """
        for part in self.plan.trained_parts:
            received = weights.part(part)
            yield part, {name: self.trained[name].detach().to(CPU, torch.float32) - received[name] for name in received}


def whole_plan(weights: Weights) -> RoundPlan:
    """Return the plan of the global model with nothing trained: for evaluation and export."""
    return RoundPlan(0, tuple(range(weights.checkpoint.architecture.depth)), ())


def build(weights: Weights, plan: RoundPlan, device: torch.device = CPU, bfloat16: bool = False) -> LocalModel:
    """Build the local model of `plan`: only its own blocks are read and held.

    Returns
    -------
    LocalModel
        With `requires_grad` set on exactly the tensors of `plan.trained_parts`, and dropout active
        only in trained blocks and the head.
    """
    tensors = _own_copy(weights.part(EMBEDDINGS), EMBEDDINGS, plan) | _own_copy(weights.part(HEAD), HEAD, plan)
    adapted = plan.trained_blocks if plan.adapters else ()
    for position, index in enumerate(plan.local_blocks):
        block = _own_copy(weights.block(index, merge=index not in adapted), block_part(index), plan)
        tensors |= {at_block(name, position): tensor for name, tensor in block.items()}
    module = _assemble(weights, len(plan.local_blocks), tensors)
    if adapted:
        _inject_adapters(module, weights, plan)
    module.to(device)
    trained = _mark_trained(module, plan)
    _set_modes(module, plan)
    return LocalModel(module, plan, weights.spec, trained, device, bfloat16)


def _own_copy(tensors: Tensors, part: str, plan: RoundPlan) -> Tensors:
    """Copy what will be trained: what was read may be a view of a file."""
    return {name: tensor.clone() for name, tensor in tensors.items()} if part in plan.trained_parts else tensors


def _assemble(weights: Weights, depth: int, tensors: Tensors) -> Any:
    """Make transformers' stock model around `tensors` without ever allocating random ones."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    spec = weights.spec
    config = BertConfig(
        **{
            **{name: value for name, value in weights.checkpoint.config.items() if name not in _REPLACED},
            "num_hidden_layers": depth,
            "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.dropout,
            "id2label": dict(enumerate(spec.labels)) or {0: "LABEL_0"},
            "label2id": {name: index for index, name in enumerate(spec.labels)} or {"LABEL_0": 0},
        }
    )
    classes = {
        "mlm": BertForMaskedLM,
        "classification": BertForSequenceClassification,
        "ner": BertForTokenClassification,
    }
    with torch.device("meta"):
        module: Any = classes[spec.task](config)
    module.load_state_dict(tensors, strict=False, assign=True)
    embeddings = module.bert.embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings).expand((1, -1))
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
    if spec.task == "mlm":
        decoder = module.cls.predictions.decoder
        decoder.weight, decoder.bias = embeddings.word_embeddings.weight, module.cls.predictions.bias
    if unset := [name for name, value in module.named_parameters() if value.is_meta]:
        raise FedBTError(f"the base checkpoint gives no value for {unset[0]}: it is not a complete BERT")
    return module


_REPLACED = {"architectures", "torch_dtype", "dtype", "num_labels", "transformers_version", "_name_or_path"}
_REPLACED |= {"problem_type", "classifier_dropout"}


def _inject_adapters(module: Any, weights: Weights, plan: RoundPlan) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from fedbt_app.encoders.bert import ADAPTED_MODULES

    positions = [plan.local_blocks.index(block) for block in plan.trained_blocks]
    spec = weights.spec
    inject_adapter_in_model(
        LoraConfig(
            r=spec.lora_rank,
            lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # peft divides: a float is as good
            lora_dropout=spec.dropout,
            target_modules=list(ADAPTED_MODULES),
            layers_to_transform=positions,
            layers_pattern="layer",
        ),
        module,
    )
    parameters = dict(module.named_parameters())
    for position, block in zip(positions, plan.trained_blocks, strict=True):
        for name, tensor in weights.part(adapter_part(block)).items():
            parameters[at_block(name, position).replace(".weight", ".default.weight")].data.copy_(tensor)


def _mark_trained(module: Any, plan: RoundPlan) -> dict[str, torch.nn.Parameter]:
    trained = {}
    for local_name, parameter in module.named_parameters():
        name = local_name.replace(".default.weight", ".weight")
        part = part_of(name)
        kind, _, position = part.partition(".")
        if position:  # a position of the local model: say which global block that is
            block = plan.local_blocks[int(position)]
            part, name = f"{kind}.{block}", at_block(name, block)
        parameter.requires_grad_(part in plan.trained_parts)
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def _set_modes(module: Any, plan: RoundPlan) -> None:
    """Dropout noise only where something is learned: frozen blocks run as in evaluation."""
    module.train()
    if not plan.embeddings:
        module.bert.embeddings.eval()
    for block, layer in zip(plan.local_blocks, module.bert.encoder.layer, strict=True):
        layer.train(block in plan.trained_blocks)
