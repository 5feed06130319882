import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import plan_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model import forward
from fedbt_app.model.local_model import LocalModel
from fedbt_app.plan import METHODS, RoundPlan, untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading, SpecialTokens
from fedbt_app.tasks.batch import Collator
from fedbt_app.training import train
from fedbt_app.training.optimizer import Optimizer, TrainSettings
from fedbt_app.training.train import TrainResult

LABELS = {"mlm": (), "classification": ("even", "odd"), "ner": ("B-x", "O")}
SETTINGS = TrainSettings(epochs=1, batch_size=8, learning_rate=3e-3, weight_decay=0.01)


def rows_of(count: int = 48) -> list[dict[str, Any]]:
    """Return rows that repeat one of four pieces, one of which has a label of its own."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        pieces = generator.integers(5, 9, 1).tolist() * int(generator.integers(3, 12))
        tags = ["B-x" if piece % 2 else "O" for piece in pieces]
        made.append(
            {
                "input_ids": [2, *pieces, 3],
                "label": "odd" if pieces[0] == 5 else "even",
                "tags": ["", *tags, ""],
                "gold": tags,
                "words": list(range(len(tags))),
            }
        )
    return made


def local_model(folder: Path, task: str, plan: RoundPlan, dropout: float = 0.0) -> LocalModel:
    return tiny_models.local_model(folder, task, plan, dropout, LABELS[task])


def collator(task: str) -> Collator:
    return Collator(
        TASKS[task], Reading(SpecialTokens(0, 4, (0, 1, 2, 3, 4), 40), LABELS[task], 0.2)
    )


def trained(local: LocalModel, seed: int = 0, settings: TrainSettings = SETTINGS) -> TrainResult:
    return train.run(
        local,
        rows_of(),
        collator(local.spec.task.name),
        replace(settings, seed=(seed,)),
        FlopMeter(),
    )


def test_the_loss_goes_down(tiny_bert: Path) -> None:
    settings = TrainSettings(epochs=3, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
    for method, task in product(METHODS, LABELS):
        local = local_model(tiny_bert, task, plan_of(method, task))
        before = train.evaluate(local, rows_of(), collator(task), 16).metrics()["loss"]
        trained(local, settings=settings)
        after = train.evaluate(local, rows_of(), collator(task), 16).metrics()["loss"]
        assert after < 0.9 * before, (method, task)


def numbered(count: int) -> list[dict[str, Any]]:
    """Return rows of many lengths whose second piece is the row's number."""
    return [
        {"input_ids": [2, number, *[5] * (number * 7 % 40), 3], "label": "odd"}
        for number in range(count)
    ]


