"""What carries it: one file a model family, and this table of them by config.json's
`model_type`.
"""

from collections.abc import Iterable

from fedbt_app.encoders.base import Encoder
from fedbt_app.encoders.bert import Bert


def by_model_type(families: Iterable[Encoder]) -> dict[str, Encoder]:
    """Return the table of some families."""
    return {model_type: family for family in families for model_type in family.model_types}


ENCODERS = by_model_type([Bert()])
