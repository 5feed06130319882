from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, RANK, ROUNDS, local_model, plan_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from fedbt_app.cli.presets import PRESETS
from fedbt_app.codec.codec import encode
from fedbt_app.codec.formats import CODECS, payload_bytes
from fedbt_app.costs.cost_model import CostModel, full_model_bytes
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import count
from fedbt_app.plan import METHODS, PAPER, RoundPlan, RunPlan, full_plan
from fedbt_app.server.state import by_part
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.batch import Batch

SHAPE = StepShape(batch=3, length=16, positions=5)
BERT_BASE = Architecture.from_config(PRESETS["bert-base"], "bert-base")


def cost_model(folder: Path, task: str, fused: bool = False) -> CostModel:
    return CostModel(Checkpoint(folder).architecture, TASKS[task], len(LABELS[task]), RANK, fused)


def plans_of(method: str, task: str) -> list[RoundPlan]:
    """Return a run's plans that differ in more than their number, of a client of less depth."""
    plans = [
        plan_of(method, task, round_, 3 if METHODS[method].blocks == "scheduled" else 0)
        for round_ in range(ROUNDS)
    ]
    return list({(plan.local_blocks, plan.trained_blocks): plan for plan in plans}.values())


def shape_of(task: str) -> StepShape:
    return replace(SHAPE, positions=1) if task == "classification" else SHAPE


def batch_of(task: str, padded: bool) -> Batch:
    shape = shape_of(task)
    mask = torch.arange(shape.length) < torch.tensor([[16], [12], [9]]) if padded else None
    ids = torch.randint(
        5, 40, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0)
    )
    positions = torch.arange(shape.positions).expand(shape.batch, -1)
    return Batch(ids, mask, positions.contiguous(), torch.ones_like(positions))


def measured(run: Callable[[], torch.Tensor]) -> int:
    meter = FlopMeter()
    meter.step("only", lambda: run().backward())
    return meter.total


# FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_of_a_step_is_what_the_dispatcher_counts(
    method: str, tiny_bert: Path
) -> None:
    for task, dropout in product(LABELS, (0.0, 0.1)):
        costs = cost_model(tiny_bert, task, fused=dropout == 0)
        for plan in plans_of(method, task):
            local = local_model(tiny_bert, task, plan, dropout)
            for padded in (False, True):
                batch = batch_of(task, padded)
                found = measured(lambda local=local, batch=batch: forward.loss(local, batch))
                assert found == costs.step_flops(plan, shape_of(task)), (
                    task,
                    dropout,
                    padded,
                    plan,
                )


def test_a_step_over_the_cached_prefix_is_what_the_dispatcher_counts(tiny_bert: Path) -> None:
    for method, task in product(("fedbt", "head"), LABELS):
        batch, plan = batch_of(task, padded=False), plan_of(method, task, schedule="-2,-1")
        local, depth = local_model(tiny_bert, task, plan), plan.lowest_trained
        start = forward.prefix(local, batch, depth)
        found = measured(
            lambda local=local, batch=batch, start=start: forward.loss(local, batch, start)
        )
        assert found == cost_model(tiny_bert, task, fused=True).step_flops(
            plan, shape_of(task), start=depth
        )


def test_the_stock_step_is_what_the_dispatcher_counts_for_transformers_own_model() -> None:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 60,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "num_attention_heads": 4,
    }
    architecture = Architecture.from_config({"model_type": "bert", **sizes}, "small")
    config = BertConfig(
        **sizes,
        num_labels=3,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        attn_implementation="sdpa",
    )
    stock: dict[str, Any] = {
        "mlm": BertForMaskedLM,
        "classification": BertForSequenceClassification,
        "ner": BertForTokenClassification,
    }
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    for task, kind in stock.items():
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.ones(2, dtype=torch.int64) if task == "classification" else ids % 3,
        }
        model = kind(config).train()
        found = measured(lambda model=model, inputs=inputs: model(**inputs).loss)
        assert found == CostModel(architecture, TASKS[task], 3).stock_step_flops(batch=2, length=16)


