from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fedbt_app.tasks.tasks import Batch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from fedbt_app.cli.plan_table import preview, print_preview
from fedbt_app.codec.codec import encode
from fedbt_app.codec.formats import CODECS, payload_bytes
from fedbt_app.config import RunConfig
from fedbt_app.costs.cost_model import (
    StepShape,
    default_shape,
    full_model_bytes,
    full_plan,
    predict_rounds,
    round_costs,
    step_flops,
    stock_step_flops,
    trained_parameters,
)
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.encoders.bert import PRESETS, Architecture
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import HEAD, adapter_part, count
from fedbt_app.plan import METHODS, RoundPlan, plan_round
from fedbt_app.server.state import by_part
from fedbt_app.tensors import Tensors

LABELS = {"mlm": (), "classification": ("heart", "kidney", "liver"), "ner": ("B-x", "I-x", "O")}
RANK, ROUNDS = 4, 4
SHAPE = StepShape(batch=3, length=16, positions=5)


def local_model(folder: Path, task: str, plan: RoundPlan, dropout: float) -> LocalModel:
    held: dict[str, Tensors] = {}
    spec = ModelSpec(task, LABELS[task], dropout, RANK)
    weights = Weights(Checkpoint(folder), lambda part: held.get(part, {}), spec)
    held[HEAD] = new_tensors(weights.lacking(HEAD), seed=1)
    held |= {
        part: new_tensors(weights.shapes(part), 2) for part in map(adapter_part, range(4) if plan.adapters else ())
    }
    return build(weights, plan)


def plan_of(method: str, task: str, round_: int) -> RoundPlan:
    return plan_round(method, task, 4, 3 if method.startswith("fedbt") else 0, ROUNDS, round_, seed=0, client="a")


def shape_of(task: str) -> StepShape:
    return replace(SHAPE, positions=1) if task == "classification" else SHAPE


def batch_of(task: str, padded: bool) -> Batch:
    shape = shape_of(task)
    mask = torch.arange(shape.length) < torch.tensor([[16], [12], [9]]) if padded else None
    ids = torch.randint(5, 40, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(shape.positions).expand(shape.batch, -1)
    return Batch(ids, mask, positions.contiguous(), torch.ones_like(positions))


def measured(run: Callable[[], torch.Tensor]) -> int:
    meter = FlopMeter()
    meter.step("only", lambda: run().backward())
    return meter.total


# FLOPs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_of_a_step_is_what_the_dispatcher_counts(
    method: str, task: str, dropout: float, padded: bool, tiny_bert: Path
) -> None:
    batch = batch_of(task, padded)
    for round_ in range(ROUNDS):
        plan = plan_of(method, task, round_)
        local = local_model(tiny_bert, task, plan, dropout)
        found = measured(lambda local=local: forward.loss(local, batch))  # type: ignore[misc]
        arch, labels = Checkpoint(tiny_bert).architecture, len(LABELS[task])
        predicted = step_flops(arch, task, labels, plan, shape_of(task), RANK, fused=dropout == 0)
        assert found == predicted, f"round {round_}: {plan}"


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("method", ["fedbt", "head"])
def test_a_step_over_the_cached_prefix_is_what_the_dispatcher_counts(method: str, task: str, tiny_bert: Path) -> None:
    batch, arch, labels = batch_of(task, padded=False), Checkpoint(tiny_bert).architecture, len(LABELS[task])
    plan = plan_round(method, task, 4, 0, ROUNDS, 0, seed=0, client="a", schedule="-2,-1")
    local = local_model(tiny_bert, task, plan, 0.0)
    depth = plan.lowest_trained
    start = forward.prefix(local, batch, depth)
    found = measured(lambda: forward.loss(local, batch, start))
    assert found == step_flops(arch, task, labels, plan, shape_of(task), RANK, fused=True, start=depth)


