"""The method=full baseline is textbook FedAvg."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import federate
from federated import Settings, Tensors, assert_equal

from fedbt_app.config import RunConfig
from fedbt_app.data import examples
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel
from fedbt_app.model.weights import Weights, model_spec, new_tensors
from fedbt_app.parts import HEAD
from fedbt_app.plan import RoundPlan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading
from fedbt_app.tasks.batch import Collator, special_tokens
from fedbt_app.training import train
from fedbt_app.training.optimizer import TrainSettings
from fedbt_app.wire.local_grid import simulated

# The method=full baseline is FedAvg ---------------------------------------------------------------------------


def exact_loss(local: LocalModel, batch: Any) -> torch.Tensor:
    return forward.loss(local, batch)


def stock_loss(local: LocalModel, batch: Any) -> torch.Tensor:
    labels = batch.labels[:, 0]
    if local.spec.task.name != "classification":
        labels = torch.full_like(batch.input_ids, -100)
        row, column = (batch.labels >= 0).nonzero(as_tuple=True)
        labels[row, batch.positions[row, column]] = batch.labels[row, column]
    mask = None if batch.mask is None else batch.mask.long()
    return local.module(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss


STOCK = {
    "mlm": transformers.BertForMaskedLM,
    "classification": transformers.BertForSequenceClassification,
    "ner": transformers.BertForTokenClassification,
}


def plain_fedavg(
    config: RunConfig, labels: tuple[str, ...], clients: int, loss: Any, deltas: bool
) -> Tensors:
    """Return the global tensors of textbook FedAvg on stock transformers models, as deltas or as weights."""
    checkpoint = Checkpoint(Path(config.model))
    spec = model_spec(config, labels)
    arch = transformers.BertConfig.from_pretrained(
        config.model,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=max(1, len(labels)),
    )
    collator = Collator(
        TASKS[config.task],
        Reading(special_tokens(checkpoint.tokenizer()), labels, config.mask_probability),
    )
    shapes = checkpoint.architecture.model(TASKS[config.task].head, len(labels))
    weights: Tensors = {name: checkpoint.tensor(name) for name in shapes if name in checkpoint}
    weights |= new_tensors(Weights(checkpoint, lambda part: {}, spec).lacking(HEAD), config.seed)
    everything = tuple(range(checkpoint.architecture.depth))
    for round_ in range(config.num_rounds):
        results: list[tuple[int, Tensors]] = []
        for client in range(clients):
            own = examples.client_data(
                config, checkpoint.tokenizer, checkpoint.tokenizer_id, (client, clients)
            )
            rows = own.train.to_list()
            module = STOCK[config.task](arch)
            module.load_state_dict(
                {name: value.clone() for name, value in weights.items()}, strict=False
            )
            module.train()
            trained = dict(module.named_parameters())
            assert trained.keys() == weights.keys()
            plan = RoundPlan(round_, everything, everything, embeddings=True)
            local = LocalModel(module, checkpoint.architecture.encoder, plan, spec, trained)
            matrices = [value for value in trained.values() if value.ndim > 1]
            vectors = [value for value in trained.values() if value.ndim < 2]
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
            for epoch in range(config.local_epochs):
                seed = [config.seed, zlib.crc32(f"client-{client}".encode()), round_, epoch]
                for batch in train.batches(
                    rows, collator, config.batch_size, np.random.default_rng(seed)
                ):
                    optimizer.zero_grad()
                    loss(local, batch).backward()
                    optimizer.step()
            results.append((len(rows), {name: value.detach() for name, value in trained.items()}))
        total = sum(size for size, _ in results)
        if deltas:
            for name, value in weights.items():
                mean = sum(size * (new[name] - value).double() for size, new in results) / total
                weights[name] = value + mean.float()
        else:
            weights = {
                name: sum(size / total * new[name] for size, new in results) for name in weights
            }
    return weights


SKEWED = {
    **{"method": "full", "dropout": 0.0, "batch_size": 8},
    **{"partitioner": "size-skewed", "partition_weights": "1,2,4"},
}


def test_a_falling_step_size_is_that_of_the_round_on_every_client(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, real = [], train.run

    def run(local: Any, rows: Any, collator: Any, settings: TrainSettings, *others: Any) -> Any:
        used.append((local.plan.round, settings.learning_rate))
        return real(local, rows, collator, settings, *others)

    monkeypatch.setattr(train, "run", run)
    federate(small(learning_rate=0.5, learning_rate_decay="linear"), simulated(2))
    assert used == [(0, 0.5)] * 2 + [(1, 0.25)] * 2


@pytest.mark.parametrize("task", TASKS)
def test_full_method_equals_fedavg_bit_for_bit(small: Settings, task: str) -> None:
    values = small(**SKEWED, task=task, local_epochs=2)
    run = federate(values, simulated(3))
    expected = plain_fedavg(RunConfig.load(values), run.rounds.labels, 3, exact_loss, deltas=True)
    assert_equal(run.tensors, expected)


@pytest.mark.parametrize("task", TASKS)
def test_full_method_equals_fedavg_with_transformers_own_loss(small: Settings, task: str) -> None:
    values = small(**SKEWED, task=task)
    run = federate(values, simulated(3))
    expected = plain_fedavg(RunConfig.load(values), run.rounds.labels, 3, stock_loss, deltas=False)
    assert run.tensors.keys() == expected.keys()
    for name, value in run.tensors.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-5, atol=1e-5
        )  # a step is 5e-4, the largest gap 1e-6
