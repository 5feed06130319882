import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, f1_score, log_loss

from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS, metric_named
from fedbt_app.tasks.base import IGNORED, Reading, SpecialTokens
from fedbt_app.tasks.batch import Batch, Collator, special_tokens
from fedbt_app.tasks.scores import Scores

PAD, MASK, VOCABULARY = 0, 4, 1000
TOKENS = SpecialTokens(PAD, MASK, (0, 1, 2, 3, 4), VOCABULARY)
CLASSES = ("heart", "kidney", "liver")
TAGS = ("B-x", "I-x", "O")


def rows_of(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of so many pieces between [CLS] and [SEP], every tenth of them [UNK]."""
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = generator.integers(5, VOCABULARY, length)
        ids[::10] = 1
        made.append({"input_ids": [2, *ids.tolist(), 3]})
    return made


def collated(
    task: str,
    rows: list[dict[str, Any]],
    labels: tuple[str, ...] = (),
    seed: int = 0,
    share: float = 0.15,
) -> Batch:
    return Collator(TASKS[task], Reading(TOKENS, labels, share))(rows, np.random.default_rng(seed))


def masked(rows: list[dict[str, Any]], seed: int = 0, share: float = 0.15) -> Batch:
    return collated("mlm", rows, seed=seed, share=share)


# Batches ------------------------------------------------------------------------------------------


def test_rows_are_padded_to_a_multiple_of_eight_and_the_mask_says_where() -> None:
    batch = masked(rows_of([9, 3, 17]))
    assert batch.input_ids.shape == (3, 24)
    assert batch.mask is not None
    assert batch.mask.sum(1).tolist() == [11, 5, 19]
    assert (batch.input_ids[~batch.mask] == PAD).all()
    assert batch.shape == (3, 24, batch.positions.shape[1], True)


def test_rows_of_one_length_are_not_padded_and_need_no_mask() -> None:
    batch = masked(rows_of([9, 9]))
    assert batch.mask is None
    assert batch.shape == (2, 11, batch.positions.shape[1], False)


def test_special_tokens_are_read_off_the_tokenizer(tiny_bert: Any) -> None:
    from transformers import AutoTokenizer

    found = special_tokens(AutoTokenizer.from_pretrained(tiny_bert))
    assert (found.pad, found.mask, sorted(found.special)) == (0, 4, [0, 1, 2, 3, 4])
    assert found.vocabulary == len((tiny_bert / "vocab.txt").read_text().splitlines())


# Masking ------------------------------------------------------------------------------------------


def test_fifteen_percent_are_predicted_of_which_80_10_10_are_masked_replaced_and_kept() -> None:
    rows = rows_of([200] * 400)
    batch = masked(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch.labels != IGNORED
    candidates = int((original > 4).sum())
    assert int(chosen.sum()) == pytest.approx(0.15 * candidates, rel=0.005)
    seen = batch.input_ids.gather(1, batch.positions)[chosen]
    truth = batch.labels[chosen]
    count = len(seen)  # about 10 800: one standard deviation of a share is below 0.004
    assert int((seen == MASK).sum()) / count == pytest.approx(0.8, abs=0.016)
    assert int((seen == truth).sum()) / count == pytest.approx(0.1, abs=0.012)
    assert int(((seen != MASK) & (seen != truth)).sum()) / count == pytest.approx(0.1, abs=0.012)


def test_labels_are_the_original_pieces_and_no_other_position_is_touched() -> None:
    rows = rows_of([30, 12, 7])
    batch = masked(rows, share=0.4)
    for row, ids in enumerate(item["input_ids"] for item in rows):
        kept = batch.labels[row] != IGNORED
        positions = batch.positions[row][kept].tolist()
        assert len(set(positions)) == len(positions)
        assert [ids[at] for at in positions] == batch.labels[row][kept].tolist()
        rest = [at for at in range(len(ids)) if at not in positions]
        assert [ids[at] for at in rest] == batch.input_ids[row][rest].tolist()


def test_neither_special_tokens_nor_padding_are_ever_predicted() -> None:
    for seed, share in itertools.product(range(20), (0.15, 0.9)):
        batch = masked(rows_of([40, 3, 11, 1], seed), seed, share)
        chosen = batch.labels[batch.labels != IGNORED]
        assert not set(chosen.tolist()) & set(TOKENS.special)
        lengths = torch.tensor([[42], [5], [13], [3]])
        assert (batch.positions < lengths).all()


def test_a_row_without_anything_to_predict_is_carried_along() -> None:
    batch = masked([{"input_ids": [2, 1, 3]}, {"input_ids": [2, 9, 3]}])
    assert (batch.labels != IGNORED).sum(1).tolist() == [0, 1]


def test_short_rows_predict_at_least_one_piece() -> None:
    batch = masked([{"input_ids": [2, 9, 3]}, {"input_ids": [2, 8, 7, 3]}], share=0.01)
    assert (batch.labels != IGNORED).sum(1).tolist() == [1, 1]


def test_masking_is_decided_by_the_generator() -> None:
    rows = rows_of([50, 40])
    one, same, other = masked(rows, 1), masked(rows, 1), masked(rows, 2)
    for name in ("input_ids", "positions", "labels"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.positions, other.positions)


def test_collating_does_not_change_the_rows() -> None:
    rows = rows_of([20])
    masked(rows)
    assert rows == rows_of([20])


# Classes and tags ---------------------------------------------------------------------------------


def test_classification_reads_the_first_position() -> None:
    rows = [
        row | {"label": label}
        for row, label in zip(rows_of([5, 3]), ("liver", "heart"), strict=True)
    ]
    batch = collated("classification", rows, CLASSES)
    assert batch.positions.tolist() == [[0], [0]]
    assert batch.labels.tolist() == [[2], [0]]


def test_ner_reads_the_first_piece_of_each_word() -> None:
    rows = [
        {"input_ids": [2, 10, 11, 12, 13, 3], "tags": ["", "B-x", "", "I-x", "O", ""]},
        {"input_ids": [2, 14, 3], "tags": ["", "O", ""]},
        {"input_ids": [2, 3], "tags": ["", ""]},
    ]
    batch = collated("ner", rows, TAGS)
    assert batch.positions[0][:3].tolist() == [1, 3, 4]
    assert batch.labels[0][:3].tolist() == [0, 1, 2]
    assert (batch.positions[1][0], batch.labels[1][0]) == (1, 2)
    assert (batch.labels != IGNORED).sum(1).tolist() == [3, 1, 0]
    assert not batch.positions[batch.labels == IGNORED].any()


def test_a_label_outside_the_set_is_an_error_that_does_not_quote_it() -> None:
    row = {"input_ids": [2, 9, 3], "label": "lung", "tags": ["", "lung", ""]}
    for task in ("classification", "ner"):
        with pytest.raises(FedBTError, match=r"a label that is none of the run's 3") as caught:
            collated(task, [row], CLASSES)
        assert "lung" not in str(caught.value)


# Metrics ------------------------------------------------------------------------------------------


def scored(
    task: str, labels: tuple[str, ...], logits: torch.Tensor, truth: torch.Tensor
) -> dict[str, float]:
    return tallied(task, labels, logits, truth, size=4).metrics()  # the last batch is short


def tallied(
    task: str, labels: tuple[str, ...], logits: torch.Tensor, truth: torch.Tensor, size: int
) -> Scores:
    """Return the scores of examples, each of whose words has one piece."""
    scores = Scores(TASKS[task], labels)
    rows = []
    for own in truth:
        kept = own[own != IGNORED].tolist()
        gold = [labels[label] for label in kept] if task == "ner" else []
        rows.append({"gold": gold, "words": list(range(len(gold)))})
    for start in range(0, len(truth), size):
        batch = slice(start, start + size)
        scores.add(logits[batch], truth[batch], rows[batch])
    return scores


def test_classification_metrics_are_those_of_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, truth = (
        torch.randn(50, 1, 3, generator=generator),
        torch.randint(0, 3, (50, 1), generator=generator),
    )
    found, flat, guess = (
        scored("classification", CLASSES, logits, truth),
        truth[:, 0],
        logits.argmax(-1)[:, 0],
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(flat, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(flat, guess, average="macro"))
    assert found["loss"] == pytest.approx(
        log_loss(flat, logits[:, 0].softmax(-1), labels=[0, 1, 2]), rel=1e-5
    )


def test_macro_f1_counts_a_class_that_was_never_guessed_as_zero() -> None:
    logits = torch.tensor([[[9.0, 0, 0]]] * 4)
    found = scored("classification", CLASSES, logits, torch.tensor([[0], [0], [1], [1]]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_mlm_metrics_cover_the_loss_positions_only() -> None:
    logits = torch.zeros(2, 2, 4)
    logits[0, 0, 1] = logits[1, 0, 2] = 3.0
    truth = torch.tensor([[1, IGNORED], [1, IGNORED]])
    found = scored("mlm", (), logits, truth)
    assert found["accuracy"] == 0.5
    assert found["perplexity"] == pytest.approx(float(np.exp(found["loss"])))
    assert found["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor([1, 1]))), rel=1e-6
    )


def test_ner_metrics_are_seqevals_over_entities() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, truth = (
        torch.randn(30, 9, 3, generator=generator),
        torch.randint(0, 3, (30, 9), generator=generator),
    )
    truth[::3, 5:] = IGNORED
    found = scored("ner", TAGS, logits, truth)
    true, guess = [], []
    for own, predicted in zip(truth, logits.argmax(-1), strict=True):
        kept = own != IGNORED
        true.append([TAGS[label] for label in own[kept]])
        guess.append([TAGS[label] for label in predicted[kept]])
    assert found["f1"] == pytest.approx(entity_f1(true, guess))
    assert found["precision"] == pytest.approx(precision_score(true, guess))
    assert found["recall"] == pytest.approx(recall_score(true, guess))
    assert 0 < found["f1"] < 1


def test_counts_of_sites_add_up_to_the_scores_of_one_process() -> None:
    generator = torch.Generator().manual_seed(2)
    for task, labels, positions in (
        ("classification", CLASSES, 1),
        ("ner", TAGS, 9),
        ("mlm", (), 4),
    ):
        logits = torch.randn(40, positions, 3, generator=generator)
        truth = torch.randint(0, 3, (40, positions), generator=generator)
        whole = tallied(task, labels, logits, truth, size=8)
        sums: Counter[str] = Counter()
        for site in (slice(0, 3), slice(3, 11), slice(11, 40)):
            sums.update(tallied(task, labels, logits[site], truth[site], size=8).tally)
        pooled = TASKS[task].scored(sums, labels)
        assert pooled.pop("loss") == pytest.approx(whole.metrics()["loss"], rel=1e-6)
        pooled.pop("perplexity", None)
        assert pooled == {name: whole.metrics()[name] for name in pooled}, task


def test_a_site_without_entities_does_not_change_the_score() -> None:
    perfect = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2]]), 3).float()
    found = tallied("ner", TAGS, perfect, torch.tensor([[0, 1, 2]]), size=1).tally
    nothing = tallied("ner", TAGS, perfect[:, 2:], torch.tensor([[2]]), size=1).tally
    assert TASKS["ner"].scored(Counter(found) + Counter(nothing), TAGS)["f1"] == 1.0


def test_entities_that_are_not_read_count_as_missed() -> None:
    scores = Scores(TASKS["ner"], TAGS)
    perfect = torch.nn.functional.one_hot(torch.tensor([[0, 1]]), 3).float()
    cut = {
        "gold": ["B-x", "I-x", "O", "B-x"],
        "words": [0, 1],
    }  # the last two words are beyond max-length
    scores.add(perfect, torch.tensor([[0, 1]]), [cut])
    found = scores.metrics()
    assert (found["precision"], found["recall"]) == (1.0, 0.5)


def test_no_rows_give_every_metric_of_the_task_and_all_of_them_finite() -> None:
    for name, task in TASKS.items():
        found = Scores(task, TAGS).metrics()
        assert found.keys() == {metric.name for metric in task.metrics}, name
        assert all(np.isfinite(value) for value in found.values()), name


def test_a_metric_that_no_task_has_is_shown_by_its_name() -> None:
    assert all(
        metric_named(metric.name).label == metric.label
        for task in TASKS.values()
        for metric in task.metrics
    )
    assert metric_named("token_f1").label == "token F1"


# Labels -------------------------------------------------------------------------------------------


def test_labels_are_merged_sorted_whatever_the_order_of_the_clients() -> None:
    reported = [["liver", "heart"], ["kidney"], [], ["heart"]]
    merged = TASKS["classification"].merged_labels
    assert merged(reported) == merged(reported[::-1]) == CLASSES
    assert TASKS["mlm"].merged_labels([[], []]) == ()


def test_every_entity_type_gets_both_of_its_tags() -> None:
    merged = TASKS["ner"].merged_labels([["B-Drug", "O"], ["I-Disease"]])
    assert merged == ("B-Disease", "B-Drug", "I-Disease", "I-Drug", "O")
    assert TASKS["ner"].merged_labels([["O"]]) == ("O",)


def test_the_majority_score_is_the_share_of_the_most_frequent_class() -> None:
    assert TASKS["classification"].majority({"a": 3, "b": 1}) == 0.75
    assert TASKS["classification"].majority({}) == 0.0
    assert TASKS["mlm"].majority({}) is None is TASKS["ner"].majority({"O": 3, "B-x": 1})
