"""A new task costs one file and its line in the table: here a toy, which trains, reports, resumes and exports."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import AutoModelForTokenClassification

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.parts import HeadKind
from fedbt_app.report.comparison import compare
from fedbt_app.tasks import TASKS, metric_named
from fedbt_app.tasks.base import (
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
    mean_loss,
)
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.metrics import LOSS, Metric
from fedbt_app.wire.local_grid import LocalGrid, simulated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# -- the one file ------------------------------------------------------------------------------------------------

HITS = Metric("hits", "guessed pieces")


class LongWords(Task):
    """Say of every word piece whether its word has more than five letters: needs no labels from anybody."""

    name = "long-words"
    head = HeadKind.TOKEN
    metrics = (HITS, LOSS)
    pipeline = "token-classification"
    columns = ("text_column",)
    label_key = "label_column"

    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        return ("long", "short") if checked_text(settings, row, where) else None

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        texts = rows[settings.text_column]
        coded = tokenizer(texts, truncation=True, max_length=settings.max_length)
        sizes = [[len(tokenizer.decode([piece])) for piece in ids] for ids in coded["input_ids"]]
        return Tokenised({"input_ids": coded["input_ids"], "sizes": sizes}, Fit(rows=len(texts)))

    def labels_in(self, split: Mapping[str, Any]) -> Sequence[str]:
        return ["long" if size > 5 else "short" for sizes in split["sizes"] for size in sizes]

    def read(
        self,
        rows: Sequence[Row],
        ids: np.ndarray,
        present: np.ndarray,
        reading: Reading,
        rng: np.random.Generator,
    ) -> Read:
        targets = [
            [reading.label_id("long" if size > 5 else "short") for size in row["sizes"][:3]]
            for row in rows
        ]
        return Read(ids, np.tile(np.arange(3), (len(rows), 1)), np.array(targets, dtype=np.int64))

    def full_positions(self, length: int, mask_probability: float) -> int:
        return 3

    def tallied(self, pair: Pair, labels: tuple[str, ...]) -> Tally:
        return {
            "hits": sum(
                true == guess for true, guess in zip(pair.true, pair.predicted, strict=True)
            )
        }

    def scored(self, tally: Mapping[str, float], labels: tuple[str, ...]) -> dict[str, float]:
        return {"loss": mean_loss(tally), "hits": tally["hits"] / tally["positions"]}

    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        return [(depth - 1,)] * num_rounds


# -- what it gets for that -------------------------------------------------------------------------------------------


def test_a_toy_task_trains_reports_and_exports(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "long-words", LongWords())
    values = settings(task="long-words", max_train_examples=40, num_rounds=2, learning_rate=5e-3)
    report = server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))
    assert report["labels"] == ["long", "short"]
    assert report["rounds"][0]["trained_blocks"] == [3]
    assert report["final"]["hits"] > max(0.6, report["initial"]["hits"])
    folder = Path(values["output-dir"])
    assert "guessed pieces" in (folder / "report.md").read_text()
    assert (folder / "metric.png").stat().st_size > 0
    assert "long-words" in compare([folder])
    assert "pipeline_tag: token-classification" in (folder / "model" / "README.md").read_text()
    assert AutoModelForTokenClassification.from_pretrained(folder / "model").config.id2label == {
        0: "long",
        1: "short",
    }
    assert metric_named("hits") is HITS
