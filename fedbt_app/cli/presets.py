"""Dimensions of well-known encoders, for `fedbt plan --arch`: what their config.json says."""

from typing import Any


def _bert(depth: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "num_hidden_layers": depth,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }


PRESETS = {
    "bert-base": _bert(12, 768, 30522),
    "bert-base-cased": _bert(12, 768, 28996),
    "bert-base-chinese": _bert(12, 768, 21128),
    "bert-large": _bert(24, 1024, 30522),
    "minilm-l6": _bert(6, 384, 30522) | {"num_attention_heads": 12},
}
