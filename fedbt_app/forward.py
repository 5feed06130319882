"""The exact step: the stock model's loss and gradients, without computing what they do not need.

- No graph and no dropout noise below the lowest trained block.
- The last block computes keys and values everywhere, but queries, attention output and feed-forward
  only at the positions the loss reads; the output head sees only those.

It runs the submodules of transformers' own BERT, so what is trained here is what is exported.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from fedbt_app.local_model import LocalModel
from fedbt_app.tasks import IGNORED, Batch


def logits(local: LocalModel, batch: Batch) -> torch.Tensor:
    """Return the head's outputs (B, P, classes) at the batch's loss positions."""
    hidden = _embed(local, batch)
    layers = local.module.bert.encoder.layer
    mask = None if batch.mask is None else batch.mask[:, None, None, :]
    for position, layer in enumerate(layers):
        last = position == len(layers) - 1
        with _no_graph_below(local, position):
            hidden = block(layer, hidden, mask, batch.positions if last else None)
    return _head(local, hidden)


def loss(local: LocalModel, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy over the batch's loss positions."""
    outputs = logits(local, batch)
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
    wanted = hidden if at is None else hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))

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
    return layer.output(layer.intermediate(attended), attended)


def _embed(local: LocalModel, batch: Batch) -> torch.Tensor:
    with _no_graph_below(local, -1):
        return local.module.bert.embeddings(input_ids=batch.input_ids)


def _no_graph_below(local: LocalModel, position: int) -> "torch.no_grad | nullcontext[None]":
    return torch.no_grad() if position < local.plan.lowest_trained else nullcontext()


def _head(local: LocalModel, states: torch.Tensor) -> torch.Tensor:
    module = local.module
    if local.spec.task == "mlm":
        return module.cls(states)
    if local.spec.task == "classification":
        states = module.bert.pooler(states)[:, None]
    return module.classifier(module.dropout(states))
