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
from fedbt_app.tasks.notes import Notes
from fedbt_app.tasks.schedules import cyclic_decreasing
from fedbt_app.tasks.tag_schemes import OUTSIDE, bio_names, normalised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BIO = re.compile(r"O|[BI]-.+")


class NamedEntities(Task):
    """Tag the words of entities; word pieces after the first of a word carry no tag."""

    name = "ner"
    head = HeadKind.TOKEN
    metrics = (ENTITY_F1, PRECISION, RECALL, LOSS)
    pipeline = "token-classification"
    columns = ("tokens_column", "tags_column")
    label_key = "tags_column"

    def prepared(self, settings: Settings, columns: Columns, notes: Notes) -> Columns:
        """Return the columns with tags of any known scheme as BIO."""
        name = settings.tags_column
        tags = normalised(columns[name], settings.label_names, name, notes)
        return columns | {name: list(tags)}

    def given_labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tags as BIO, whatever scheme they were given in."""
        return bio_names(names)

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
                    "set tags-column, or write the tags of one scheme (docs/data.md)"
                )
        return tags if any(token.strip() for token in tokens) else None

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Columns:
        """Give the first piece of each word the word's tag, and every other piece an empty one."""
        made: Columns = {"input_ids": [], "tags": []}
        tags = iter(rows[settings.tags_column])
        for words in in_batches(rows[settings.tokens_column]):
            coded = tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=settings.max_length
            )
            made["input_ids"] += coded["input_ids"]
            for row in range(len(words)):
                left = dict(enumerate(next(tags)))
                made["tags"].append(
                    ["" if word is None else left.pop(word, "") for word in coded.word_ids(row)]
                )
        return made

    def labels_in(self, split: Mapping[str, Any]) -> Iterable[str]:
        """Return the tag of each word."""
        return (tag for tags in split["tags"] for tag in tags if tag)

    def merged_labels(self, reported: Iterable[Iterable[str]]) -> tuple[str, ...]:
        """Merge the tags; every entity type gets both its B- and its I- tag."""
        types = {name[2:] for names in reported for name in names if name != OUTSIDE}
        return tuple(sorted({OUTSIDE} | {f"{prefix}-{kind}" for kind in types for prefix in "BI"}))

    def skew_by(
        self, settings: Settings, columns: Mapping[str, Sequence[Any]]
    ) -> Sequence[Any] | None:
        """Return each row's label, where there is such a column, else the type of its
        first entity.
        """
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
        tagged = [
            [(at, reading.label_id(tag)) for at, tag in enumerate(row["tags"]) if tag]
            for row in rows
        ]
        width = padded(max(1, *map(len, tagged)))
        positions = np.zeros((len(rows), width), dtype=np.int64)
        targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for index, pairs in enumerate(tagged):
            if pairs:
                positions[index, : len(pairs)], targets[index, : len(pairs)] = np.array(pairs).T
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
        true = [[labels[label] for label in pair.true] for pair in pairs]
        predicted = [[labels[label] for label in pair.predicted] for pair in pairs]
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


def first_entity(tags: Iterable[str]) -> str:
    """Return the first entity type among BIO tags (`Disease` for `O B-Disease`), or `O` where there
    is none.
    """
    return next((tag[2:] for tag in tags if tag != OUTSIDE), OUTSIDE)
