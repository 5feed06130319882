"""A whole federation in one process: a Grid that calls the client app here and now.

No Ray and no SuperLink, so that many small runs start at once; every message still goes through
Flower's own serialisation. Benchmarks and tests run on it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


def over_the_wire(message: Message) -> Message:
    """Return `message` as the other side gets it: serialised by Flower, and read back."""
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        contents = {name: item.deflate() for name, item in objects.items()}
        arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    # the id that a SuperLink would set; the class has no public way to
    arrived.metadata.__dict__["_message_id"] = message.object_id
    return arrived


class LocalGrid(Grid):
    """Answers messages by calling the client app `app`; `nodes` maps node id to node config."""

    def __init__(
        self,
        app: ClientApp,
        run_config: dict[str, Any],
        nodes: dict[int, dict[str, Any]],
    ) -> None:
        # of which a new message takes where it comes from
        TaskIdentity.run_id = 1
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = 1
        self.app = app
        self.run_config = run_config
        self.nodes = nodes
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Not used."""
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        """Not used."""
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used."""
        raise AssertionError("not used")

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        """Not used: it holds every reply in memory."""
        raise AssertionError("holds every reply in memory: use push and pull")

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes: each is connected."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each node answer at once; returns the messages' ids."""
        identifiers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            identifiers.append(message.object_id)
            node = message.metadata.dst_node_id
            if node not in self.nodes:  # it is gone: nobody answers
                continue
            reply = self.answer(node, over_the_wire(message))
            if reply is not None:
                self._replies[message.object_id] = over_the_wire(reply)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the answers to these messages, each once."""
        there = [name for name in message_ids if name in self._replies]
        return iter([self._replies.pop(name) for name in there])

    def answer(self, node: int, message: Message) -> Message | None:
        """Return the reply of `node`; None when it gives none."""
        context = Context(
            run_id=1,
            node_id=node,
            node_config=self.nodes[node],
            state=RecordDict(),
            run_config=self.run_config,
        )
        return self.app(message, context)


def simulated(count: int, **extra: Any) -> dict[int, dict[str, Any]]:
    """Return the node configs of `count` simulated clients."""
    nodes = {}
    for index in range(count):
        node = 10 + index  # not the number of its part: those two must not be mixed up
        nodes[node] = {"partition-id": index, "num-partitions": count, **extra}
    return nodes
