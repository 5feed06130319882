"""What an architecture says of its tensors is what transformers' own model has."""

from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from fedbt_app.cli.presets import PRESETS
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, HeadKind, count

CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "num_attention_heads": 4,
}
TINY = Architecture.from_config(CONFIG, "tiny")
ENCODER = TINY.encoder
STOCK: dict[HeadKind, Any] = {
    HeadKind.MASKED_LM: BertForMaskedLM,
    HeadKind.SEQUENCE: BertForSequenceClassification,
    HeadKind.TOKEN: BertForTokenClassification,
}


def stock_shapes(head: HeadKind, num_labels: int) -> dict[str, tuple[int, ...]]:
    config = BertConfig(**CONFIG, num_labels=num_labels)
    return {name: tuple(value.shape) for name, value in STOCK[head](config).named_parameters()}


def test_bert_base_has_the_published_parameter_counts() -> None:
    base = Architecture.from_config(PRESETS["bert-base"], "bert-base")
    assert count(base.model(HeadKind.MASKED_LM, 0)) == 109_514_298
    assert {count(base.block(index)) for index in range(12)} == {7_087_872}
    assert count(base.head(HeadKind.MASKED_LM, 0)) == 622_650
    assert count(base.model(HeadKind.SEQUENCE, 13)) == 109_492_237


def test_every_tensor_of_the_stock_model_is_listed_with_its_shape_in_its_part() -> None:
    parts = {EMBEDDINGS, HEAD, *(f"block.{index}" for index in range(TINY.depth))}
    for head in STOCK:
        shapes = stock_shapes(head, 5)
        assert TINY.model(head, 5) == shapes
        assert {ENCODER.part_of(name) for name in shapes} == parts
        for part in parts:
            own = {name: shape for name, shape in shapes.items() if ENCODER.part_of(name) == part}
            assert TINY.part(part, head, 5, rank=2) == own


def test_the_heads_tensors_that_follow_the_labels_are_those_made_for_one_set_of_them() -> None:
    assert TINY.label_tensors(HeadKind.MASKED_LM) == set()
    for head in (HeadKind.SEQUENCE, HeadKind.TOKEN):
        assert TINY.label_tensors(head) == {"classifier.weight", "classifier.bias"}


def test_adapters_are_a_part_of_their_own_on_query_and_value() -> None:
    for rank in (1, 4):
        shapes = TINY.part("adapter.2", HeadKind.MASKED_LM, 0, rank)
        assert {ENCODER.part_of(name) for name in shapes} == {"adapter.2"}
        assert {name.split(".")[-3] for name in shapes} == {"query", "value"}
        assert count(shapes) == 2 * 2 * rank * TINY.hidden


def test_a_blocks_tensor_can_be_named_at_another_block() -> None:
    assert [ENCODER.at_block(name, 2) for name in TINY.block(0)] == list(TINY.block(2))
    assert ENCODER.at_block("classifier.weight", 2) == "classifier.weight"


def test_a_part_that_the_model_does_not_have_is_refused() -> None:
    for part in ("block.3", "block.-1", "block", "adapter.9", "pooler", "", "block.²"):
        with pytest.raises(FedBTError, match="is not a part of a BERT of 3 blocks"):
            TINY.part(part, HeadKind.MASKED_LM, 0, rank=2)


def test_an_unsupported_model_type_error_names_the_supported_ones() -> None:
    for kind in ("gpt2", None):
        with pytest.raises(FedBTError, match=r"some/model is of model type .*; supported: bert"):
            Architecture.from_config({"model_type": kind}, "some/model")


def test_an_incomplete_config_error_names_what_is_missing() -> None:
    for key in sorted(CONFIG.keys() - {"model_type", "num_attention_heads"}):
        partial = {name: value for name, value in CONFIG.items() if name != key}
        with pytest.raises(FedBTError, match=rf"some/model has no '{key}' in its config\.json"):
            Architecture.from_config(partial, "some/model")


def test_a_base_that_would_not_be_trained_as_what_it_is_is_refused_by_key_with_the_mend() -> None:
    demanded = {
        "is_decoder": (True, r"=true .*set it to false if the checkpoint is an encoder"),
        "add_cross_attention": (True, r"=true .*set it to false if the checkpoint is an encoder"),
        "position_embedding_type": ("relative_key_query", r'="relative_key_query" .*absolute'),
        "pruned_heads": ({"0": [1]}, r'={"0": \[1\]} .*before pruning'),
    }
    for key, (value, wanted) in demanded.items():
        with pytest.raises(FedBTError, match=rf"some/model has {key}{wanted}"):
            Architecture.from_config(CONFIG | {key: value}, "some/model")


def test_what_the_library_takes_by_default_may_be_spelt_out() -> None:
    spelt_out = {key: demand.value for key, demand in ENCODER.demands.items()}
    Architecture.from_config(CONFIG | spelt_out | {"chunk_size_feed_forward": 2}, "some/model")
    Architecture.from_config(CONFIG | dict.fromkeys(spelt_out), "some/model")
    for head in HeadKind:
        ENCODER.check(CONFIG | spelt_out, "some/model", head)


def test_an_untied_decoder_is_refused_by_the_head_that_has_one() -> None:
    untied = CONFIG | {"tie_word_embeddings": False}
    Architecture.from_config(untied, "some/model")
    for head in (HeadKind.SEQUENCE, HeadKind.TOKEN):
        ENCODER.check(untied, "some/model", head)
    with pytest.raises(FedBTError, match=r"some/model has tie_word_embeddings=false .*task=mlm"):
        ENCODER.check(untied, "some/model", HeadKind.MASKED_LM)


def test_an_older_config_without_a_type_is_read_by_the_class_that_wrote_it() -> None:
    untyped = {key: value for key, value in CONFIG.items() if key != "model_type"}
    for name in ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel"):
        older = Architecture.from_config(untyped | {"architectures": [name]}, "some/model")
        assert older.encoder is ENCODER
        assert older.model(HeadKind.TOKEN, 2) == TINY.model(HeadKind.TOKEN, 2)
    for others in (["BertGenerationEncoder"], ["RobertaModel"], ["BertModel", "Other"], [], None):
        with pytest.raises(FedBTError, match=r'type None; supported: bert .* "model_type": "bert"'):
            Architecture.from_config(untyped | {"architectures": others}, "some/model")
