"""The exact step: the stock model's loss and gradients, without computing what they do not need.

- No graph below the lowest trained block, as nothing there requires a gradient, and no dropout
  noise.
- Where the family allows it (`Encoder.skips_queries`), the last block computes keys and values
  everywhere, but queries, attention output and feed-forward only at the positions the loss reads;
  the output head sees only those.

It runs the submodules of transformers' own model, so what is trained here is what is exported.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fedbt_app.encoders.base import taken_at
from fedbt_app.model.local_model import LocalModel
from fedbt_app.tasks.batch import Batch


@dataclass(frozen=True)
class Prefix:
    """Hidden states (B, T, H) after the first `depth` blocks of a local model."""

    depth: int
    states: torch.Tensor


@torch.no_grad()
def prefix(local: LocalModel, batch: Batch, depth: int) -> Prefix:
    """Run the embeddings and the first `depth` blocks, all of which must be frozen."""
    with _autocast(local):
        states = local.encoder.embed(local.module, batch.input_ids)
        for layer in local.encoder.blocks(local.module)[:depth]:
            states = local.encoder.run_block(layer, states, _mask(batch), None)
    return Prefix(depth, states)


def logits(
    local: LocalModel,
    batch: Batch,
    start: Prefix | None = None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Return the head's outputs (B, P, classes) at the loss positions, from `start` on if given.

    `checkpointing` saves only the inputs of blocks with a graph and runs them again backwards.
    """
    encoder = local.encoder
    layers = encoder.blocks(local.module)
    last = len(layers) - 1
    mask = _mask(batch)
    with _autocast(local):
        if start is None:
            start = Prefix(0, encoder.embed(local.module, batch.input_ids))
        hidden = start.states
        at = None
        for position in range(start.depth, len(layers)):
            layer = layers[position]
            if encoder.skips_queries and position == last:
                at = batch.positions
            if checkpointing and position >= local.plan.lowest_trained:
                run = encoder.run_block
                hidden = checkpoint(run, layer, hidden, mask, at, use_reentrant=False)
            else:
                hidden = encoder.run_block(layer, hidden, mask, at)
        if at is None:  # no block has picked the loss positions yet
            hidden = taken_at(hidden, batch.positions)
        return encoder.run_head(local.module, local.spec.task.head, hidden)


def loss(
    local: LocalModel,
    batch: Batch,
    start: Prefix | None = None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Return the mean of the task's loss over the batch's loss positions."""
    outputs = logits(local, batch, start, checkpointing)
    return local.spec.task.loss(outputs, batch.labels)


def _mask(batch: Batch) -> torch.Tensor | None:
    if batch.mask is None:
        return None
    return batch.mask[:, None, None, :]


def _autocast(local: LocalModel) -> AbstractContextManager[Any]:
    if local.bfloat16:
        return torch.autocast(local.device.type, torch.bfloat16)
    return nullcontext()
