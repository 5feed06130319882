"""The live view of `fedbt run` in a terminal, drawn from the lines that the server logs."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbt_app.progress.events import (
    BeforeTraining,
    Event,
    HeldOut,
    LeftOut,
    Metrics,
    Replied,
    RoundBegan,
    RoundDone,
    WentOn,
    read,
)

MOST_ROWS = 12  # of a round's replies, so that the view fits a terminal
COLUMNS = ("client", "loss", "examples", "TFLOP", "MB up", "seconds")


def progress(rounds: int, verbose: bool) -> AbstractContextManager[Callable[[str], None]]:
    """Return what shows a run's lines: a view in a terminal; one by one where something else reads,
    or with verbose.
    """
    if verbose or not sys.stdout.isatty() or Console().is_dumb_terminal:
        return nullcontext(lambda line: print(line, flush=True))
    return View(rounds)


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes
    ----------
    done : finished rounds, those before a resumption included
    round, asked, answers : the current round, how many clients were asked and what came of that
    tflop, mb_up, mb_down : of the finished rounds
    before, latest, held_out
        metrics before training, after the last round, on the clients' held-out rows
    seconds : of each round finished since the view began
    since : when the current round began, None before the first
    """

    rounds: int
    done: int = 0
    round: int = 0
    asked: int = 0
    answers: tuple[Replied | LeftOut, ...] = ()
    tflop: float = 0.0
    mb_up: float = 0.0
    mb_down: float = 0.0
    before: Metrics = field(default_factory=Metrics)
    latest: Metrics = field(default_factory=Metrics)
    held_out: Metrics = field(default_factory=Metrics)
    seconds: tuple[float, ...] = ()
    since: float | None = None

    def after(self, event: Event, now: float) -> "Standing":
        """Return the standing once `event` was told, at the time `now`."""
        match event:
            case WentOn():
                return replace(self, rounds=event.rounds, done=event.round)._plus(event)
            case BeforeTraining():
                return replace(self, before=event.metrics, latest=event.metrics)
            case RoundBegan():
                since = self.since if event.round == self.round else now  # a repeated round goes on
                return replace(
                    self,
                    rounds=event.rounds,
                    round=event.round,
                    asked=event.clients,
                    answers=(),
                    since=since,
                )
            case Replied() | LeftOut():
                return replace(self, answers=(*self.answers, event))
            case HeldOut():
                return replace(self, held_out=event.metrics)
            case RoundDone():
                seconds = (*self.seconds, event.seconds)
                done = replace(
                    self, done=event.round, latest=event.metrics, answers=(), seconds=seconds
                )
                return done._plus(event)
        return self

    def _plus(self, costs: WentOn | RoundDone) -> "Standing":
        return replace(
            self,
            tflop=self.tflop + costs.tflop,
            mb_up=self.mb_up + costs.mb_up,
            mb_down=self.mb_down + costs.mb_down,
        )

    @property
    def replies(self) -> list[Replied]:
        """The usable replies of the current round."""
        return [one for one in self.answers if isinstance(one, Replied)]

    def to_go(self, now: float) -> float | None:
        """Seconds until the last round is done, if those to come take what the others took; None
        before the first.
        """
        if self.done >= self.rounds or not self.seconds or self.since is None:
            return 0.0 if self.done >= self.rounds else None
        spent = now - self.since if self.round > self.done else 0.0
        mean = sum(self.seconds) / len(self.seconds)
        return max(0.0, mean - spent) + mean * (self.rounds - self.done - 1)


class View:
    """Shows a run's lines: what is drawn from them stays in place, all the others scroll by above
    it.
    """

    def __init__(
        self,
        rounds: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.standing = Standing(rounds)
        self._clock, self._begin, self._state = clock, clock(), "running"
        self._live = Live(
            console=console or Console(), get_renderable=self.render, refresh_per_second=2
        )

    def __enter__(self) -> "View":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._state = "stopped" if kind else "finished"
        # it never began: nothing to leave
        self._live.transient = self.standing == Standing(self.standing.rounds)
        self._live.stop()

    def __call__(self, line: str) -> None:
        """Take in a line of the run, without `fedbt: `."""
        # a client's words must not steer the terminal
        line = "".join(filter(str.isprintable, line))
        if event := read(line):
            self.standing = self.standing.after(event, self._clock())
        if not isinstance(event, RoundBegan | Replied):
            self._live.console.print(Text(line))

    def render(self) -> RenderableType:
        """Draw the standing."""
        now, standing = self._clock(), self.standing
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{standing.done} of {standing.rounds} rounds done", style="bold"),
            ProgressBar(standing.rounds, standing.done, width=24),
            Text(f"{_clock_time(now - self._begin)} elapsed"),
            Text(
                f"{_clock_time(standing.to_go(now))} to go"
                if self._state == "running"
                else self._state
            ),
        )
        replies = standing.replies
        costs = (
            f"{standing.tflop + sum(one.tflop for one in replies):,.2f} TFLOP, "
            f"{standing.mb_up + sum(one.mb_up for one in replies):,.2f} MB up, {standing.mb_down:,.2f} MB down"
        )
        lines = [Text(costs), *(Text(text) for text in _scores(standing))]
        if standing.round > standing.done:
            lines.append(
                Text(f"round {standing.round}: {len(replies)} of {standing.asked} clients replied")
            )
            return Group(head, *lines, _answers(standing.answers))
        return Group(head, *lines)


def _scores(standing: Standing) -> list[str]:
    before, lines = standing.before, []
    shown = [
        f"{name} {before[name]:.4f} -> {value:.4f}"
        if name in before and standing.done
        else f"{name} {value:.4f}"
        for name, value in standing.latest.items()
    ]
    if shown:
        lines.append(", ".join(shown))
    if standing.held_out:
        lines.append(f"on the clients' held-out rows: {standing.held_out}")
    return lines


def _answers(answers: tuple[Replied | LeftOut, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in COLUMNS:
        table.add_column(
            name, justify="left" if name == "client" else "right", no_wrap=True, overflow="ellipsis"
        )
    for one in answers[-MOST_ROWS:]:
        cells = ["left out"]
        if isinstance(one, Replied):
            amounts = (f"{one.tflop:,.2f}", f"{one.mb_up:,.2f}", f"{one.seconds:,.1f}")
            cells = [f"{one.loss:.4f}", f"{one.examples:,}", *amounts]
        table.add_row(Text(one.client), *map(Text, cells))
    return table


def _clock_time(seconds: float | None) -> str:
    """Write a duration: 1:02:03."""
    known = seconds is not None and math.isfinite(seconds)
    return str(timedelta(seconds=round(seconds or 0.0))) if known else "-:--:--"
