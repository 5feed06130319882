"""Every metric: its name in reports and among people, which way is better, how it is written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number that says how good a model is.

    Attributes
    ----------
    name : the key in report.json
    label : what people call it
    share : whether it lies in [0, 1] and is shown as a percentage
    has_majority : whether always answering the most frequent class has such a score to compare with
    unit : behind the label of a picture's axis
    """

    name: str
    label: str
    lower_is_better: bool = False
    share: bool = True
    has_majority: bool = False
    unit: str = "%"


LOSS = Metric(
    "loss", "loss", lower_is_better=True, share=False, unit="nats per predicted word piece"
)
PERPLEXITY = Metric("perplexity", "perplexity", lower_is_better=True, share=False, unit="")
ACCURACY = Metric("accuracy", "accuracy", has_majority=True)
MACRO_F1 = Metric("macro_f1", "macro F1")
ENTITY_F1 = Metric("f1", "entity F1")
PRECISION = Metric("precision", "precision")
RECALL = Metric("recall", "recall")
