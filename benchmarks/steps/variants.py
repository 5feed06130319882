"""The training steps that the benchmark compares: stock code's and FedBT's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import BATCH, LABELS, LENGTH, ROUNDS, Setting, Work, Workload
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model import forward
from fedbt_app.model.local_model import LocalModel
from fedbt_app.plan import RoundPlan, full_plan
from fedbt_app.training import train
from fedbt_app.training.optimizer import Optimizer, TrainSettings
from fedbt_app.training.prefix_cache import PrefixCache

METHODS = ("full-stock", "full-optimised", "fedbt-plain", "fedbt", "lora")
SETTINGS = TrainSettings(epochs=1, batch_size=BATCH, learning_rate=5e-5, weight_decay=0.01)


@dataclass(frozen=True)
class Part:
    """One step that is measured; a method costs the sum of its parts, each times its share.

    Attributes
    ----------
    run : the whole step, from the forward pass to `zero_grad`
    predicted : its FLOPs by formula, where there is one
    padded : it costs the same for every batch, as all are padded to LENGTH
    """

    share: float
    run: Callable[[Work], None]
    predicted: Callable[[StepShape], int] | None = None
    padded: bool = False


def parts(
    setting: Setting, method: str, local_depth: int, load: Workload, only: RoundPlan | None = None
) -> list[Part]:
    """Build a method's models and return its steps: of all FedBT's plans, or of one of them."""
    if method == "full-stock":
        step = _stock_step(stock_model(setting), setting.bfloat16)
        return [Part(1, step, partial(_stock_flops, setting), padded=True)]
    if method == "lora":
        return [Part(1, _stock_step(_lora(setting), setting.bfloat16), padded=True)]
    if method == "full-optimised":
        plan = full_plan(setting.arch.depth)
        step = _exact_step(setting.build(plan))
        return [Part(1, step, partial(_flops, setting, plan))]
    if only is None:
        plans = _distinct(setting.schedule(local_depth))
    else:
        plans = [(only, 1.0)]
    if method == "fedbt-plain":
        return [_plain_part(setting, plan, share) for plan, share in plans]
    cache = setting.open_cache(setting.folder / "prefix", load.rows)
    return _fedbt(setting, plans, cache)


def _plain_part(setting: Setting, plan: RoundPlan, share: float) -> Part:
    """Train FedBT's local model as anybody would, by stock code."""
    model = setting.build(plan).module.train()
    return Part(share, _stock_step(model, setting.bfloat16), padded=True)


def _flops(setting: Setting, plan: RoundPlan, shape: StepShape) -> int:
    return setting.costs.step_flops(plan, shape)


def _stock_flops(setting: Setting, _: StepShape) -> int:
    return setting.costs.stock_step_flops(BATCH, LENGTH)


def stock_model(setting: Setting) -> Any:
    """Load transformers' own model as anybody would."""
    from transformers import (
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    if setting.task == "mlm":
        return BertForMaskedLM.from_pretrained(setting.folder).train()
    kind: Any = BertForTokenClassification
    if setting.task == "classification":
        kind = BertForSequenceClassification
    return kind.from_pretrained(setting.folder, num_labels=len(LABELS)).train()


def _lora(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    beside: list[str] | None = ["classifier"]
    if setting.task == "mlm":
        beside = None
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=beside,
    )
    return get_peft_model(stock_model(setting), config).train()


def _fedbt(
    setting: Setting, plans: list[tuple[RoundPlan, float]], cache: PrefixCache | None
) -> list[Part]:
    """Make the parts of the product's own steps; the cache costs an example one pass in all."""
    local_models = [setting.build(plan) for plan, _ in plans]
    if cache is None:
        made = []
        for (plan, share), local in zip(plans, local_models, strict=True):
            made.append(Part(share, _exact_step(local), partial(_flops, setting, plan)))
        return made

    def fill(work: Work) -> None:
        prefix = forward.prefix(local_models[0], work.batch, cache.depth)
        cache.write(work.batch, prefix.states)

    def flops_above(plan: RoundPlan, shape: StepShape) -> int:
        above = replace(plan, local_blocks=plan.local_blocks[cache.depth :])
        return _flops(setting, above, shape)

    def flops_of_filling(shape: StepShape) -> int:
        first_plan, _ = plans[0]
        return _flops(setting, first_plan, shape) - flops_above(first_plan, shape)

    made = [Part(1 / ROUNDS, fill, flops_of_filling)]
    for (plan, share), local in zip(plans, local_models, strict=True):
        made.append(Part(share, _exact_step(local, cache), partial(flops_above, plan)))
    return made


def _stock_step(model: Any, bfloat16: bool) -> Callable[[Work], None]:
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def run(work: Work) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**work.dense).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _exact_step(local: LocalModel, cache: PrefixCache | None = None) -> Callable[[Work], None]:
    Optimizer(local.trained.values(), SETTINGS)  # steps within the backward pass

    def run(work: Work) -> None:
        start = None
        if cache is not None:
            states = cache.read(work.batch)
            assert states is not None, "the cache is filled first"
            start = forward.Prefix(cache.depth, states)
        forward.loss(local, work.batch, start).backward()

    return run


def _distinct(plans: list[RoundPlan]) -> list[tuple[RoundPlan, float]]:
    """Take one of all plans that compute the same, with their share."""
    # which frozen blocks were drawn is no matter
    kinds: dict[tuple[int, int, int], list[RoundPlan]] = {}
    for plan in plans:
        kind = (len(plan.local_blocks), plan.lowest_trained, len(plan.trained_blocks))
        kinds.setdefault(kind, []).append(plan)
    return [(same[0], len(same) / len(plans)) for same in kinds.values()]


def train_round(
    setting: Setting, plan: RoundPlan, rows: list[dict[str, Any]], folder: Path
) -> None:
    """Train one round as a client does, with the frozen-prefix cache in `folder`."""
    cache = setting.open_cache(folder, rows)
    local = setting.build(plan)
    train.run(local, rows, setting.collator, SETTINGS, FlopMeter(), cache)
    if cache:
        cache.close()


def largest(setting: Setting, local_depth: int) -> RoundPlan:
    """Return the plan of the schedule that needs most memory."""
    costs = setting.costs
    shape = costs.full_shape(BATCH, LENGTH, setting.collator.reading.mask_probability)
    plans = setting.schedule(local_depth)
    return max(plans, key=lambda plan: costs.memory_bytes(plan, shape))
