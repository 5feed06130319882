"""A table of what a setting may name; a name that is not in it raises wherever it is asked for."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedbt_app.errors import FedBTError

Thing = TypeVar("Thing")
Maker = Callable[[str, Any], Thing]  # the text behind `name:`, and the run's settings


class Choices(dict[str, Thing]):
    """Things by name; `setting` names the table in errors."""

    def __init__(self, setting: str, things: Mapping[str, Thing]) -> None:
        super().__init__(things)
        self.setting = setting

    def __missing__(self, name: str) -> Thing:
        known = ", ".join(self) or "(there are none)"
        raise FedBTError(f"{self.setting}={name} is not one of {known}")


class TakesNoValue(ValueError):
    """Raised by a maker for a value behind a name that takes none."""


def without_value(make: Callable[[Any], Thing]) -> Maker[Thing]:
    """Return the maker of something that takes no value behind its name."""

    def maker(value: str, settings: Any) -> Thing:
        if value:
            raise TakesNoValue
        return make(settings)

    return maker


def made(makers: Choices[Maker[Thing]], text: str, settings: Any) -> Thing:
    """Make what `name` or `name:value` stands for.

    Raises
    ------
    FedBTError
        When there is no such name, or it takes no value, or not this one.
    """
    name, _, value = text.strip().partition(":")
    try:
        return makers[name](value, settings)
    except TakesNoValue:
        raise FedBTError(
            f"{makers.setting}={text}: {name} takes no value, write {name} alone"
        ) from None
    except ValueError:
        raise FedBTError(
            f"{makers.setting}={text}: {name} takes a number, write for example {name}:0.5"
        ) from None
