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
    local: LocalModel, batch: Batch, start: Prefix | None = None, checkpointing: bool = False
) -> torch.Tensor:
    """Return the head's outputs (B, P, classes) at the batch's loss positions, from `start` on if
    given.

    `checkpointing` saves only the inputs of blocks with a graph and runs them again backwards.
    """
    encoder = local.encoder
    layers = encoder.blocks(local.module)
    with _autocast(local):
        if start is None:
            start = Prefix(0, encoder.embed(local.module, batch.input_ids))
        hidden = start.states
        at = None
        for position in range(start.depth, len(layers)):
            if encoder.skips_queries and position == len(layers) - 1:
                at = batch.positions
            if checkpointing and position >= local.plan.lowest_trained:
                run = encoder.run_block
                hidden = checkpoint(
                    run, layers[position], hidden, _mask(batch), at, use_reentrant=False
                )
            else:
                hidden = encoder.run_block(layers[position], hidden, _mask(batch), at)
        read = taken_at(hidden, batch.positions) if at is None else hidden
        return encoder.run_head(local.module, local.spec.task.head, read)


def loss(
    local: LocalModel, batch: Batch, start: Prefix | None = None, checkpointing: bool = False
) -> torch.Tensor:
    """Return the mean of the task's loss over the batch's loss positions."""
    return local.spec.task.loss(logits(local, batch, start, checkpointing), batch.labels)


def _mask(batch: Batch) -> torch.Tensor | None:
    return None if batch.mask is None else batch.mask[:, None, None, :]


def _autocast(local: LocalModel) -> AbstractContextManager[Any]:
    return torch.autocast(local.device.type, torch.bfloat16) if local.bfloat16 else nullcontext()
