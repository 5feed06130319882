"""How a round's deltas become one step: one file a rule or server optimiser, and these tables of
them by name.

A maker gets what stands behind `name:` in the setting, and the run's settings.
"""

from fedbt_app.aggregation.base import Rule, ServerOptimizer
from fedbt_app.aggregation.mean import WeightedMean
from fedbt_app.aggregation.momentum import Momentum
from fedbt_app.choices import Choices, Maker

RULES: Choices[Maker[Rule]] = Choices(
    "aggregation", {"mean": lambda value, settings: WeightedMean()}
)

OPTIMIZERS: Choices[Maker[ServerOptimizer]] = Choices(
    "server-optimizer",
    {"momentum": lambda value, settings: Momentum(float(value or settings.server_momentum))},
)