def test_training_more_never_costs_less() -> None:
    costs, shape = CostModel(BERT_BASE, TASKS["mlm"], 0), StepShape(16, 128, 20)
    blocks = tuple(range(12))
    by_lowest = [costs.step_flops(RoundPlan(0, blocks, (block,)), shape) for block in blocks]
    assert by_lowest == sorted(by_lowest, reverse=True)
    assert costs.step_flops(RoundPlan(0, blocks, ()), shape) < by_lowest[-1]
    assert by_lowest[0] < costs.full_step_flops(shape) < costs.stock_step_flops(16, 128)


# Parameters and bytes -----------------------------------------------------------------------------


def test_predicted_payload_is_what_the_codec_makes(tiny_bert: Path) -> None:
    shapes = Checkpoint(tiny_bert).architecture.block(0) | {
        "odd": (3, 7),
        "scalar": (),
        "none": (0, 4),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for codec in CODECS:
        assert (
            payload_bytes(shapes.values(), codec)
            == encode(tensors, codec.removesuffix("+zstd")).nbytes
        )


def test_int4_sends_a_hundredth_of_bert_base_in_pre_training_and_a_thirtieth_in_fine_tuning() -> (
    None
):
    for task, labels, bound in (("mlm", 0, 0.0105), ("classification", 13, 0.03)):
        costs = CostModel(BERT_BASE, TASKS[task], labels, codec="int4")
        plans = RunPlan(METHODS["fedbt"], TASKS[task], 12, 10, PAPER).rounds()
        full = full_model_bytes(BERT_BASE, TASKS[task].head, labels)
        ratio = sum(map(costs.exchange_bytes, plans)) / (len(plans) * full)
        assert 0.9 * bound < ratio <= bound
        parts = [part for plan in plans for part in plan.trained_parts]
        sizes = {}
        for part in set(parts):  # what is really sent, header and all
            shapes = BERT_BASE.part(part, TASKS[task].head, labels, 0)
            encoded = encode({name: torch.zeros(shape) for name, shape in shapes.items()}, "int4")
            sizes[part] = encoded.nbytes + len(encoded.header)
        assert sum(sizes[part] for part in parts) / (len(plans) * full) <= bound


def test_trained_parameters_and_bytes_are_those_of_a_real_local_models_delta(
    tiny_bert: Path,
) -> None:
    for method, task in product(METHODS, LABELS):
        costs = cost_model(tiny_bert, task)
        for plan in plans_of(method, task):
            local = local_model(tiny_bert, task, plan)
            deltas = by_part(local.snapshot(), local.encoder)
            assert set(deltas) == set(plan.trained_parts)
            assert costs.trained_parameters(plan) == sum(
                value.numel() for value in local.trained.values()
            )
            sent = sum(encode(tensors, "float32").nbytes for tensors in deltas.values())
            assert (
                costs.round(plan, shape_of(task)).exchange_bytes
                == costs.exchange_bytes(plan)
                == sent
            )


def test_full_model_bytes_are_those_of_every_parameter(tiny_bert: Path) -> None:
    for name, task in TASKS.items():
        costs, local = cost_model(tiny_bert, name), local_model(tiny_bert, name, full_plan(4))
        parameters = sum(value.numel() for value in local.trained.values())
        assert full_model_bytes(costs.architecture, task.head, costs.num_labels) == 4 * parameters
        assert costs.trained_parameters(full_plan(4)) == parameters
        assert count(costs.architecture.model(task.head, costs.num_labels)) == parameters


def test_a_client_of_half_depth_is_predicted_cheaper_in_every_way() -> None:
    task = TASKS["mlm"]
    costs, plan = CostModel(BERT_BASE, task, 0), RunPlan(METHODS["fedbt"], task, 12, 10, PAPER)
    shape = costs.full_shape(16, 128, 0.15)
    for half, full_depth in zip(
        plan.rounds(local_depth=6), plan.rounds(local_depth=12), strict=True
    ):
        one, other = costs.round(half, shape), costs.round(full_depth, shape)
        assert one.step_flops < other.step_flops
        assert one.memory_bytes < other.memory_bytes
        assert one.exchange_bytes == other.exchange_bytes


def test_a_full_batch_reads_the_tasks_positions() -> None:
    for task, positions in {"mlm": 10, "classification": 1, "ner": 64}.items():
        assert CostModel(BERT_BASE, TASKS[task], 3).full_shape(8, 64, 0.15) == StepShape(
            8, 64, positions
        )
