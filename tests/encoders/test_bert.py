import pytest
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from fedbt_app.encoders.bert import PRESETS, Architecture, at_block, part_of
from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, count

TINY = Architecture(depth=3, hidden=16, intermediate=24, vocabulary=50, positions=20, token_types=3)
STOCK = {
    "mlm": BertForMaskedLM,
    "classification": BertForSequenceClassification,
    "ner": BertForTokenClassification,
}


def stock_shapes(task: str, num_labels: int) -> dict[str, tuple[int, ...]]:
    config = BertConfig(
        num_hidden_layers=TINY.depth,
        hidden_size=TINY.hidden,
        intermediate_size=TINY.intermediate,
        vocab_size=TINY.vocabulary,
        max_position_embeddings=TINY.positions,
        type_vocab_size=TINY.token_types,
        num_attention_heads=4,
        num_labels=num_labels,
    )
    return {name: tuple(value.shape) for name, value in STOCK[task](config).named_parameters()}


def test_bert_base_has_the_published_parameter_counts() -> None:
    base = PRESETS["bert-base"]
    assert count(base.model("mlm", 0)) == 109_514_298
    assert {count(base.block(index)) for index in range(12)} == {7_087_872}
    assert count(base.head("mlm", 0)) == 622_650
    assert count(base.model("classification", 13)) == 109_492_237


@pytest.mark.parametrize("task", STOCK)
def test_the_block_map_lists_every_tensor_of_the_stock_model_with_its_shape(task: str) -> None:
    assert TINY.model(task, 5) == stock_shapes(task, 5)


@pytest.mark.parametrize("task", STOCK)
def test_every_tensor_of_the_stock_model_belongs_to_the_part_that_lists_it(task: str) -> None:
    parts = {EMBEDDINGS, HEAD, *(f"block.{index}" for index in range(TINY.depth))}
    names = stock_shapes(task, 5)
    assert {part_of(name) for name in names} == parts
    for part in parts:
        assert set(TINY.part(part, task, 5, rank=2)) == {name for name in names if part_of(name) == part}


@pytest.mark.parametrize("rank", [1, 4])
def test_adapters_are_a_part_of_their_own_on_query_and_value(rank: int) -> None:
    shapes = TINY.part("adapter.2", "mlm", 0, rank)
    assert {part_of(name) for name in shapes} == {"adapter.2"}
    assert {name.split(".")[-3] for name in shapes} == {"query", "value"}
    assert count(shapes) == 2 * 2 * rank * TINY.hidden


def test_a_blocks_tensor_can_be_named_at_another_block() -> None:
    assert [at_block(name, 2) for name in TINY.block(11)] == list(TINY.block(2))
    assert at_block("classifier.weight", 2) == "classifier.weight"


@pytest.mark.parametrize("name", ["distilbert.transformer.layer.0.lin.weight", "cls.seq_relationship.weight", "x"])
def test_a_tensor_of_another_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(FedBTError, match="is not part of a BERT") as caught:
        part_of(name)
    assert name in str(caught.value)


@pytest.mark.parametrize("part", ["block.3", "block.-1", "block", "adapter.9", "pooler", "", "block.²"])
def test_a_part_that_the_model_does_not_have_is_refused(part: str) -> None:
    with pytest.raises(FedBTError, match="is not a part of a BERT of 3 blocks"):
        TINY.part(part, "mlm", 0, rank=2)


@pytest.mark.parametrize("kind", ["roberta", None])
def test_an_unsupported_model_type_error_names_the_supported_ones(kind: str | None) -> None:
    with pytest.raises(FedBTError, match=r"some/model is of model type .*; supported: bert"):
        Architecture.from_config({"model_type": kind}, "some/model")


def test_an_incomplete_config_error_names_what_is_missing() -> None:
    with pytest.raises(FedBTError, match="num_hidden_layers"):
        Architecture.from_config({"model_type": "bert"}, "some/model")
