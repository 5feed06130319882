"""The central test set, and the global model's metrics on it."""

from functools import cached_property
from typing import Any

from fedbt_app.config import NO_DATA, RunConfig
from fedbt_app.data import examples
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.model.local_model import build
from fedbt_app.model.weights import Weights
from fedbt_app.plan import untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading
from fedbt_app.tasks.batch import Collator, special_tokens
from fedbt_app.tasks.fit import Fit
from fedbt_app.training import train


class CentralTest:
    """The rows that the server evaluates on; none where it has no data.

    Attributes
    ----------
    rows : tokenised examples
    available : rows of the test set, those included that `max-test-examples` left out
    fit : how well their text fits the model
    label_counts : rows (or tags) by label name
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._task = TASKS[config.task]
        self._device = pick_device(config.device)
        self.rows: list[dict[str, Any]] = []
        self.available = 0
        self.fit = Fit()
        self.label_counts: dict[str, int] = {}
        if config.dataset != NO_DATA:
            found = examples.test_data(config, checkpoint.tokenizer, checkpoint.tokenizer_id)
            self.rows = found.examples.to_list()
            self.available, self.fit = found.available, found.fit
            self.label_counts = self._task.label_counts([found.examples])

    @property
    def majority(self) -> float | None:
        """The score of always answering the most frequent label; None where there is none."""
        if not self.rows:
            return None
        return self._task.majority(self.label_counts)

    def evaluate(self, weights: Weights) -> dict[str, float]:
        """Return the metrics of the global model; none without a test set."""
        if not self.rows:
            return {}
        plan = untrained_plan(self._checkpoint.architecture.depth)
        bfloat16 = use_bfloat16(self._config.precision, self._device)
        local = build(weights, plan, self._device, bfloat16)
        collator = self._collator(weights.spec.labels)
        return train.evaluate(local, self.rows, collator, train.EVALUATION_BATCH).metrics()

    def _collator(self, labels: tuple[str, ...]) -> Collator:
        reading = Reading(self._tokens, labels, self._config.mask_probability)
        return Collator(self._task, reading)

    @cached_property
    def _tokens(self) -> Any:
        return special_tokens(self._checkpoint.tokenizer())
