"""The lines of a run read back, the terminal's live view of them, and TensorBoard's scalars."""

import io
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.progress import live
from fedbt_app.progress.events import (
    BeforeTraining,
    Blocks,
    HeldOut,
    LeftOut,
    Metrics,
    Replied,
    RoundBegan,
    RoundDone,
    WentOn,
    read,
)
from fedbt_app.report import tracking
from fedbt_app.server.snapshot import Progress, Snapshot
from fedbt_app.wire.local_grid import LocalGrid, simulated

SCORES = Metrics(train_loss=1.5, accuracy=0.25)

# events -------------------------------------------------------------------------------------------


LINES = {
    "round 1/6: 4 clients": RoundBegan(1, 6, 4),
    "round 2/6: clinic: b: loss 0.5000, 120 examples, 1.25 TFLOP, 3.50 MB up, 12.5 s": Replied(
        2, 6, "clinic: b", 0.5, 120, 1.25, 3.5, 12.5
    ),
    "round 2/6 done in 20.5 s: blocks [0, 11], train_loss 1.5000, accuracy 0.2500, 7.00 MB up, "
    "8.00 MB down, 2.50 TFLOP": RoundDone(2, 6, 20.5, Blocks([0, 11]), SCORES, 7.0, 8.0, 2.5),
    "round 1/1 done in 1.0 s: blocks none, no central test set, 0.00 MB up, 0.00 MB down, "
    "0.00 TFLOP": RoundDone(1, 1, 1.0, Blocks(), Metrics(), 0.0, 0.0, 0.0),
    "round 3: clinic-b is left out: disk full: [Errno 28]": LeftOut(
        3, "clinic-b", "disk full: [Errno 28]"
    ),
    "round 3: clinic-b is left out: ": LeftOut(3, "clinic-b", ""),
    "before training: train_loss 1.5000, accuracy 0.2500": BeforeTraining(SCORES),
    "on 7 held-out rows at the clients: train_loss 1.5000, accuracy 0.2500": HeldOut(7, SCORES),
    "goes on after round 2/6: 1.50 TFLOP, 2.00 MB up, 3.00 MB down until then": WentOn(
        2, 6, 1.5, 2.0, 3.0
    ),
}


def test_a_line_is_read_as_the_event_that_wrote_it() -> None:
    for line, event in LINES.items():
        assert str(event) == line
        assert read(line) == event


def test_odd_numbers_come_back() -> None:
    for value in (math.nan, math.inf, -math.inf, -0.5, 1e30):
        event = read(
            str(RoundDone(1, 2, 1.0, Blocks(), Metrics(loss=value, f1=0.5), 0.0, 0.0, 0.0))
        )
        assert isinstance(event, RoundDone)
        assert event.metrics["loss"] == pytest.approx(value, nan_ok=True)
        assert event.metrics["f1"] == 0.5


def test_other_lines_are_no_events() -> None:
    for line in (
        *("", "noise", "round", "round 1", "round x/2: 3 clients", "round 1/2: 3 clients more"),
        *("clinic joins: 3 examples", f"round {'9' * 9999}/2: 3 clients"),
        "round 1/2: a: loss ?, 1 examples, 1.00 TFLOP, 1.00 MB up, 1.0 s",
    ):
        assert read(line) is None, line


# The view -----------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def console() -> Console:
    return Console(file=io.StringIO(), width=110, force_terminal=False)


def drawn(view: live.View) -> str:
    screen = console()
    screen.print(view.render())
    return screen.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def fed(clock: Clock, *events: Any, rounds: int = 4) -> live.View:
    view = live.View(rounds, console(), clock)
    for event in events:
        view(str(event))
    return view


def test_the_view_shows_the_current_round_and_what_the_run_cost_so_far(clock: Clock) -> None:
    view = fed(
        clock,
        BeforeTraining(Metrics(accuracy=0.1)),
        RoundBegan(1, 4, 2),
        RoundDone(1, 4, 30.0, Blocks([3]), Metrics(train_loss=2.0, accuracy=0.6), 10.0, 20.0, 5.0),
        RoundBegan(2, 4, 3),
        Replied(2, 4, "clinic-[red]a", 0.5, 1200, 1.25, 3.5, 12.5),
        LeftOut(2, "clinic-b", "disk full"),
    )
    clock.now += 10
    text = drawn(view)
    assert "1 of 4 rounds done" in text
    assert "0:00:10 elapsed" in text
    assert "0:01:20 to go" in text  # 30 s a round, 10 s of this one gone
    assert "6.25 TFLOP, 13.50 MB up, 20.00 MB down" in text
    assert "train_loss 2.0000, accuracy 0.1000 -> 0.6000" in text
    assert "round 2: 1 of 3 clients replied" in text
    assert ["clinic-[red]a", "0.5000", "1,200", "1.25", "3.50", "12.5"] in [
        line.split() for line in text.splitlines()
    ]
    assert ["clinic-b", "left", "out"] in [line.split() for line in text.splitlines()]


