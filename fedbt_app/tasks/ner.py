"""Fine-tuning: named-entity recognition, a BIO tag for each word."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import HeadKind
from fedbt_app.tasks.base import (
    IGNORED,
    Blocks,
    Columns,
    Pair,
    Read,
    Reading,
    Row,
    Settings,
    Task,
    in_batches,
    padded,
)
from fedbt_app.tasks.metrics import ENTITY_F1, LOSS, PRECISION, RECALL
from fedbt_app.tasks.schedules import cyclic_decreasing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OUTSIDE = "O"
_BIO = re.compile(r"O|[BI]-.+")


class NamedEntities(Task):
    """Tag the words of entities; word pieces after the first of a word carry no tag."""

    name = "ner"
    head = HeadKind.TOKEN
    metrics = (ENTITY_F1, PRECISION, RECALL, LOSS)
    pipeline = "token-classification"
    columns = ("tokens_column", "tags_column")
    label_key = "tags_column"

    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        """Return the row's tags. A bad tag is not quoted: it may be a word."""
        tokens = row[settings.tokens_column] or []
        tags = row[settings.tags_column] or []
        if not isinstance(tokens, list) or not isinstance(tags, list):
            raise FedBTError(
                f"{where}: columns {settings.tokens_column!r} and {settings.tags_column!r} must hold lists: "
                "set tokens-column and tags-column, or use jsonl or parquet"
            )
        if len(tokens) != len(tags):
            raise FedBTError(
                f"{where} has {len(tokens)} tokens but {len(tags)} tags: give every token one tag"
            )
        for place, (token, tag) in enumerate(zip(tokens, tags, strict=True), start=1):
            if not isinstance(token, str):
                raise FedBTError(
                    f"{where}: token {place} of column {settings.tokens_column!r} is no text: mend it"
                )
            if not isinstance(tag, str) or not _BIO.fullmatch(tag):
                raise FedBTError(
                    f"{where}: tag {place} of column {settings.tags_column!r} is none of O, B-x, I-x: "
                    "set tags-column, or write BIO tags"
                )
        if not any(token.strip() for token in tokens):
            return None
        return tags

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Columns:
        """Give the first piece of each word the word's tag, and every other piece an empty one."""
        made: Columns = {"input_ids": [], "tags": []}
        tags_of_rows = iter(rows[settings.tags_column])
        for words in in_batches(rows[settings.tokens_column]):
            coded = tokenizer(
                words,
                is_split_into_words=True,
                truncation=True,
                max_length=settings.max_length,
            )
            made["input_ids"] += coded["input_ids"]
            for row in range(len(words)):
                tags = _first_piece_tags(coded.word_ids(row), next(tags_of_rows))
                made["tags"].append(tags)
        return made

    def labels_in(self, split: Mapping[str, Any]) -> Iterable[str]:
        """Return the tag of each word."""
        for tags in split["tags"]:
            yield from filter(None, tags)  # the empty ones are of no word

    def merged_labels(self, reported: Iterable[Iterable[str]]) -> tuple[str, ...]:
        """Merge the tags; every entity type gets both its B- and its I- tag."""
        merged = {OUTSIDE}
        for names in reported:
            for name in names:
                if name != OUTSIDE:
                    kind = name[2:]
                    merged |= {f"B-{kind}", f"I-{kind}"}
        return tuple(sorted(merged))

    def skew_by(
        self, settings: Settings, columns: Mapping[str, Sequence[Any]]
    ) -> Sequence[Any] | None:
        """Return each row's label if there is such a column, else the type of its first entity."""
        if settings.label_column in columns or settings.tags_column not in columns:
            return super().skew_by(settings, columns)
        return [first_entity(tags) for tags in columns[settings.tags_column]]

    def read(
        self,
        rows: Sequence[Row],
        ids: np.ndarray,
        present: np.ndarray,
        reading: Reading,
        generator: np.random.Generator,
    ) -> Read:
        """Read the first piece of each word."""
        tagged = [_tagged(row["tags"]) for row in rows]
        width = padded(max(1, *map(len, tagged)))
        positions = np.zeros((len(rows), width), dtype=np.int64)
        targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for index, tags in enumerate(tagged):
            count = len(tags)
            positions[index, :count] = list(tags)
            targets[index, :count] = [reading.label_id(tag) for tag in tags.values()]
        return Read(ids, positions, targets)

    def full_positions(self, length: int, mask_probability: float) -> int:
        """Return all of them: each piece may begin a word."""
        return length

    def scored(
        self, pairs: Sequence[Pair], loss: float, labels: tuple[str, ...]
    ) -> dict[str, float]:
        """Return loss and entity scores by seqeval."""
        from seqeval.metrics import f1_score, precision_score, recall_score

        if not pairs:
            return {"loss": loss, "f1": 0.0, "precision": 0.0, "recall": 0.0}
        true = [_names(pair.true, labels) for pair in pairs]
        predicted = [_names(pair.predicted, labels) for pair in pairs]
        options: dict[str, Any] = {"zero_division": 0}
        return {
            "loss": loss,
            "f1": float(f1_score(true, predicted, **options)),
            "precision": float(precision_score(true, predicted, **options)),
            "recall": float(recall_score(true, predicted, **options)),
        }

    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        """Return the deepest 1, 2, .. blocks in turn."""
        return [tuple(range(lowest, depth)) for lowest in cyclic_decreasing(num_rounds, depth)]

    def measured(self, depth: int) -> str:
        """Return the first, the middle and the last block in every round."""
        return f"0,{(depth - 1) // 2},-1"


def _first_piece_tags(word_of_pieces: Iterable[int | None], tags: Iterable[str]) -> list[str]:
    """Return a tag for each piece; None is the word of [CLS] and [SEP]."""
    left = dict(enumerate(tags))
    made = []
    for word in word_of_pieces:
        if word is None:
            made.append("")
        else:
            made.append(left.pop(word, ""))  # gone: a further piece of the word
    return made


def _tagged(tags: Iterable[str]) -> dict[int, str]:
    """Return the tags by their position, without the empty ones."""
    return {position: tag for position, tag in enumerate(tags) if tag}


def _names(label_ids: Iterable[int], labels: Sequence[str]) -> list[str]:
    return [labels[label] for label in label_ids]


def first_entity(tags: Iterable[str]) -> str:
    """Return the first entity type among BIO tags (`Disease` for `O B-Disease`), `O` for none."""
    for tag in tags:
        if tag != OUTSIDE:
            return tag[2:]
    return OUTSIDE