def test_batches_cover_every_row_exactly_once() -> None:
    for size, shuffled in product((1, 7, 8, 100), (False, True)):
        made = train.batches(
            numbered(90), collator("classification"), size, np.random.default_rng(0), shuffled
        )
        seen = [batch.input_ids[:, 1].tolist() for batch in made]
        assert Counter(number for one in seen for number in one) == Counter(range(90))
        assert max(map(len, seen)) <= size
        assert len(seen) == -(-90 // size)


def test_batches_hold_rows_of_similar_length_in_an_order_that_the_generator_decides() -> None:
    rows = numbered(160)

    def lengths(seed: int) -> list[list[int]]:
        made = train.batches(rows, collator("classification"), 8, np.random.default_rng(seed))
        return [
            [len(rows[number]["input_ids"]) for number in batch.input_ids[:, 1].tolist()]
            for batch in made
        ]

    assert max(max(one) - min(one) for one in lengths(0)) <= 4
    assert lengths(0) == lengths(0)
    assert lengths(0) != lengths(1)
    shortest = [min(one) for one in lengths(0)]
    assert shortest != sorted(shortest)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(tiny_bert: Path) -> None:
    for method in METHODS:
        outcomes = []
        for seed in (3, 3, 4):
            local = local_model(tiny_bert, "mlm", plan_of(method, "mlm"), dropout=0.1)
            torch.rand(5)  # whatever else drew from torch's generator before
            outcomes.append((trained(local, seed).loss, local.snapshot()))
        (loss, one), (same_loss, same), (_, other) = outcomes
        assert loss == same_loss
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_result_counts_examples_once_and_lists_every_step(tiny_bert: Path) -> None:
    local = local_model(tiny_bert, "classification", plan_of("head", "classification"))
    result = trained(
        local, settings=TrainSettings(epochs=3, batch_size=10, learning_rate=1e-3, weight_decay=0.0)
    )
    assert result.examples == 48
    assert len(result.shapes) == 3 * 5
    assert sum(shape[0] for shape in result.shapes) == 3 * 48


def test_rows_without_a_loss_are_passed_over(tiny_bert: Path) -> None:
    unknown = [{"input_ids": [2, 1, 3]}, {"input_ids": [2, 1, 1, 3]}]  # such pieces are not masked
    rows = [unknown[0], *rows_of(2), unknown[1]]
    local = local_model(tiny_bert, "mlm", plan_of("head", "mlm"))
    for micro in (0, 1):
        settings = TrainSettings(1, 1 + 3 * micro, 1e-3, 0.0, micro_batch_size=micro)
        result = train.run(local, rows, collator("mlm"), settings, FlopMeter())
        assert math.isfinite(result.loss)
        assert len(result.shapes) == 2


def test_a_learning_rate_of_zero_reports_the_loss_of_the_model_as_it_is(tiny_bert: Path) -> None:
    local = local_model(tiny_bert, "classification", plan_of("head", "classification"))
    still = TrainSettings(epochs=1, batch_size=9, learning_rate=0.0, weight_decay=0.0)
    before = train.evaluate(local, rows_of(), collator("classification"), 16).metrics()["loss"]
    assert trained(local, settings=still).loss == pytest.approx(before, rel=1e-5)


def test_biases_and_layer_norms_are_not_decayed(tiny_bert: Path) -> None:
    local = local_model(tiny_bert, "classification", plan_of("full", "classification"))
    before = local.snapshot()
    Optimizer(local.trained.values(), TrainSettings(1, 1, 1.0, 0.25))
    torch.stack([(value * 0).sum() for value in local.trained.values()]).sum().backward()
    after = local.snapshot()
    for name, value in before.items():
        matrix = value.ndim == 2
        assert matrix != ("LayerNorm" in name or name.endswith("bias"))
        assert torch.equal(after[name], 0.75 * value if matrix else value), name


@pytest.mark.parametrize("method", METHODS)
def test_stepping_within_the_backward_pass_is_stepping_after_it_bit_for_bit(
    method: str, tiny_bert: Path
) -> None:
    for task, checkpointing in product(LABELS, (False, True)):
        within, after = (local_model(tiny_bert, task, plan_of(method, task)) for _ in range(2))
        Optimizer(within.trained.values(), SETTINGS)
        matrices, vectors = (
            [one for one in after.trained.values() if (one.ndim > 1) == many]
            for many in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ]
        stock = torch.optim.AdamW(groups, lr=SETTINGS.learning_rate, fused=True)
        for batch in train.batches(rows_of(24), collator(task), 8, np.random.default_rng(0)):
            forward.loss(within, batch, checkpointing=checkpointing).backward()
            assert all(value.grad is None for value in within.trained.values())
            forward.loss(after, batch, checkpointing=checkpointing).backward()
            stock.step()
            stock.zero_grad()
        for name, value in after.trained.items():
            assert torch.equal(within.trained[name], value), (task, name)


def test_gradients_add_up_while_no_step_is_due_and_nothing_steps_after_detach(
    tiny_bert: Path,
) -> None:
    local = local_model(tiny_bert, "classification", plan_of("head", "classification"))
    optimizer, before = Optimizer(local.trained.values(), SETTINGS), local.snapshot()
    batch = next(train.batches(rows_of(8), collator("classification"), 8, np.random.default_rng(0)))

    def backward() -> None:
        forward.loss(local, batch).backward()

    optimizer.due = False
    backward()
    once = {
        name: value.grad.clone() for name, value in local.trained.items() if value.grad is not None
    }
    backward()
    assert all(torch.equal(local.trained[name].grad, 2 * value) for name, value in once.items())
    assert all(torch.equal(local.trained[name], value) for name, value in before.items())
    optimizer.due = True
    backward()
    stepped = local.snapshot()
    assert all(value.grad is None for value in local.trained.values())
    assert all(
        not torch.equal(stepped[name], before[name]) for name in before if name.endswith("weight")
    )
    optimizer.detach()
    backward()
    assert all(torch.equal(local.trained[name], value) for name, value in stepped.items())


def test_evaluation_is_deterministic_and_does_not_change_the_model(tiny_bert: Path) -> None:
    for task in LABELS:
        local = local_model(tiny_bert, task, plan_of("full", task), dropout=0.5)
        before = {name: value.clone() for name, value in local.module.state_dict().items()}
        first = train.evaluate(local, rows_of(), collator(task), 16).metrics()
        torch.rand(5)
        assert train.evaluate(local, rows_of(), collator(task), 16).metrics() == first
        assert all(
            torch.equal(value, before[name]) for name, value in local.module.state_dict().items()
        )
        assert all(value.grad is None for value in local.module.parameters())


def test_metrics_do_not_depend_on_the_batch_size(tiny_bert: Path) -> None:
    for task in ("classification", "ner"):
        local = local_model(tiny_bert, task, untrained_plan(4))
        one, other = (
            train.evaluate(local, rows_of(), collator(task), size).metrics() for size in (1, 48)
        )
        assert one == pytest.approx(other, rel=1e-4)


def test_dropout_noise_is_drawn_in_trained_blocks_and_not_in_frozen_ones(tiny_bert: Path) -> None:
    still = TrainSettings(epochs=1, batch_size=48, learning_rate=0.0, weight_decay=0.0)

    def losses(plan: RoundPlan) -> list[float]:
        local = local_model(tiny_bert, "classification", plan, dropout=0.5)
        local.module.get_submodule("dropout").p = 0.0  # type: ignore[assignment]  # the head's own
        local.trained["classifier.weight"].data.mul_(50)  # so that noise shows in the loss
        return [trained(local, seed, still).loss for seed in range(3)]

    frozen = losses(RoundPlan(0, (0, 1, 2, 3), ()))
    assert frozen == pytest.approx([frozen[0]] * 3, rel=1e-5)
    noisy = losses(RoundPlan(0, (0, 1, 2, 3), (3,)))
    assert (
        min(abs(one - other) for one, other in zip(noisy, noisy[1:] + noisy[:1], strict=True))
        > 1e-4
    )


@pytest.mark.parametrize("method", ["fedbt", "full", "lora"])
def test_saving_memory_leaves_the_gradients_as_they_are(method: str, tiny_bert: Path) -> None:
    def gradients(task: str, settings: TrainSettings) -> dict[str, torch.Tensor]:
        local, caught = local_model(tiny_bert, task, plan_of(method, task)), {}

        def catch(optimizer: Any, *_: Any) -> None:
            caught.update(
                {
                    name: value.grad.clone()
                    for name, value in local.trained.items()
                    if value.grad is not None
                }
            )

        handle = register_optimizer_step_pre_hook(catch)
        train.run(local, rows_of(8), collator(task), settings, FlopMeter())
        handle.remove()
        assert caught.keys() == local.trained.keys()
        return caught

    whole = TrainSettings(1, 8, 1e-3, 0.0)
    for task in LABELS:
        plain = gradients(task, whole)
        for saving in (replace(whole, micro_batch_size=3), replace(whole, checkpointing=True)):
            for name, value in gradients(task, saving).items():
                torch.testing.assert_close(
                    value, plain[name], rtol=1e-4, atol=1e-6, msg=f"{task} {name}"
                )


def test_a_token_budget_bounds_padded_pieces_and_still_covers_every_row_once() -> None:
    made = list(
        train.batches(
            numbered(90), collator("classification"), 16, np.random.default_rng(0), tokens=128
        )
    )
    assert Counter(int(number) for batch in made for number in batch.input_ids[:, 1]) == Counter(
        range(90)
    )
    assert max(batch.input_ids.numel() for batch in made) <= 128
    assert max(len(batch.rows) for batch in made) > 4


def test_one_row_longer_than_the_token_budget_still_runs() -> None:
    made = list(
        train.batches(
            numbered(5), collator("classification"), 16, np.random.default_rng(0), tokens=8
        )
    )
    assert [len(batch.rows) for batch in made] == [1] * 5