def test_before_the_first_round_nothing_is_known(clock: Clock) -> None:
    text = drawn(live.View(4, console(), clock))
    assert "0 of 4 rounds done" in text
    assert "-:--:-- to go" in text


def test_a_resumed_run_begins_at_its_round(clock: Clock) -> None:
    view = fed(clock, WentOn(2, 4, 10.0, 20.0, 30.0), RoundBegan(3, 4, 2))
    text = drawn(view)
    assert "2 of 4 rounds done" in text
    assert "10.00 TFLOP, 20.00 MB up, 30.00 MB down" in text
    assert "-:--:-- to go" in text  # what the rounds before took is not known here
    view(str(RoundDone(3, 4, 7.0, Blocks([0]), Metrics(), 1.0, 1.0, 1.0)))
    assert "0:00:07 to go" in drawn(view)
    assert "11.00 TFLOP, 21.00 MB up, 31.00 MB down" in drawn(view)


def test_a_repeated_round_starts_its_replies_anew_but_not_its_time(clock: Clock) -> None:
    done = RoundDone(1, 2, 30.0, Blocks([0]), Metrics(), 1.0, 1.0, 1.0)
    view = fed(
        clock,
        RoundBegan(1, 2, 2),
        done,
        RoundBegan(2, 2, 2),
        Replied(2, 2, "a", 1.0, 1, 1.0, 1.0, 1.0),
    )
    clock.now += 20
    view(
        "round 2: 1 of 2 clients gave a usable reply, min-replies=2: the round is repeated (1 of 3)"
    )
    view(str(RoundBegan(2, 2, 2)))
    assert "0 of 2 clients replied" in drawn(view)
    assert "0:00:10 to go" in drawn(view)
    clock.now += 100
    assert "0:00:00 to go" in drawn(view)  # it takes longer than expected


def test_odd_numbers_are_shown(clock: Clock) -> None:
    for value in (math.nan, math.inf, -math.inf):
        view = fed(
            clock,
            BeforeTraining(Metrics(loss=value)),
            RoundBegan(1, 4, 1),
            Replied(1, 4, "a", value, 0, value, value, value),
            RoundDone(1, 4, value, Blocks(), Metrics(loss=value), value, value, value),
            HeldOut(3, Metrics(loss=value)),
        )
        assert f"loss {value:.4f} -> {value:.4f}" in drawn(view)
        assert f"on the clients' held-out rows: loss {value:.4f}" in drawn(view)


def test_many_replies_do_not_fill_the_screen(clock: Clock) -> None:
    replies = [Replied(1, 4, f"site-{number}", 1.0, 1, 1.0, 1.0, 1.0) for number in range(100)]
    text = drawn(fed(clock, RoundBegan(1, 4, 100), *replies))
    assert "100 of 100 clients replied" in text
    assert "site-99" in text
    assert len(text.splitlines()) < 20


def test_unknown_lines_scroll_by_and_change_nothing(clock: Clock) -> None:
    screen = console()
    view = live.View(4, screen, clock)
    with view:
        before = view.standing
        view("a line from a later version")
        view("\x1b[2Jclinic joins: 3 examples")
        assert view.standing == before
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "a line from a later version" in shown
    assert "\x1b" not in shown
    assert "joins: 3 examples" in shown


def test_a_failed_run_leaves_its_standing_and_the_error_goes_on(clock: Clock) -> None:
    screen = console()

    def run() -> None:
        with live.View(4, screen, clock) as view:
            view(str(RoundBegan(1, 4, 2)))
            view(str(LeftOut(1, "clinic-b", "disk full")))
            raise FedBTError("disk full")

    with pytest.raises(FedBTError, match="disk full"):
        run()
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "round 1: clinic-b is left out: disk full" in text
    assert "0 of 4 rounds done" in text
    assert "stopped" in text
    assert "to go" not in text


def test_a_finished_run_says_so(clock: Clock) -> None:
    screen = console()
    with live.View(1, screen, clock) as view:
        view(str(RoundBegan(1, 1, 2)))
        view(str(RoundDone(1, 1, 1.0, Blocks([0]), Metrics(loss=1.0), 1.0, 1.0, 1.0)))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 1 rounds done" in text
    assert "finished" in text


