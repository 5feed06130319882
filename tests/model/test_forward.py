import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, local_model, plan_of

from fedbt_app.encoders import bert as bert_blocks
from fedbt_app.model import forward
from fedbt_app.plan import RoundPlan
from fedbt_app.tasks.base import IGNORED
from fedbt_app.tasks.batch import Batch

BLOCKS = (0, 1, 2, 3)
PLANS = {
    "full": RoundPlan(0, BLOCKS, BLOCKS, embeddings=True),
    "head": RoundPlan(0, BLOCKS, ()),
    "shallow": RoundPlan(0, (0, 2, 2), (0,)),
    "second": RoundPlan(0, (0, 1, 3), (1,)),
    "last": RoundPlan(0, BLOCKS, (3,)),
    "upper": RoundPlan(0, (0, 2, 3), (2, 3)),
    "one block": RoundPlan(0, (0,), (0,)),
    "lora": RoundPlan(0, BLOCKS, BLOCKS, adapters=True),
    "fedbt-lora": RoundPlan(0, (0, 2, 3), (2, 3), adapters=True),
}


def batch_of(task: str, padded: bool) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(5, 40, (3, 8), generator=generator), None
    if padded:
        mask = torch.arange(8) < torch.tensor([[8], [5], [3]])
        ids[~mask] = 0
    if task == "classification":
        positions, labels = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[0], [2], [1]])
    else:
        positions = torch.tensor([[1, 4, 7], [2, 4, 0], [2, 0, 0]])
        labels = torch.randint(0, 40 if task == "mlm" else 3, (3, 3), generator=generator)
        labels[1, 2] = labels[2, 1] = labels[2, 2] = IGNORED
    return Batch(ids, mask, positions, labels)


def stock_loss(module: Any, task: str, batch: Batch) -> torch.Tensor:
    labels = batch.labels[:, 0]
    if task != "classification":
        labels = torch.full_like(batch.input_ids, IGNORED)
        for row, (positions, own) in enumerate(zip(batch.positions, batch.labels, strict=True)):
            kept = own != IGNORED
            labels[row, positions[kept]] = own[kept]
    mask = None if batch.mask is None else batch.mask.long()
    return module(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("plan", PLANS)
def test_loss_and_all_gradients_are_the_stock_models(plan: str, tiny_bert: Path) -> None:
    for task, padded in product(LABELS, (False, True)):
        local, batch = local_model(tiny_bert, task, PLANS[plan]), batch_of(task, padded)
        stock = copy.deepcopy(local.module)
        wanted = stock_loss(stock, task, batch)
        found = forward.loss(local, batch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        wanted.backward()
        found.backward()
        gradients = {name: value.grad for name, value in local.module.named_parameters()}
        for name, value in stock.named_parameters():
            if not value.requires_grad:
                assert gradients[name] is None, (task, name)
            else:
                torch.testing.assert_close(
                    gradients[name], value.grad, atol=1e-5, rtol=1e-5, msg=f"{task} {name}"
                )
        assert (
            sum(float(value.abs().sum()) for value in gradients.values() if value is not None) > 0
        )


def test_logits_are_the_stock_models_at_the_loss_positions(tiny_bert: Path) -> None:
    for task in LABELS:
        local, batch = local_model(tiny_bert, task, PLANS["full"]), batch_of(task, padded=True)
        assert batch.mask is not None
        with torch.no_grad():
            wanted = local.module(
                input_ids=batch.input_ids, attention_mask=batch.mask.long()
            ).logits
            found = forward.logits(local, batch)
        wanted = (
            wanted[:, None]
            if task == "classification"
            else wanted[torch.arange(3)[:, None], batch.positions]
        )
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_no_graph_is_kept_below_the_lowest_trained_block(plan: str, tiny_bert: Path) -> None:
    for task in LABELS:
        local, outputs = local_model(tiny_bert, task, PLANS[plan]), []
        bert = local.module.bert
        for module in (bert.embeddings, *(layer.output.LayerNorm for layer in bert.encoder.layer)):
            module.register_forward_hook(
                lambda module, inputs, output, seen=outputs: seen.append(output)
            )
        forward.loss(local, batch_of(task, padded=False))
        positions = range(-1, len(local.plan.local_blocks))
        assert [output.requires_grad for output in outputs] == [
            at >= local.plan.lowest_trained for at in positions
        ]


def test_the_last_block_and_the_head_compute_only_the_positions_that_the_loss_reads(
    tiny_bert: Path,
) -> None:
    for task in ("mlm", "ner"):
        local, widths = local_model(tiny_bert, task, PLANS["full"]), []
        for layer in local.module.bert.encoder.layer:
            layer.output.LayerNorm.register_forward_hook(
                lambda module, inputs, output, seen=widths: seen.append(output.shape[1])
            )
        assert forward.logits(local, batch_of(task, padded=False)).shape[1] == 3
        assert widths == [8, 8, 8, 3]


@pytest.mark.parametrize("plan", PLANS)
def test_dropout_noise_is_drawn_in_trained_blocks_and_the_head_and_nowhere_else(
    plan: str, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, shares, noisy, wanted = bert_blocks.scaled_dot_product_attention, [], {}, {}

    def recorded(*inputs: Any, dropout_p: float, **options: Any) -> torch.Tensor:
        shares.append(dropout_p)
        return attend(*inputs, dropout_p=dropout_p, **options)

    def watch(name: str, module: Any, noise: bool) -> None:
        wanted[name] = noise
        module.register_forward_hook(
            lambda module, inputs, output: noisy.update({name: not torch.equal(inputs[0], output)})
        )

    monkeypatch.setattr(bert_blocks, "scaled_dot_product_attention", recorded)
    for task in LABELS:
        local = local_model(tiny_bert, task, PLANS[plan], dropout=0.5)
        trained = [block in local.plan.trained_blocks for block in local.plan.local_blocks]
        for found in (shares, noisy, wanted):
            found.clear()
        watch("embeddings", local.module.bert.embeddings.dropout, local.plan.embeddings)
        for position, layer in enumerate(local.module.bert.encoder.layer):
            for name in ("attention.output", "output"):
                watch(f"{position} {name}", layer.get_submodule(name).dropout, trained[position])
        if task != "mlm":
            watch("head", local.module.dropout, True)
        forward.loss(local, batch_of(task, padded=False))
        assert noisy == wanted, task
        assert shares == [0.5 if one else 0.0 for one in trained], task


def test_padding_does_not_change_what_an_example_gives(tiny_bert: Path) -> None:
    local = local_model(tiny_bert, "classification", PLANS["head"])
    ids = torch.tensor([[2, 7, 8, 3]])
    padded = torch.tensor([[2, 7, 8, 3, 0, 0, 0, 0], [2, 9, 9, 9, 9, 9, 9, 3]])
    mask = torch.tensor([[True] * 4 + [False] * 4, [True] * 8])
    local.module.eval()
    alone = forward.logits(
        local, Batch(ids, None, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0]]))
    )
    both = forward.logits(
        local, Batch(padded, mask, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[0], [1]]))
    )
    torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=1e-6)


def test_every_plan_of_a_run_gives_a_gradient_for_each_trained_tensor(tiny_bert: Path) -> None:
    for task, method, round_ in product(LABELS, ("fedbt", "fedbt-lora"), range(4)):
        local = local_model(
            tiny_bert, task, plan_of(method, task, round_, local_depth=3), dropout=0.1
        )
        forward.loss(local, batch_of(task, padded=True)).backward()
        gradients = {name: value.grad for name, value in local.trained.items()}
        assert all(
            value is not None and bool(value.isfinite().all()) for value in gradients.values()
        )
