"""What is trained: one file a task, and this table of them by name."""

from fedbt_app.choices import Choices
from fedbt_app.tasks.base import Task
from fedbt_app.tasks.classification import Classification
from fedbt_app.tasks.metrics import Metric
from fedbt_app.tasks.mlm import MaskedLanguageModelling
from fedbt_app.tasks.ner import NamedEntities

_ALL: tuple[Task, ...] = (MaskedLanguageModelling(), Classification(), NamedEntities())
TASKS: Choices[Task] = Choices("task", {task.name: task for task in _ALL})


def metric_named(name: str) -> Metric:
    """Return the metric of that name; one made of its name if no task here has it."""
    for task in TASKS.values():
        for metric in task.metrics:
            if metric.name == name:
                return metric
    # a newer report's
    return Metric(name, name.replace("_", " ").replace("f1", "F1"))