def test_the_view_and_tensorboard_follow_a_whole_run(
    settings: Callable[..., dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:
    monkeypatch.setattr("fedbt_app.report.plots.write_plots", lambda *_: [])
    values = settings(
        output_dir=str(tmp_path / "out"), tensorboard=True, num_rounds=2, max_train_examples=40
    )
    with caplog.at_level(logging.INFO, logger="flwr"):
        report = server_app.run(
            LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values)
        )
    lines = [line.removeprefix("fedbt: ") for line in caplog.messages if line.startswith("fedbt: ")]
    events = [type(event) for event in map(read, lines) if event]
    trained = [RoundBegan, Replied, Replied]
    assert events == [BeforeTraining, *trained, RoundDone, *trained, HeldOut, RoundDone]
    view = live.View(2, console(), clock)
    for line in lines:
        view(line)
    assert view.standing.done == 2
    assert view.standing.mb_up == pytest.approx(report["cost"]["uplink_bytes"] / 1e6, abs=0.02)
    assert view.standing.mb_down == pytest.approx(report["cost"]["downlink_bytes"] / 1e6, abs=0.02)
    assert view.standing.latest == pytest.approx(report["rounds"][-1]["metrics"], abs=1e-4)
    for name in tracking.COSTS:
        expected = {one["round"]: one[name] for one in report["rounds"]}
        assert dict(points(tmp_path / "out", f"cost/{name}")) == pytest.approx(expected, rel=1e-5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_unless_a_terminal_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with live.progress(2, verbose=False) as show:
        show("round 1/2: 3 clients")
    assert capsys.readouterr().out == "round 1/2: 3 clients\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(live.progress(2, verbose=False), live.View)
    assert not isinstance(live.progress(2, verbose=True), live.View)
    monkeypatch.setenv("TERM", "dumb")
    assert not isinstance(live.progress(2, verbose=False), live.View)


# TensorBoard --------------------------------------------------------------------------------------


def entry(round_: int, loss: float) -> RoundEntry:
    return RoundEntry(round_, [0], 2, 10 * round_, 20, 30, 1.5, {"loss": loss})


def points(output: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output / tracking.FOLDER)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_each_round_at_once(tmp_path: Path) -> None:
    add = tracking.board(tmp_path, True, None)
    add(entry(1, 2.0))
    assert points(tmp_path, "metrics/loss") == [(1, 2.0)]
    add(entry(2, math.nan))
    (first, second) = points(tmp_path, "metrics/loss")
    assert first == (1, 2.0)
    assert math.isnan(second[1])
    assert points(tmp_path, "cost/train_flops") == [(1, 10.0), (2, 20.0)]
    for name, value in (("uplink_bytes", 20.0), ("downlink_bytes", 30.0), ("seconds", 1.5)):
        assert points(tmp_path, f"cost/{name}") == [(1, value), (2, value)]


def test_a_resumed_run_goes_on_in_tensorboard_and_a_new_one_starts_over(tmp_path: Path) -> None:
    stopped = tracking.board(tmp_path, True, None)
    for round_ in (1, 2, 3):
        stopped(entry(round_, 1.0))
    resumed = tracking.board(tmp_path, True, 2)  # round 3 is not in the snapshot: it is done again
    resumed(entry(3, 0.5))
    assert points(tmp_path, "metrics/loss") == [(1, 1.0), (2, 1.0), (3, 0.5)]
    (tmp_path / tracking.FOLDER / "mine.txt").touch()
    tracking.board(tmp_path, False, None)(entry(1, 7.0))
    assert [path.name for path in (tmp_path / tracking.FOLDER).iterdir()] == ["mine.txt"]


def test_missing_tensorboard_is_one_line_and_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.board(tmp_path, True, None)(entry(1, 1.0))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FedBTError, match=r"pip install 'fedbt-app\[tensorboard\]'"):
        tracking.board(tmp_path, True, None)
    assert points(tmp_path, "metrics/loss") == [(1, 1.0)]
    tracking.board(tmp_path, False, None)


def test_unusable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / tracking.FOLDER).touch()
    with pytest.raises(FedBTError, match="choose another output-dir"):
        tracking.board(tmp_path, True, None)


def test_a_resumed_run_may_turn_tensorboard_on(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    values = settings(output_dir=str(tmp_path / "out"))
    config = RunConfig.load(values)
    snapshot = Snapshot(config.output_folder)
    snapshot.store(config, Progress("0" * 32, ("a", "b"), 3, "f" * 64, {}, Outcome(), [], {}, []))
    snapshot.check(RunConfig.load(values | {"tensorboard": True}))
