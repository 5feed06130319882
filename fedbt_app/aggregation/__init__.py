"""How a round's deltas become one step: one file a rule or server optimiser, and tables by name.

A maker gets what stands behind `name:` in the setting, and the run's settings.
"""

from typing import Any

from fedbt_app.aggregation.base import Rule, ServerOptimizer
from fedbt_app.aggregation.mean import WeightedMean
from fedbt_app.aggregation.momentum import Momentum
from fedbt_app.choices import Choices, Maker, without_value


def _mean(settings: Any) -> Rule:
    return WeightedMean()


def _momentum(settings: Any) -> ServerOptimizer:
    return Momentum(settings.server_momentum)


RULES: Choices[Maker[Rule]] = Choices("aggregation", {"mean": without_value(_mean)})

OPTIMIZERS: Choices[Maker[ServerOptimizer]] = Choices(
    "server-optimizer", {"momentum": without_value(_momentum)}
)
