"""What carries it: one file a model family, and a table of them by config.json's `model_type`."""

from collections.abc import Iterable

from fedbt_app.encoders.base import Encoder
from fedbt_app.encoders.bert import Bert


def by_model_type(families: Iterable[Encoder]) -> dict[str, Encoder]:
    """Return the table of some families."""
    table: dict[str, Encoder] = {}
    for family in families:
        table |= dict.fromkeys(family.model_types, family)
    return table


ENCODERS = by_model_type([Bert()])