@pytest.mark.parametrize("task", LABELS)
def test_the_stock_step_is_what_the_dispatcher_counts_for_transformers_own_model(task: str) -> None:
    arch = Architecture(depth=3, hidden=32, intermediate=64, vocabulary=60, positions=32)
    config = BertConfig(
        num_hidden_layers=arch.depth,
        hidden_size=arch.hidden,
        intermediate_size=arch.intermediate,
        vocab_size=arch.vocabulary,
        max_position_embeddings=arch.positions,
        num_attention_heads=4,
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
    model = stock[task](config).train()
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.ones(2, dtype=torch.int64) if task == "classification" else ids % 3
    found = measured(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss)
    assert found == stock_step_flops(arch, task, 3, batch=2, length=16)


def test_training_more_never_costs_less() -> None:
    arch, shape = PRESETS["bert-base"], StepShape(16, 128, 20)
    by_lowest = [step_flops(arch, "mlm", 0, RoundPlan(0, tuple(range(12)), (block,)), shape) for block in range(12)]
    assert by_lowest == sorted(by_lowest, reverse=True)
    full = step_flops(arch, "mlm", 0, full_plan(12), shape)
    head = step_flops(arch, "mlm", 0, RoundPlan(0, tuple(range(12)), ()), shape)
    assert head < by_lowest[-1]
    assert by_lowest[0] < full < stock_step_flops(arch, "mlm", 0, 16, 128)


# Parameters and bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_predicted_payload_is_what_the_codec_makes(codec: str, tiny_bert: Path) -> None:
    shapes = Checkpoint(tiny_bert).architecture.block(0) | {"odd": (3, 7), "scalar": (), "none": (0, 4)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    plain = codec.removesuffix("+zstd")
    assert payload_bytes(shapes.values(), codec) == encode(tensors, plain).nbytes


@pytest.mark.parametrize(("task", "labels", "bound"), [("mlm", 0, 0.0105), ("classification", 13, 0.03)])
def test_int4_sends_a_hundredth_of_bert_base_in_pre_training_and_a_thirtieth_in_fine_tuning(
    task: str, labels: int, bound: float
) -> None:
    arch, shape = PRESETS["bert-base"], StepShape(8, 128, 20)
    local_depth = 6 if task == "mlm" else 0
    rounds = predict_rounds(arch, task, "fedbt", labels, 10, local_depth, shape, 0, "int4")
    full = full_model_bytes(arch, task, labels)
    ratio = sum(one.exchange_bytes for one in rounds) / (len(rounds) * full)
    assert 0.9 * bound < ratio <= bound
    parts = [part for one in rounds for part in one.plan.trained_parts]
    sizes = {}
    for part in set(parts):  # what is really sent, header and all
        encoded = encode({name: torch.zeros(size) for name, size in arch.part(part, task, labels, 0).items()}, "int4")
        sizes[part] = encoded.nbytes + len(encoded.header)
    assert sum(sizes[part] for part in parts) / (len(rounds) * full) <= bound


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("method", METHODS)
def test_trained_parameters_and_bytes_are_those_of_a_real_local_models_delta(
    method: str, task: str, tiny_bert: Path
) -> None:
    arch, labels = Checkpoint(tiny_bert).architecture, len(LABELS[task])
    for round_ in range(ROUNDS):
        plan = plan_of(method, task, round_)
        local = local_model(tiny_bert, task, plan, 0.0)
        deltas = by_part(local.snapshot())
        parameters = sum(value.numel() for value in local.trained.values())
        payload = [encode(tensors, "float32") for tensors in deltas.values()]
        assert set(deltas) == set(plan.trained_parts)
        assert trained_parameters(arch, task, labels, plan, RANK) == parameters
        assert round_costs(arch, task, labels, plan, shape_of(task), RANK).exchange_bytes == sum(
            array.nbytes for one in payload for array in one.arrays.values()
        )


@pytest.mark.parametrize("task", LABELS)
def test_full_model_bytes_are_those_of_every_parameter(task: str, tiny_bert: Path) -> None:
    arch = Checkpoint(tiny_bert).architecture
    local = local_model(tiny_bert, task, full_plan(4), 0.0)
    assert full_model_bytes(arch, task, len(LABELS[task])) == 4 * sum(one.numel() for one in local.trained.values())
    assert trained_parameters(arch, task, 3, full_plan(4), 0) == count(arch.model(task, 3))


@pytest.mark.parametrize(("task", "ratio"), [("mlm", 0.0704), ("ner", 0.2019), ("classification", 0.2062)])
def test_ten_rounds_of_bert_base_send_the_published_share_of_the_model(
    task: str, ratio: float, config: Callable[..., RunConfig]
) -> None:
    made = config(task=task, method="fedbt", num_rounds=10, max_length=128)
    assert round(preview(made, PRESETS["bert-base"], 13, 1000).bytes_ratio, 4) == ratio


@pytest.mark.parametrize(("task", "ratio"), [("classification", 0.280), ("ner", 0.349)])
def test_a_preview_computes_the_frozen_prefix_once_as_clients_do(
    task: str, ratio: float, config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"task": task, "method": "fedbt", "num_rounds": 10, "max_length": 128}
    kept, not_kept, too_large = (
        preview(config(**values, prefix_cache_gb=size), PRESETS["bert-base"], 13, 1000) for size in (4.0, 0.0, 0.1)
    )
    assert round(kept.flops_ratio, 3) == ratio  # what benchmarks/results/client_step.json measured
    assert kept.flops_ratio < not_kept.flops_ratio == too_large.flops_ratio
    for shown, said in ((kept, "on disk, 0.39 GB"), (too_large, "let prefix-cache-gb be above 0.39 GB")):
        print_preview(shown, "a run")
        assert said in capsys.readouterr().out


def test_a_preview_computes_the_prefix_once_for_each_fixed_masking(config: Callable[..., RunConfig]) -> None:
    values = {"task": "mlm", "method": "fedbt", "num_rounds": 6, "schedule": "-1", "masking": "static"}
    shown = preview(config(**values, static_maskings=2), PRESETS["minilm-l6"], 0, 100)
    first, second, *others = (one.step_flops for one in shown.rounds)
    assert first == second > others[0]
    assert len(set(others)) == 1
    moving = preview(config(**{**values, "masking": "dynamic"}), PRESETS["minilm-l6"], 0, 100)
    assert {one.step_flops for one in moving.rounds} == {first}


def test_full_training_is_its_own_reference(config: Callable[..., RunConfig]) -> None:
    shown = preview(config(task="mlm", method="full", num_rounds=3), PRESETS["minilm-l6"], 0, 100)
    assert shown.bytes_ratio == 1.0
    assert shown.flops_ratio_same == 1.0
    assert shown.flops_ratio < 1.0
    assert {one.memory_bytes for one in shown.rounds} == {shown.full_memory}


def test_a_client_of_half_depth_is_predicted_cheaper_in_every_way() -> None:
    shape = default_shape("mlm", 16, 128, 0.15)
    half, full_depth = (
        predict_rounds(PRESETS["bert-base"], "mlm", "fedbt", 0, 10, depth, shape, 8) for depth in (6, 12)
    )
    for one, other in zip(half, full_depth, strict=True):
        assert one.step_flops < other.step_flops
        assert one.memory_bytes < other.memory_bytes
        assert one.exchange_bytes == other.exchange_bytes


@pytest.mark.parametrize(("task", "positions"), [("mlm", 10), ("classification", 1), ("ner", 64)])
def test_a_full_batch_reads_the_tasks_positions(task: str, positions: int) -> None:
    assert default_shape(task, 8, 64, 0.15) == StepShape(8, 64, positions)
