"""Further pre-training: masked-language modelling (Devlin et al., 2019, section 3.1)."""

import math
import operator
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedbt_app.parts import HeadKind
from fedbt_app.tasks.base import (
    IGNORED,
    Blocks,
    Columns,
    Fit,
    Pair,
    Read,
    Reading,
    Row,
    Settings,
    Tally,
    Task,
    Tokenised,
    checked_text,
    in_batches,
    mean_loss,
)
from fedbt_app.tasks.metrics import ACCURACY, LOSS, PERPLEXITY
from fedbt_app.tasks.schedules import shallow_progressive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_TAIL = 8  # word pieces that make the last, short chunk worth keeping
# of the chosen pieces: become [MASK], become a random piece; the rest stays
MASKED, REPLACED = 0.8, 0.1


class MaskedLanguageModelling(Task):
    """Predict 15 % of the word pieces from the others, on chunks of joined text."""

    name = "mlm"
    head = HeadKind.MASKED_LM
    metrics = (LOSS, PERPLEXITY, ACCURACY)
    pipeline = "fill-mask"
    columns = ("text_column",)
    embedded_rows = "all terms"
    draws_deeper_blocks = True

    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        """Return no labels; None for a row without text."""
        return () if checked_text(settings, row, where) else None

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        """Join all texts with [SEP] and cut them into chunks of `max_length`, [CLS] and [SEP]
        around each.
        """
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        body = settings.max_length - 2
        stream = array("i")
        for texts in in_batches(rows[settings.text_column]):
            for pieces in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                if stream and pieces:
                    stream.append(last)
                stream.extend(pieces)
        chunks = [stream[start : start + body].tolist() for start in range(0, len(stream), body)]
        dropped = 0
        if chunks and len(chunks[-1]) < min(MIN_TAIL, body):
            dropped = len(chunks.pop())
        texts_read = len(rows[settings.text_column])
        fit = Fit(
            rows=texts_read, rows_cut=int(dropped > 0), pieces=len(stream), pieces_cut=dropped
        )
        return Tokenised({"input_ids": [[first, *chunk, last] for chunk in chunks]}, fit)

    def versions(self, settings: Settings) -> int:
        """Return the number of fixed maskings; 0 where each epoch masks anew."""
        return settings.static_maskings if settings.masking == "static" else 0

    def fixed(self, rows: Sequence[Row], reading: Reading, seed: Sequence[int]) -> Sequence[Row]:
        """Give each row one masking for good, so that what frozen blocks make of it can be kept."""
        generator = np.random.default_rng(seed)
        masked = []
        for row in rows:
            ids = np.array([row["input_ids"]], dtype=np.int64)
            read = self.read([row], ids, np.ones_like(ids, dtype=bool), reading, generator)
            values = {"input_ids": read.ids, "positions": read.positions, "targets": read.targets}
            masked.append({name: value[0].tolist() for name, value in values.items()})
        return masked

    def read(
        self,
        rows: Sequence[Row],
        ids: np.ndarray,
        present: np.ndarray,
        reading: Reading,
        generator: np.random.Generator,
    ) -> Read:
        """Mask the rows anew, unless `fixed` has."""
        if "positions" in rows[0]:
            return _already_masked(rows, ids)
        candidates = present & ~np.isin(ids, reading.tokens.special)
        wanted = np.maximum(
            1, np.round(candidates.sum(axis=1) * reading.mask_probability).astype(int)
        )
        # The candidates with the lowest random scores are chosen; 2 is above every score.
        scores = np.where(candidates, generator.random(ids.shape), 2.0)
        order = np.argsort(scores, axis=1)[:, : wanted.max()]
        chosen = (np.arange(wanted.max()) < wanted[:, None]) & (
            np.take_along_axis(scores, order, axis=1) < 2.0
        )
        positions = np.where(chosen, order, 0)
        targets = np.where(chosen, np.take_along_axis(ids, positions, axis=1), IGNORED)
        fate = generator.random(positions.shape)
        masked = chosen & (fate < MASKED)
        replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
        row_of = np.broadcast_to(np.arange(len(ids))[:, None], positions.shape)
        ids[row_of[masked], positions[masked]] = reading.tokens.mask
        random_pieces = generator.integers(0, reading.tokens.vocabulary, replaced.sum())
        ids[row_of[replaced], positions[replaced]] = random_pieces
        return Read(ids, positions, targets)

    def full_positions(self, length: int, mask_probability: float) -> int:
        """Return the share that is predicted of all but [CLS] and [SEP]."""
        return math.ceil(mask_probability * (length - 2))

    def tallied(self, pair: Pair, labels: tuple[str, ...]) -> Tally:
        """Count the pieces that were guessed."""
        return {"hits": sum(map(operator.eq, pair.true, pair.predicted))}

    def scored(self, tally: Mapping[str, float], labels: tuple[str, ...]) -> dict[str, float]:
        """Return loss, perplexity and the share of pieces that were guessed."""
        loss = mean_loss(tally)
        accuracy = tally.get("hits", 0) / max(1, tally.get("positions", 0))
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": accuracy}

    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        """Return one shallow block a round."""
        return [(block,) for block in shallow_progressive(num_rounds, local_depth)]


def _already_masked(rows: Sequence[Row], ids: np.ndarray) -> Read:
    """Take the masking that each row has for good."""
    width = max(len(row["positions"]) for row in rows)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        positions[index, : len(row["positions"])] = row["positions"]
        targets[index, : len(row["targets"])] = row["targets"]
    return Read(ids, positions, targets)
