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
    """Return what shows a run's lines: a view in a terminal, else (or with verbose) one by one."""
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
                return self._at_the_start_of(event, now)
            case Replied() | LeftOut():
                return replace(self, answers=(*self.answers, event))
            case HeldOut():
                return replace(self, held_out=event.metrics)
            case RoundDone():
                return self._at_the_end_of(event)
        return self

    def _at_the_start_of(self, event: RoundBegan, now: float) -> "Standing":
        since: float | None = now
        if event.round == self.round:  # it is repeated, and so goes on
            since = self.since
        return replace(
            self,
            rounds=event.rounds,
            round=event.round,
            asked=event.clients,
            answers=(),
            since=since,
        )

    def _at_the_end_of(self, event: RoundDone) -> "Standing":
        done = replace(
            self,
            done=event.round,
            latest=event.metrics,
            answers=(),
            seconds=(*self.seconds, event.seconds),
        )
        return done._plus(event)

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
        return [answer for answer in self.answers if isinstance(answer, Replied)]

    def to_go(self, now: float) -> float | None:
        """Seconds to the end, if a round takes what the others took; None before the first."""
        if self.done >= self.rounds:
            return 0.0
        if not self.seconds or self.since is None:
            return None
        spent = 0.0
        if self.round > self.done:
            spent = now - self.since
        mean = sum(self.seconds) / len(self.seconds)
        return max(0.0, mean - spent) + mean * (self.rounds - self.done - 1)


class View:
    """Shows a run's lines: what is drawn from them stays in place, the others scroll by above."""

    def __init__(
        self,
        rounds: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.standing = Standing(rounds)
        self._clock = clock
        self._begin = clock()
        self._state = "running"
        self._live = Live(
            console=console or Console(), get_renderable=self.render, refresh_per_second=2
        )

    def __enter__(self) -> "View":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._state = "finished"
        if kind:
            self._state = "stopped"
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
        standing = self.standing
        texts = [_costs(standing), *_scores(standing)]
        if standing.round <= standing.done:
            return Group(self._head(), *map(Text, texts))
        replied = len(standing.replies)
        texts.append(f"round {standing.round}: {replied} of {standing.asked} clients replied")
        return Group(self._head(), *map(Text, texts), _answers(standing.answers))

    def _head(self) -> Table:
        now = self._clock()
        standing = self.standing
        end = self._state
        if self._state == "running":
            end = f"{_clock_time(standing.to_go(now))} to go"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{standing.done} of {standing.rounds} rounds done", style="bold"),
            ProgressBar(standing.rounds, standing.done, width=24),
            Text(f"{_clock_time(now - self._begin)} elapsed"),
            Text(end),
        )
        return head


def _costs(standing: Standing) -> str:
    """Say what was spent so far; the finished rounds do not include the current one's replies."""
    replies = standing.replies
    tflop = standing.tflop + sum(reply.tflop for reply in replies)
    mb_up = standing.mb_up + sum(reply.mb_up for reply in replies)
    return f"{tflop:,.2f} TFLOP, {mb_up:,.2f} MB up, {standing.mb_down:,.2f} MB down"


def _scores(standing: Standing) -> list[str]:
    lines = []
    before = standing.before
    shown = []
    for name, value in standing.latest.items():
        text = f"{value:.4f}"
        if name in before and standing.done:
            text = f"{before[name]:.4f} -> {text}"
        shown.append(f"{name} {text}")
    if shown:
        lines.append(", ".join(shown))
    if standing.held_out:
        lines.append(f"on the clients' held-out rows: {standing.held_out}")
    return lines


def _answers(answers: tuple[Replied | LeftOut, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
    table.columns[0].justify = "left"
    for answer in answers[-MOST_ROWS:]:
        cells = ["left out"]
        if isinstance(answer, Replied):
            cells = [
                f"{answer.loss:.4f}",
                f"{answer.examples:,}",
                f"{answer.tflop:,.2f}",
                f"{answer.mb_up:,.2f}",
                f"{answer.seconds:,.1f}",
            ]
        table.add_row(Text(answer.client), *map(Text, cells))
    return table


def _clock_time(seconds: float | None) -> str:
    """Write a duration: 1:02:03."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    return str(timedelta(seconds=round(seconds)))
