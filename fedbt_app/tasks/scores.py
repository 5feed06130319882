"""From predictions to counts, which add up over sites, and from those to metrics."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedbt_app.tasks.base import IGNORED, Pair, Row, Task

if TYPE_CHECKING:
    import torch


class Scores:
    """Counts predictions over batches, and turns the counts into the task's metrics."""

    def __init__(self, task: Task, labels: tuple[str, ...] = ()) -> None:
        self._task, self._labels = task, labels
        self._sums: Counter[str] = Counter({"loss": 0, "positions": 0})

    def add(self, outputs: "torch.Tensor", targets: "torch.Tensor", rows: Sequence[Row]) -> None:
        """Add one batch: outputs (B, P, classes), targets (B, P), and the B examples."""
        kept = targets != IGNORED
        loss = self._task.loss(outputs[kept][None], targets[kept][None], reduction="sum")
        self._sums.update({"loss": float(loss), "positions": int(kept.sum())})
        predicted = outputs.argmax(dim=-1)
        for index, row in enumerate(rows):
            read = kept[index]
            pair = Pair(targets[index][read].tolist(), predicted[index][read].tolist(), row)
            self._sums.update(self._task.tallied(pair, self._labels))

    @property
    def tally(self) -> dict[str, float]:
        """The sums of all that was counted: they may leave a site, and add up over sites."""
        return dict(self._sums)

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all that was added."""
        return self._task.scored(self.tally, self._labels)
