"""What is done to deltas so that they tell less: one file a mechanism, and a table of them.

None is there yet. They go by name; a maker gets what stands behind `name:` in the setting, and the
run's settings.
"""

from typing import Any

from fedbt_app.choices import Choices, Maker, made
from fedbt_app.privacy.base import Mechanism

MECHANISMS: Choices[Maker[Mechanism]] = Choices("privacy", {})


def mechanisms(settings: Any) -> list[Mechanism]:
    """Make the mechanisms that the setting `privacy` names, in order; normally none."""
    named = [text for text in settings.privacy.split(",") if text.strip()]
    return [made(MECHANISMS, text, settings) for text in named]
