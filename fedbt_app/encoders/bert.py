"""BERT (Devlin et al., 2019), `model_type: bert`."""

from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fedbt_app.encoders.base import Demand, Encoder, taken_at
from fedbt_app.parts import HeadKind


class Bert(Encoder):
    """Attention and feed-forward, each followed by its LayerNorm; the word decoder is tied."""

    title = "BERT"
    model_types = ("bert",)
    class_prefix = "Bert"
    embeddings_at = "bert.embeddings"
    blocks_at = "bert.encoder.layer"
    bare_names = ("embeddings.", "encoder.", "pooler.")
    dimension_keys: ClassVar = {
        "depth": "num_hidden_layers",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
    }
    required_keys = ("type_vocab_size",)
    identity: ClassVar = {
        "num_attention_heads": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    demands: ClassVar = {
        "is_decoder": Demand(
            False,
            "a decoder's words look back only, an encoder's look both ways; "
            "set it to false if the checkpoint is an encoder",
        ),
        "add_cross_attention": Demand(
            False,
            "there is no second model to look at; set it to false if the checkpoint is an encoder",
        ),
        "position_embedding_type": Demand(
            "absolute",
            "only absolute positions are supported; choose a checkpoint that has them",
        ),
        "pruned_heads": Demand(
            {}, "every block needs all heads; choose a checkpoint before pruning"
        ),
        "tie_word_embeddings": Demand(
            True,
            "the head of task=mlm shares the word embeddings; "
            "set it to true if the checkpoint has no decoder of its own",
            head=HeadKind.MASKED_LM,
        ),
    }
    dropout_keys = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    adapted_modules = ("query", "value")  # peft's own choice for BERT
    skips_queries = True
    plain_blocks = True

    def run_block(
        self,
        layer: Any,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        at: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run one block: keys and values everywhere, queries and all after them only `at` some."""
        wanted = hidden
        if at is not None:
            wanted = taken_at(hidden, at)
        mixed = _attention(layer, wanted, hidden, mask)
        attended = layer.attention.output(mixed, wanted)
        wide = layer.intermediate.dense(attended)
        if layer.output.dense.weight.requires_grad:
            # Its gradient needs the activation, which is made again in the backward pass: kept, it
            # would be a sixth of what a block saves. That runs up to what the product after it
            # needs, and not the product. No noise is drawn there whose state would have to be kept.
            narrow = checkpoint(_narrow, layer, wide, use_reentrant=False, preserve_rng_state=False)
        else:
            narrow = _narrow(layer, wide)
        noisy = layer.output.dropout(narrow)
        output: torch.Tensor = layer.output.LayerNorm(noisy + attended)
        return output

    def masked_lm(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Dense, LayerNorm and the decoder that is tied to the word embeddings."""
        outputs: torch.Tensor = module.cls(states)
        return outputs

    def sequence(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Pooler and classifier."""
        pooled = module.bert.pooler(states)[:, None]
        outputs: torch.Tensor = module.classifier(module.dropout(pooled))
        return outputs

    def token(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """The classifier alone."""
        outputs: torch.Tensor = module.classifier(module.dropout(states))
        return outputs


def _attention(
    layer: Any,
    wanted: torch.Tensor,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return what the states `wanted` (B, P, H) gather from all of `hidden` (B, T, H)."""
    attention = layer.attention.self
    heads = attention.num_attention_heads

    def by_head(states: torch.Tensor) -> torch.Tensor:
        apart: torch.Tensor = states.unflatten(2, (heads, -1))
        return apart.transpose(1, 2)

    dropout = 0.0
    if layer.training:
        dropout = attention.dropout.p
    mixed = scaled_dot_product_attention(
        by_head(attention.query(wanted)),
        by_head(attention.key(hidden)),
        by_head(attention.value(hidden)),
        attn_mask=mask,
        dropout_p=dropout,
    )
    return mixed.transpose(1, 2).flatten(2)


def _narrow(layer: Any, wide: torch.Tensor) -> torch.Tensor:
    active = layer.intermediate.intermediate_act_fn(wide)
    narrow: torch.Tensor = layer.output.dense(active)
    return narrow
