"""What is trained: one file a task, and this table of them by name."""

from fedbt_app.choices import Choices
from fedbt_app.tasks.base import Task
from fedbt_app.tasks.classification import Classification
from fedbt_app.tasks.metrics import Metric
from fedbt_app.tasks.mlm import MaskedLanguageModelling
from fedbt_app.tasks.ner import NamedEntities

TASKS: Choices[Task] = Choices(
    "task",
    {task.name: task for task in (MaskedLanguageModelling(), Classification(), NamedEntities())},
)


def metric_named(name: str) -> Metric:
    """Return the metric of that name; one made of its name where no task here has it (a newer
    report's).
    """
    for task in TASKS.values():
        for metric in task.metrics:
            if metric.name == name:
                return metric
    return Metric(name, name.replace("_", " ").replace("f1", "F1"))
