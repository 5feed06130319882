"""The exact step: the stock model's loss and gradients, without computing what they do not need.

- No graph below the lowest trained block, as nothing there requires a gradient, and no dropout noise.
- The last block computes keys and values everywhere, but queries, attention output and feed-forward
  only at the positions the loss reads; the output head sees only those.

It runs the submodules of transformers' own BERT, so what is trained here is what is exported.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fedbt_app.model.local_model import LocalModel
from fedbt_app.tasks.tasks import IGNORED, Batch


@dataclass(frozen=True)
class Prefix:
    """Hidden states (B, T, H) after the first `depth` blocks of a local model."""

    depth: int
    states: torch.Tensor


@torch.no_grad()
def prefix(local: LocalModel, batch: Batch, depth: int) -> Prefix:
    """Run the embeddings and the first `depth` blocks, all of which must be frozen."""
    with _autocast(local):
        states = local.module.bert.embeddings(input_ids=batch.input_ids)
        for layer in local.module.bert.encoder.layer[:depth]:
            states = block(layer, states, _mask(batch), None)
    return Prefix(depth, states)


def logits(local: LocalModel, batch: Batch, start: Prefix | None = None, checkpointing: bool = False) -> torch.Tensor:
    """Return the head's outputs (B, P, classes) at the batch's loss positions, from `start` on if given.

    `checkpointing` saves only the inputs of blocks with a graph and runs them again backwards.
    """
    layers = local.module.bert.encoder.layer
    with _autocast(local):
        if start is None:
            start = Prefix(0, local.module.bert.embeddings(input_ids=batch.input_ids))
        hidden = start.states
        for position in range(start.depth, len(layers)):
            at = batch.positions if position == len(layers) - 1 else None
            if checkpointing and position >= local.plan.lowest_trained:
                hidden = checkpoint(block, layers[position], hidden, _mask(batch), at, use_reentrant=False)
            else:
                hidden = block(layers[position], hidden, _mask(batch), at)
        if start.depth == len(layers):
            hidden = _at(hidden, batch.positions)
        return _head(local, hidden)


def loss(local: LocalModel, batch: Batch, start: Prefix | None = None, checkpointing: bool = False) -> torch.Tensor:
    """Return the mean cross-entropy over the batch's loss positions."""
    outputs = logits(local, batch, start, checkpointing)
    return cross_entropy(outputs.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED)


def block(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor | None) -> torch.Tensor:
    """Run one encoder block.

    Parameters
    ----------
    hidden : (B, T, H)
    mask : (B, 1, 1, T) bool, True where attention may look; None for everywhere
    at : (B, P) positions whose outputs are wanted; None for all

    Returns
    -------
    torch.Tensor
        (B, P, H), or (B, T, H) for all.
    """
    attention = layer.attention.self
    wanted = hidden if at is None else _at(hidden, at)

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)

    mixed = scaled_dot_product_attention(
        heads(attention.query(wanted)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        attn_mask=mask,
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    attended = layer.attention.output(mixed.transpose(1, 2).flatten(2), wanted)
    wide = layer.intermediate.dense(attended)
    if layer.output.dense.weight.requires_grad:
        # Its gradient needs the activation, which is made again in the backward pass: kept, it would be a sixth of
        # what a block saves. That runs up to what the product after it needs, and not the product.
        narrow = checkpoint(_narrow, layer, wide, use_reentrant=False, preserve_rng_state=False)
    else:
        narrow = _narrow(layer, wide)
    return layer.output.LayerNorm(layer.output.dropout(narrow) + attended)


def _narrow(layer: Any, wide: torch.Tensor) -> torch.Tensor:
    return layer.output.dense(layer.intermediate.intermediate_act_fn(wide))


def _at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))


def _mask(batch: Batch) -> torch.Tensor | None:
    return None if batch.mask is None else batch.mask[:, None, None, :]


def _autocast(local: LocalModel) -> torch.autocast:
    return torch.autocast(local.device.type, torch.bfloat16, enabled=local.bfloat16)


def _head(local: LocalModel, states: torch.Tensor) -> torch.Tensor:
    module = local.module
    if local.spec.task == "mlm":
        return module.cls(states)
    if local.spec.task == "classification":
        states = module.bert.pooler(states)[:, None]
    return module.classifier(module.dropout(states))
