"""Fine-tuning: named-entity recognition, a BIO tag for each word."""

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import HeadKind
from fedbt_app.tasks.base import (
    IGNORED,
    SPECIAL_PIECES,
    Blocks,
    Columns,
    Pair,
    Read,
    Reading,
    Row,
    Settings,
    Tally,
    Task,
    Tokenised,
    cut_at,
    in_batches,
    mean_loss,
    padded,
)
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.labels import clean
from fedbt_app.tasks.metrics import ENTITY_F1, LOSS, PRECISION, RECALL
from fedbt_app.tasks.notes import Notes, note_renamed
from fedbt_app.tasks.schedules import deepest_in_turn
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
        rows = [_cleaned(tags) for tags in columns[name]]
        tags = normalised(rows, settings.label_names, name, notes)
        renamed = [_renamed(row, settings.label_renames) for row in tags]
        note_renamed(notes, sum(map(_changed, tags, renamed)))
        return columns | {name: renamed}

    def given_labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tags as BIO, whatever scheme they were given in."""
        return bio_names(names)

    def allowed(self, names: tuple[str, ...]) -> frozenset[str]:
        """Return entity types: the names, and those of names that are tags."""
        return frozenset(names) | {name[2:] for name in names if _BIO.fullmatch(name)}

    def plain_name(self, label: str) -> str:
        """Return the entity type of a tag; nothing for `O`."""
        return label[2:]

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
        if not any(token.strip() for token in tokens):
            return None
        return tags

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        """Give the first piece of each word the word's tag, and every other piece an empty one.

        An example has `tags`, one a piece, and, so that the gold standard keeps what does not fit
        or has no piece, `gold`, one a word, and `words`, the number of the word behind each tag.
        """
        made: Columns = {
            "input_ids": [],
            "tags": [],
            "gold": rows[settings.tags_column],
            "words": [],
        }
        fit = Fit()
        gold = iter(rows[settings.tags_column])
        for sentences in in_batches(rows[settings.tokens_column]):
            coded = tokenizer(sentences, is_split_into_words=True, verbose=False)
            for row, whole in enumerate(coded["input_ids"]):
                ids = cut_at(whole, settings.max_length)
                word_tags = next(gold)
                word_of = [*coded.word_ids(row)[: len(ids) - 1], None]  # the last one is [SEP]
                tags, words = _first_pieces(word_of, word_tags)
                made["input_ids"].append(ids)
                made["tags"].append(tags)
                made["words"].append(words)
                fit += _fit(len(whole), len(ids), word_tags, words)
        return Tokenised(made, fit)

    def labels_in(self, split: Mapping[str, Any]) -> Iterable[str]:
        """Return the tag of each word, of those beyond `max_length`, too."""
        return (tag for tags in split["gold"] for tag in tags)

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

    def tallied(self, pair: Pair, labels: tuple[str, ...]) -> Tally:
        """Count true, predicted and correct entities by type; words that are not read count as `O`
        of the prediction.
        """
        from seqeval.metrics.sequence_labeling import get_entities

        predicted = [OUTSIDE] * len(pair.row["gold"])
        for word, label in zip(pair.row["words"], pair.predicted, strict=True):
            predicted[word] = labels[label]
        gold = set(get_entities(pair.row["gold"]))
        found = set(get_entities(predicted))
        numbers = _numbers(labels)
        tally: Counter[str] = Counter()
        for counted, entities in (("true", gold), ("predicted", found), ("correct", gold & found)):
            tally.update(f"{counted}_{numbers[kind]}" for kind, _, _ in entities)
        return tally

    def scored(self, tally: Mapping[str, float], labels: tuple[str, ...]) -> dict[str, float]:
        """Return loss and entity scores, as seqeval has them over all types together."""
        true, predicted, correct = (
            _total(tally, name) for name in ("true", "predicted", "correct")
        )
        precision = correct / predicted if predicted else 0.0
        recall = correct / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
        return {"loss": mean_loss(tally), "f1": f1, "precision": precision, "recall": recall}

    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        """Return the deepest 1, 2, .. blocks in turn."""
        return deepest_in_turn(num_rounds, depth)

    def measured(self, depth: int) -> str:
        """Return the first, the middle and the last block in every round."""
        return f"0,{(depth - 1) // 2},-1"


def _cleaned(tags: Any) -> Any:
    """Return a row's tags without blanks around them and in composed Unicode; what is no list, as
    it is.
    """
    if not isinstance(tags, list):
        return tags
    return [clean(tag) if isinstance(tag, str) else tag for tag in tags]


def _renamed(tags: Any, renames: Mapping[str, str]) -> Any:
    """Return a row's tags with other entity types; a type that is renamed `O` is none."""
    if not renames or not isinstance(tags, list):
        return tags
    made = []
    for tag in tags:
        new = renames.get(tag[2:]) if isinstance(tag, str) else None
        if new is None:
            made.append(tag)
        else:
            made.append(OUTSIDE if new == OUTSIDE else tag[:2] + new)
    return made


def _changed(tags: Any, renamed: Any) -> int:
    """Count the tags of a row that are written otherwise."""
    if not isinstance(tags, list):
        return 0
    return sum(map(operator.ne, tags, renamed))


def _tagged(tags: Iterable[str]) -> dict[int, str]:
    """Return the tags by their position, without the empty ones."""
    return {position: tag for position, tag in enumerate(tags) if tag}


def first_entity(tags: Iterable[str]) -> str:
    """Return the first entity type among BIO tags (`Disease` for `O B-Disease`), else `O`."""
    return next((tag[2:] for tag in tags if tag != OUTSIDE), OUTSIDE)


def _first_pieces(
    word_of: Sequence[int | None], word_tags: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Return each piece's tag, empty but at a word's first one, and the numbers of those words."""
    tags: list[str] = []
    words: list[int] = []
    for word in word_of:
        if word is None or (words and word <= words[-1]):
            tags.append("")
        else:
            tags.append(word_tags[word])
            words.append(word)
    return tags, words


def _fit(pieces: int, kept: int, word_tags: Sequence[str], words: Sequence[int]) -> Fit:
    labelled = sum(tag != OUTSIDE for tag in word_tags)
    read = sum(word_tags[word] != OUTSIDE for word in words)
    return Fit(
        1, int(pieces > kept), pieces - SPECIAL_PIECES, pieces - kept, labelled, labelled - read
    )


@cache  # asked for every row
def _numbers(labels: tuple[str, ...]) -> dict[str, int]:
    """Number the entity types of a label set: names need not leave a site."""
    kinds = sorted({label[2:] for label in labels if label != OUTSIDE})
    return {kind: number for number, kind in enumerate(kinds)}


def _total(tally: Mapping[str, float], counted: str) -> float:
    return sum(count for name, count in tally.items() if name.startswith(f"{counted}_"))
