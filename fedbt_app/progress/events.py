"""The lines by which a run tells how far it is. One template a line both writes and reads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from string import Formatter
from typing import Any, ClassVar

NUMBER = r"-?(?:\d+\.\d+|inf|nan)"


class Metrics(dict[str, float]):
    """Metrics by name, which read `loss 1.2345, accuracy 0.8200`."""

    def __str__(self) -> str:
        if not self:
            return "no central test set"
        return ", ".join(f"{name} {value:.4f}" for name, value in self.items())

    @classmethod
    def read(cls, text: str) -> "Metrics":
        """Take apart what `str` wrote."""
        pairs = re.findall(rf"(\S+) ({NUMBER})", text)
        return cls({name: float(value) for name, value in pairs})


class Blocks(tuple[int, ...]):
    """Numbers of encoder blocks, which read `[0, 3]`, or `none`."""

    def __str__(self) -> str:
        if not self:
            return "none"
        return str(list(self))

    @classmethod
    def read(cls, text: str) -> "Blocks":
        """Take apart what `str` wrote."""
        return cls(map(int, re.findall(r"\d+", text)))


# By a field's type: what its value looks like in a line, and what turns that into the value again.
_KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: (r"\d{1,18}", int),
    float: (NUMBER, float),
    str: (".*?", str),
    Metrics: (".+?", Metrics.read),
    Blocks: (r"\[[\d, ]+\]|none", Blocks.read),
}


@dataclass(frozen=True)
class Event:
    """Something that the server logs, behind `fedbt: `: `str` writes the line, `read` reads it."""

    template: ClassVar[str]

    def __str__(self) -> str:
        return self.template.format_map(vars(self))


@dataclass(frozen=True)
class WentOn(Event):
    """A stopped run was resumed; the costs are those of all its rounds so far."""

    template = (
        "goes on after round {round}/{rounds}: {tflop:.2f} TFLOP, {mb_up:.2f} MB up, "
        "{mb_down:.2f} MB down until then"
    )
    round: int
    rounds: int
    tflop: float
    mb_up: float
    mb_down: float


@dataclass(frozen=True)
class BeforeTraining(Event):
    """What the model scores on the central test set before the first round."""

    template = "before training: {metrics}"
    metrics: Metrics


@dataclass(frozen=True)
class RoundBegan(Event):
    """Clients were asked to train."""

    template = "round {round}/{rounds}: {clients} clients"
    round: int
    rounds: int
    clients: int


@dataclass(frozen=True)
class Replied(Event):
    """A client's usable reply."""

    template = (
        "round {round}/{rounds}: {client}: loss {loss:.4f}, {examples} examples, {tflop:.2f} TFLOP, {mb_up:.2f} MB up, "
        "{seconds:.1f} s"
    )
    round: int
    rounds: int
    client: str
    loss: float
    examples: int
    tflop: float
    mb_up: float
    seconds: float


@dataclass(frozen=True)
class LeftOut(Event):
    """A client, or a reply of its, that was not used."""

    template = "round {round}: {client} is left out: {reason}"
    round: int
    client: str
    reason: str


@dataclass(frozen=True)
class HeldOut(Event):
    """What the model scores on the clients' own held-out rows."""

    template = "on {examples} held-out rows at the clients: {metrics}"
    examples: int
    metrics: Metrics


@dataclass(frozen=True)
class RoundDone(Event):
    """A finished round: its scores and what the books say that it cost."""

    template = (
        "round {round}/{rounds} done in {seconds:.1f} s: blocks {blocks}, {metrics}, {mb_up:.2f} MB up, "
        "{mb_down:.2f} MB down, {tflop:.2f} TFLOP"
    )
    round: int
    rounds: int
    seconds: float
    blocks: Blocks
    metrics: Metrics
    mb_up: float
    mb_down: float
    tflop: float


def read(line: str) -> Event | None:
    """Return the event that a line (without `fedbt: `) tells of; None for any other line."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(line):
            return kind(**_values(kind, found))
    return None


def _values(kind: type[Event], found: re.Match[str]) -> dict[str, Any]:
    values = {}
    for spec in fields(kind):
        _, value_of = _KINDS[spec.type]
        values[spec.name] = value_of(found[spec.name])
    return values


def _pattern(kind: type[Event]) -> re.Pattern[str]:
    """Turn a template into what its lines match, with a group for each field."""
    types = {spec.name: spec.type for spec in fields(kind)}
    pattern = ""
    for literal, name, _, _ in Formatter().parse(kind.template):
        pattern += re.escape(literal)
        if name:  # None behind the last field
            value_pattern, _ = _KINDS[types[name]]
            pattern += f"(?P<{name}>{value_pattern})"
    return re.compile(pattern)


_ALL = (WentOn, BeforeTraining, RoundBegan, Replied, LeftOut, HeldOut, RoundDone)
_PATTERNS = {kind: _pattern(kind) for kind in _ALL}
