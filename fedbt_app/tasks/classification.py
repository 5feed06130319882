"""Fine-tuning: one class a row."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import HeadKind
from fedbt_app.tasks.base import (
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
    checked_text,
    cut_at,
    in_batches,
    mean_loss,
)
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.labels import fractions_in, lists_in, names_of
from fedbt_app.tasks.metrics import ACCURACY, LOSS, MACRO_F1
from fedbt_app.tasks.notes import Notes, note_renamed
from fedbt_app.tasks.schedules import deepest_in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Classification(Task):
    """Name the class of a text."""

    name = "classification"
    head = HeadKind.SEQUENCE
    metrics = (ACCURACY, MACRO_F1, LOSS)
    pipeline = "text-classification"
    pipeline_options = ", truncation=True"
    columns = ("text_column", "label_column")
    label_key = "label_column"
    embedded_rows = "terms of one organ system"

    def prepared(self, settings: Settings, columns: Columns, notes: Notes) -> Columns:
        """Return the columns with labels by name; refuse those of other tasks."""
        name = settings.label_column
        cells = columns[name]
        if lists := lists_in(cells):
            raise FedBTError(
                f"column {name!r} holds lists of labels in {lists} of {len(cells)} rows: "
                "classification takes one label a row; name another column, or mend the rows"
            )
        known = {*self.given_labels(settings.label_names), *self.allowed(settings.allowed_names)}
        renames = settings.label_renames
        plain = names_of(cells, {*known, *renames})
        labels = [renames.get(label, label) for label in plain]
        note_renamed(notes, sum(map(operator.ne, plain, labels)))
        if not known and (fractions := fractions_in(labels)):
            raise FedBTError(
                f"column {name!r} holds fractions in {fractions} of {len(cells)} rows: classification "
                "takes classes, not scores; name another column, or, if they are codes of classes, "
                "list them in labels-allowed"
            )
        return columns | {name: labels}

    def given_labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names as those in the data are written."""
        return tuple(dict.fromkeys(names_of(names)))

    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        """Return the row's class."""
        if not checked_text(settings, row, where):
            return None
        label = row[settings.label_column]
        if not label:
            raise FedBTError(
                f"{where}: column {settings.label_column!r} has no label: fill it, or drop the row"
            )
        return (label,)

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        """Fit each text at `max_length` word pieces."""
        ids: list[list[int]] = []
        fit = Fit()
        for texts in in_batches(rows[settings.text_column]):
            for whole in tokenizer(texts, verbose=False)["input_ids"]:
                ids.append(cut_at(whole, settings.max_length))
                lost = len(whole) - len(ids[-1])
                fit += Fit(1, int(lost > 0), len(whole) - SPECIAL_PIECES, lost)
        return Tokenised({"input_ids": ids, "label": rows[settings.label_column]}, fit)

    def labels_in(self, split: Mapping[str, Any]) -> Iterable[str]:
        """Return the class of each example."""
        labels: Iterable[str] = split["label"]
        return labels

    def read(
        self,
        rows: Sequence[Row],
        ids: np.ndarray,
        present: np.ndarray,
        reading: Reading,
        generator: np.random.Generator,
    ) -> Read:
        """Read each row at its first piece."""
        targets = np.array([[reading.label_id(row["label"])] for row in rows], dtype=np.int64)
        return Read(ids, np.zeros((len(rows), 1), dtype=np.int64), targets)

    def full_positions(self, length: int, mask_probability: float) -> int:
        """Return one: the first piece."""
        return 1

    def tallied(self, pair: Pair, labels: tuple[str, ...]) -> Tally:
        """Count the example at its true and at its predicted class, and whether they are one."""
        (true,), (predicted,) = pair.true, pair.predicted
        return {
            f"true_{true}": 1,
            f"predicted_{predicted}": 1,
            f"hit_{true}": int(true == predicted),
        }

    def scored(self, tally: Mapping[str, float], labels: tuple[str, ...]) -> dict[str, float]:
        """Return loss, accuracy and the mean F1 of the classes that occur."""
        classes = [label for label in range(len(labels)) if tally.get(f"true_{label}")]
        hits = {label: tally.get(f"hit_{label}", 0) for label in classes}
        rows = sum(tally[f"true_{label}"] for label in classes)
        f1 = [
            2 * hits[label] / (tally[f"true_{label}"] + tally.get(f"predicted_{label}", 0))
            for label in classes
        ]
        return {
            "loss": mean_loss(tally),
            "accuracy": sum(hits.values()) / max(1, rows),
            "macro_f1": float(np.mean(f1)) if f1 else 0.0,
        }

    def majority(self, label_counts: Mapping[str, int]) -> float | None:
        """Return the accuracy of always answering the most frequent class."""
        most = max(label_counts.values(), default=0)
        total = sum(label_counts.values())
        return most / max(1, total)

    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        """Return the deepest 1, 2, .. blocks in turn."""
        return deepest_in_turn(num_rounds, depth)

    def measured(self, depth: int) -> str:
        """Return the deepest half in every round."""
        return ",".join(map(str, range(depth // 2, depth)))
