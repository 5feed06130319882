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
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.metrics import ACCURACY, LOSS, PERPLEXITY
from fedbt_app.tasks.schedules import shallow_progressive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_TAIL = 8  # word pieces that make the last, short chunk worth keeping
MASKED = 0.8  # of the chosen pieces become [MASK]
REPLACED = 0.1  # of them become a random piece; the rest stays


class MaskedLanguageModelling(Task):
    """Predict 15 % of the word pieces from the others, on chunks of joined text."""

    name = "mlm"
    head = HeadKind.MASKED_LM
    metrics = (LOSS, PERPLEXITY, ACCURACY)
    pipeline = "fill-mask"
    pipeline_options = ', tokenizer_kwargs={"truncation": True}'
    columns = ("text_column",)
    embedded_rows = "all terms"
    draws_deeper_blocks = True

    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        """Return no labels; None for a row without text."""
        if not checked_text(settings, row, where):
            return None
        return ()

    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        """Join all texts with [SEP] and cut them into chunks of `max_length`, [CLS] and [SEP]
        around each.
        """
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        body = settings.max_length - 2
        stream = array("i")  # of millions of pieces: far smaller than a list
        for texts in in_batches(rows[settings.text_column]):
            coded = tokenizer(texts, add_special_tokens=False, verbose=False)
            for pieces in coded["input_ids"]:
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
        if settings.masking != "static":
            return 0
        return settings.static_maskings

    def fixed(self, rows: Sequence[Row], reading: Reading, seed: Sequence[int]) -> Sequence[Row]:
        """Give each row one masking for good, so that what frozen blocks make of it can be kept."""
        generator = np.random.default_rng(seed)
        masked = []
        for row in rows:
            ids = np.array([row["input_ids"]], dtype=np.int64)
            present = np.ones_like(ids, dtype=bool)
            read = self.read([row], ids, present, reading, generator)
            masked_row = {
                "input_ids": read.ids[0].tolist(),
                "positions": read.positions[0].tolist(),
                "targets": read.targets[0].tolist(),
            }
            masked.append(masked_row)
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
        order, chosen = _choose(candidates, reading.mask_probability, generator)
        positions = np.where(chosen, order, 0)
        true = np.take_along_axis(ids, positions, axis=1)
        targets = np.where(chosen, true, IGNORED)
        _hide(ids, positions, chosen, reading, generator)
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


def _choose(
    candidates: np.ndarray, probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (B, P) and which of them are chosen: a share of each row's candidates."""
    wanted = np.round(candidates.sum(axis=1) * probability).astype(int)
    wanted = np.maximum(1, wanted)
    most = wanted.max()
    # The candidates with the lowest random scores are chosen; 2 is above every score.
    scores = np.where(candidates, generator.random(candidates.shape), 2.0)
    order = np.argsort(scores, axis=1)[:, :most]
    is_candidate = np.take_along_axis(scores, order, axis=1) < 2.0
    is_wanted = np.arange(most) < wanted[:, None]
    return order, is_wanted & is_candidate


def _hide(
    ids: np.ndarray,
    positions: np.ndarray,
    chosen: np.ndarray,
    reading: Reading,
    generator: np.random.Generator,
) -> None:
    """Put [MASK] or a random piece in the place of most chosen pieces of `ids`."""
    fate = generator.random(positions.shape)
    masked = chosen & (fate < MASKED)
    replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
    row_of = np.broadcast_to(np.arange(len(ids))[:, None], positions.shape)
    ids[row_of[masked], positions[masked]] = reading.tokens.mask
    random_pieces = generator.integers(0, reading.tokens.vocabulary, replaced.sum())
    ids[row_of[replaced], positions[replaced]] = random_pieces


def _already_masked(rows: Sequence[Row], ids: np.ndarray) -> Read:
    """Take the masking that each row has for good."""
    shape = (len(rows), max(len(row["positions"]) for row in rows))
    positions = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        count = len(row["positions"])
        positions[index, :count] = row["positions"]
        targets[index, :count] = row["targets"]
    return Read(ids, positions, targets)
