"""The FLOPs of a step, counted on a weightless model: for any family, without a formula.

The very step that a client runs on a CPU, with fake tensors: operators are chosen and shapes
computed as for real ones, but no numbers and no memory. No mask is passed, as rows of full length
have none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import DispatchCounter
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.model import forward
from fedbt_app.model.local_model import weightless
from fedbt_app.model.weights import ModelSpec
from fedbt_app.parts import HeadKind
from fedbt_app.plan import RoundPlan, full_plan, untrained_plan
from fedbt_app.tasks.base import Task
from fedbt_app.tasks.batch import Batch

DROPOUT = 0.1  # any: with some, a CPU's attention does not run in one fused kernel


@dataclass(frozen=True)
class Counts:
    """The FLOPs of one model of one task: answers the same questions as Formulas."""

    architecture: Architecture
    task: Task
    num_labels: int
    rank: int = 0
    fused: bool = False

    def step(self, plan: RoundPlan, shape: StepShape, start: int = 0) -> int:
        """Count one exact training step; the cache has the `start` lowest blocks' output."""
        return _step(self, plan, shape, start)

    def stock_step(self, batch: int, length: int) -> int:
        """Count a stock full-model step: every position of every block, dense output head."""
        return _stock_step(self, batch, length)

    def prefix(self, depth: int, batch: int, length: int) -> int:
        """Count the first `depth` blocks, forward only, at every position."""
        return _prefix(self, depth, batch, length)

    @property
    def spec(self) -> ModelSpec:
        """What the model is made for."""
        labels = tuple(f"LABEL_{index}" for index in range(self.num_labels))
        dropout = DROPOUT
        if self.fused:
            dropout = 0.0
        rank = max(1, self.rank)  # a plan without adapters has no rank, but peft wants one
        return ModelSpec(self.task, labels, dropout, lora_rank=rank)


# What is counted once is kept: a plan asks for the same steps again and again.


@cache
def _step(
    counts: Counts,
    plan: RoundPlan,
    shape: StepShape,
    start: int,
) -> int:
    local = weightless(counts.architecture, counts.spec, plan)
    with FakeTensorMode():
        _put_on_fake_cpu(local.module)
        batch = _batch(shape)
        known = None
        if start:
            states = torch.empty(shape.batch, shape.length, counts.architecture.hidden)
            known = forward.Prefix(start, states)
        return _counted(lambda: forward.loss(local, batch, known).backward())


@cache
def _stock_step(counts: Counts, batch: int, length: int) -> int:
    plan = full_plan(counts.architecture.depth)
    module = weightless(counts.architecture, counts.spec, plan).module
    with FakeTensorMode():
        _put_on_fake_cpu(module)
        pieces = torch.zeros(batch, length, dtype=torch.int64)
        labels = pieces
        if counts.task.head is HeadKind.SEQUENCE:  # one a row
            labels = pieces[:, 0]
        return _counted(lambda: module(input_ids=pieces, labels=labels).loss.backward())


@cache
def _prefix(
    counts: Counts,
    depth: int,
    batch: int,
    length: int,
) -> int:
    plan = untrained_plan(counts.architecture.depth)
    local = weightless(counts.architecture, counts.spec, plan)
    shape = StepShape(batch, length, positions=1)  # no loss is read: any number does
    with FakeTensorMode():
        _put_on_fake_cpu(local.module)
        return _counted(lambda: forward.prefix(local, _batch(shape), depth))


def _put_on_fake_cpu(module: Any) -> None:
    """Put fake tensors, which claim to be on the CPU, in the place of those on the meta device."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            values = torch.empty(parameter.shape)
            fake = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(owner, name, fake)
        for name, buffer in owner.named_buffers(recurse=False):
            zeros = torch.zeros(buffer.shape, dtype=buffer.dtype)
            setattr(owner, name, zeros)


def _batch(shape: StepShape) -> Batch:
    pieces = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
    read = torch.zeros(shape.batch, shape.positions, dtype=torch.int64)
    return Batch(input_ids=pieces, mask=None, positions=read, labels=read)


def _counted(run: Callable[[], Any]) -> int:
    with DispatchCounter() as counter:
        run()
    flops: int = counter.total
    return flops
