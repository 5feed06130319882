"""One round of messages: how long is waited for answers, and from when."""

from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedbt_app.wire import exchange as exchange_module
from fedbt_app.wire.exchange import Exchange

NODES = [10, 11, 12]


class Clock:
    """Stands in for the module `time`: moves only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowGrid:
    """Takes `push_seconds` to take a message; each node answers once `answers` is over after it."""

    def __init__(self, clock: Clock, push_seconds: float, answers: dict[int, float]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.clock, self.push_seconds, self.answers = clock, push_seconds, answers
        self.pushed: list[int] = []
        self._ready: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        (message,) = messages
        node = message.metadata.dst_node_id
        self.clock.now += self.push_seconds
        self.pushed.append(node)
        name = f"{node}-{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = name
        if node in self.answers:
            reply = Message(RecordDict(), reply_to=message)
            self._ready[name] = (self.clock.now + self.answers[node], reply)
        return [name]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in message_ids:
            if name in self._ready and self._ready[name][0] <= self.clock.now:
                yield self._ready.pop(name)[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exchange_module, "time", made)
    return made


def asked(grid: SlowGrid, timeout: float) -> Exchange:
    """Return an exchange in which every node has been sent a message."""
    exchange = Exchange(grid, "train", "1", timeout)  # type: ignore[arg-type]
    for node in NODES:
        assert exchange.send(node, RecordDict()) > 0
    return exchange


def test_replies_that_lie_at_the_server_when_the_last_message_is_sent_are_taken(
    clock: Clock,
) -> None:
    exchange = asked(
        SlowGrid(clock, push_seconds=0.5, answers=dict.fromkeys(NODES, 0.0)), timeout=1.0
    )
    assert [node for node, _ in exchange.replies()] == NODES
    assert exchange.silent == []


def test_time_of_sending_is_not_taken_from_the_time_of_waiting(clock: Clock) -> None:
    exchange = asked(
        SlowGrid(clock, push_seconds=5.0, answers={10: 0.0, 11: 0.0, 12: 0.9}), timeout=1.0
    )
    assert [node for node, _ in exchange.replies()] == NODES


def test_silent_node_is_waited_for_as_long_as_the_timeout_and_no_longer(clock: Clock) -> None:
    exchange = asked(SlowGrid(clock, push_seconds=0.5, answers={10: 0.0, 11: 9.0}), timeout=3.0)
    begin = clock.now
    assert [node for node, _ in exchange.replies()] == [10]
    assert exchange.silent == [11, 12]
    assert clock.now - begin == pytest.approx(3.0, abs=exchange_module.POLL_SECONDS)


def test_replies_that_came_while_another_was_worked_on_are_taken_after_the_time_is_up(
    clock: Clock,
) -> None:
    exchange = asked(
        SlowGrid(clock, push_seconds=0.5, answers={10: 4.0, 11: 2.0, 12: 0.0}), timeout=3.0
    )
    taken = []
    for node, _ in exchange.replies():
        clock.now += 10.0  # as decoding a large reply on a busy machine
        taken.append(node)
    assert taken == [12, 10, 11]
    assert exchange.silent == []


def test_node_that_is_asked_again_has_what_is_left_of_the_time(clock: Clock) -> None:
    grid = SlowGrid(clock, push_seconds=0.0, answers={10: 2.0, 11: 0.0, 12: 0.0})
    exchange, taken = asked(grid, timeout=3.0), []
    for node, _ in exchange.replies():
        if node not in taken and node != 12:
            exchange.send(node, RecordDict())
        taken.append(node)
    assert grid.pushed == [*NODES, 11, 10]
    assert taken == [11, 12, 11, 10]  # the second answer of 10 would come after four seconds
    assert exchange.silent == [10]
