from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, plan_of, weights_of
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from fedbt_app.costs.meter import FlopMeter
from fedbt_app.encoders.bert import Bert
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import HEAD, adapter_part, block_part
from fedbt_app.plan import METHODS, RoundPlan, untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading, SpecialTokens
from fedbt_app.tasks.batch import Collator
from fedbt_app.tensors import Tensors
from fedbt_app.training import train
from fedbt_app.training.optimizer import TrainSettings

STOCK: dict[str, Any] = {
    "mlm": BertForMaskedLM,
    "classification": BertForSequenceClassification,
    "ner": BertForTokenClassification,
}
IDS = torch.tensor([[2, 7, 8, 9, 10, 3], [2, 11, 12, 13, 14, 3]])


part_of = Bert().part_of


def weights_for(folder: Path, method: str, task: str) -> Weights:
    return weights_of(folder, task, range(4) if METHODS[method].adapters else ())


def train_a_little(local: LocalModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(4):
        ids = torch.randint(5, 40, (6,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": [2, *ids, 3],
                "label": LABELS["classification"][number % 3],
                "tags": ["", *"OOOOOO", ""],
            }
        )
    tokens = SpecialTokens(0, 4, (0, 1, 2, 3, 4), 40)
    collator = Collator(local.spec.task, Reading(tokens, local.spec.labels, 0.3))
    settings = TrainSettings(epochs=1, batch_size=2, learning_rate=0.01, weight_decay=0.5)
    train.run(local, rows, collator, settings, FlopMeter())


def everything(module: torch.nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# What is trained ----------------------------------------------------------------------------------


def test_exactly_the_tensors_of_the_plans_parts_are_trained(tiny_bert: Path) -> None:
    for method, task in product(METHODS, LABELS):
        weights = weights_for(tiny_bert, method, task)
        plans = [plan_of(method, task, round_) for round_ in range(4)]
        for plan in {(plan.local_blocks, plan.trained_parts): plan for plan in plans}.values():
            local = build(weights, plan)
            assert set(local.trained) == {
                name for part in plan.trained_parts for name in weights.shapes(part)
            }
            grad = [value for value in local.module.parameters() if value.requires_grad]
            assert {id(value) for value in grad} == {id(value) for value in local.trained.values()}
            for part in plan.trained_parts:
                for name, tensor in weights.part(part).items():
                    assert torch.equal(local.trained[name], tensor), (method, task, name)


def test_a_step_with_weight_decay_changes_every_trained_tensor_and_nothing_else(
    tiny_bert: Path,
) -> None:
    file = (tiny_bert / "model.safetensors").read_bytes()
    for method, task in product(METHODS, LABELS):
        weights, plan = weights_for(tiny_bert, method, task), plan_of(method, task)
        received = {
            name: value.clone()
            for part in plan.trained_parts
            for name, value in weights.part(part).items()
        }
        local = build(weights, plan)
        before = everything(local.module)
        trained = {
            name
            for name, value in local.module.named_parameters(remove_duplicate=False)
            if value.requires_grad
        }
        train_a_little(local)
        changed = {
            name
            for name, value in everything(local.module).items()
            if not torch.equal(value, before[name])
        }
        assert changed <= trained, (method, task)
        silent = {
            name for name in trained if name.endswith("key.bias") or "token_type" in name
        }  # no gradient
        assert trained - changed <= silent, (method, task)
        held = {
            name: value for part in plan.trained_parts for name, value in weights.part(part).items()
        }
        assert all(torch.equal(held[name], received[name]) for name in received), (method, task)
    assert (tiny_bert / "model.safetensors").read_bytes() == file


def test_dropout_is_active_in_trained_blocks_and_the_head_only(tiny_bert: Path) -> None:
    for task, local_depth in (("mlm", 2), ("mlm", 4), ("classification", 3), ("ner", 4)):
        plan = plan_of("fedbt", task, 0, local_depth)
        module: Any = build(weights_of(tiny_bert, task), plan).module
        assert not module.bert.embeddings.dropout.training
        for block, layer in zip(plan.local_blocks, module.bert.encoder.layer, strict=True):
            assert (
                layer.output.dropout.training
                is layer.attention.self.training
                is (block in plan.trained_blocks)
            )
        if task != "mlm":
            assert module.dropout.training
        full: Any = build(weights_of(tiny_bert, task), plan_of("full", task)).module
        assert all(one.training for one in full.modules())


# Which blocks -------------------------------------------------------------------------------------


def test_a_block_that_was_sampled_twice_stands_at_both_positions(tiny_bert: Path) -> None:
    weights = weights_of(tiny_bert, "mlm")
    local = build(weights, RoundPlan(0, (0, 2, 2), (0,)))
    layers: Any = local.module.bert.encoder.layer  # type: ignore[union-attr]
    assert len(layers) == 3
    for name, tensor in weights.part(block_part(2)).items():
        own = name.removeprefix("bert.encoder.layer.2.")
        assert torch.equal(layers[1].get_parameter(own), tensor)
        assert torch.equal(layers[2].get_parameter(own), tensor)
    assert set(map(part_of, local.trained)) == {"block.0", HEAD}
    train_a_little(local)
    assert torch.equal(layers[1].output.dense.weight, layers[2].output.dense.weight)


def test_trained_tensors_go_by_their_global_names_wherever_they_stand(tiny_bert: Path) -> None:
    weights = weights_of(tiny_bert, "classification")
    local = build(weights, RoundPlan(0, (0, 3), (3,)))
    name = "bert.encoder.layer.{}.intermediate.dense.weight"
    assert local.trained[name.format(3)] is local.module.get_parameter(name.format(1))
    assert torch.equal(local.trained[name.format(3)], weights.checkpoint.tensor(name.format(3)))


def test_only_the_tensors_of_the_local_model_are_read(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = Checkpoint.tensor
    for task, plan in (
        ("mlm", RoundPlan(0, (0, 2, 2), (0,))),
        ("classification", RoundPlan(0, (0, 3), (3,))),
        ("ner", RoundPlan(0, (0, 1, 3), (3,), adapters=True)),
    ):
        weights, read = weights_of(tiny_bert, task, range(4) if plan.adapters else ()), []
        monkeypatch.setattr(
            Checkpoint,
            "tensor",
            lambda self, name, seen=read: (seen.append(name), tensor(self, name))[1],
        )
        build(weights, plan)
        head = {HEAD} if task == "classification" else set()  # its pooler is the base's
        assert {part_of(name) for name in read} == {
            "embeddings",
            *map(block_part, plan.local_blocks),
        } | head


# Values -------------------------------------------------------------------------------------------


def test_at_full_depth_the_module_gives_the_stock_models_outputs(tiny_bert: Path) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    for task in LABELS:
        weights = weights_of(tiny_bert, task)
        stock = STOCK[task].from_pretrained(tiny_bert, num_labels=max(2, len(LABELS[task]))).eval()
        stock.load_state_dict(weights.held(HEAD), strict=False)
        if task == "mlm":
            stock.tie_weights()
        for plan in (plan_of("full", task), untrained_plan(4)):
            local = build(weights, plan)
            with torch.no_grad():
                wanted = stock(input_ids=IDS, attention_mask=mask).logits
                found = local.module.eval()(input_ids=IDS, attention_mask=mask).logits
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_merged_adapters_give_the_outputs_of_wrapped_ones(tiny_bert: Path) -> None:
    def outputs(weights: Weights, plan: RoundPlan) -> torch.Tensor:
        with torch.no_grad():
            return build(weights, plan).module.eval()(input_ids=IDS).logits

    blocks = (0, 1, 2, 3)
    for task, rank in product(LABELS, (1, 4)):
        weights = weights_of(tiny_bert, task, blocks, rank=rank)
        merged = outputs(weights, untrained_plan(4))
        for trained in (blocks, (2,)):
            wrapped = outputs(weights, RoundPlan(0, blocks, trained, adapters=True))
            torch.testing.assert_close(wrapped, merged, atol=1e-5, rtol=1e-5)
        plain = outputs(weights_of(tiny_bert, task, rank=rank), untrained_plan(4))
        assert (plain - merged).abs().max() > 1e-3  # the adapters did learn something


def test_held_tensors_win_over_the_checkpoints(tiny_bert: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.bias"
    weights = weights_of(tiny_bert, "ner")
    held = weights.part(block_part(1)) | {name: torch.full((32,), 5.0)}
    changed = Weights(
        weights.checkpoint,
        lambda part: held if part == block_part(1) else weights.held(part),
        weights.spec,
    )
    local = build(changed, untrained_plan(4))
    assert torch.equal(local.module.get_parameter(name), torch.full((32,), 5.0))


def test_the_delta_is_what_training_added(tiny_bert: Path) -> None:
    weights = weights_of(tiny_bert, "classification")
    local = build(weights, plan_of("fedbt", "classification"))
    received = local.snapshot()
    assert all(not value.any() for _, deltas in local.deltas(weights) for value in deltas.values())
    train_a_little(local)
    deltas = dict(local.deltas(weights))
    assert list(deltas) == list(local.plan.trained_parts)
    assert all(part_of(name) == part for part, own in deltas.items() for name in own)
    delta = {name: value for own in deltas.values() for name, value in own.items()}
    assert delta.keys() == local.trained.keys()
    for name, value in local.trained.items():
        assert torch.equal(delta[name], value.detach() - received[name])
        assert torch.equal(received[name], weights.part(part_of(name))[name])


# New tensors --------------------------------------------------------------------------------------


def test_new_tensors_depend_on_the_seed_and_adapters_start_as_no_change(tiny_bert: Path) -> None:
    weights = weights_of(tiny_bert, "ner")
    shapes = weights.shapes(HEAD) | weights.shapes(adapter_part(0))
    one, same, other = (new_tensors(shapes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in shapes)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert 0.01 < one["classifier.weight"].std() < 0.03
    for name in shapes:
        assert bool(one[name].any()) is (name == "classifier.weight" or "lora_A" in name)


def test_a_head_of_the_base_is_used_only_where_it_has_the_very_same_labels(
    tiny_bert: Path, tmp_path: Path
) -> None:
    model = STOCK["classification"].from_pretrained(
        tiny_bert, id2label=dict(enumerate(LABELS["classification"]))
    )
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)

    def lacking(*labels: str) -> set[str]:
        return set(
            Weights(
                checkpoint, lambda part: {}, ModelSpec(TASKS["classification"], labels)
            ).lacking(HEAD)
        )

    assert lacking(*LABELS["classification"]) == set()
    assert lacking(*reversed(LABELS["classification"])) == {"classifier.weight", "classifier.bias"}
    assert lacking("heart", "kidney") == {"classifier.weight", "classifier.bias"}


def test_a_head_that_nobody_holds_is_an_error_that_names_it(tiny_bert: Path) -> None:
    weights = Weights(
        Checkpoint(tiny_bert), lambda part: {}, ModelSpec(TASKS["ner"], LABELS["ner"])
    )
    with pytest.raises(FedBTError, match=r"head lacks classifier\.bias"):
        build(weights, untrained_plan(4))
