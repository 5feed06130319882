"""Ask many nodes at once and take their answers as they come, one in memory at a time."""

import time
from collections.abc import Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedbt_app.wire.records import serialised_bytes

POLL_SECONDS = 0.25


class Exchange:
    """One round of messages of one type.

    Flower's own `send_and_receive` holds every reply in memory; here the caller handles each before
    the next is fetched, and may ask a node again meanwhile.

    The clock starts when the caller begins to take replies: sending many messages takes long, and
    none of that is the nodes' time. A node that is asked again has what is left: one that keeps
    asking cannot hold up the round.
    """

    def __init__(
        self,
        grid: Grid,
        message_type: str,
        group: str,
        timeout: float,
    ) -> None:
        self._grid = grid
        self._type = message_type
        self._group = group
        self._timeout = timeout
        self._waiting: dict[str, int] = {}  # message id -> node id
        self.undelivered: list[int] = []  # nodes whose message Flower did not take

    def send(self, node: int, content: RecordDict) -> int:
        """Send `content` to `node`; returns its serialised bytes, 0 if Flower did not take it."""
        message = Message(
            content,
            dst_node_id=node,
            message_type=self._type,
            group_id=self._group,
        )
        # Measured before it is handed over: a simulation's workers pickle this very object, and
        # measuring it meanwhile changes it under their hands.
        size = serialised_bytes(message)
        taken = [identifier for identifier in self._grid.push_messages([message]) if identifier]
        if not taken:
            self.undelivered.append(node)
            return 0
        self._waiting[taken[0]] = node
        return size

    def replies(self) -> Iterator[tuple[int, Message]]:
        """Yield (node, reply) until all have answered, or the time is up and no answer is there."""
        deadline = time.monotonic() + self._timeout
        while self._waiting:
            # looked at before pulling: what came in time is taken all the same
            late = time.monotonic() >= deadline
            arrived = False
            for node, reply in self._pulled():
                arrived = True
                yield node, reply
            if arrived:
                continue
            if late:
                return
            time.sleep(POLL_SECONDS)

    def _pulled(self) -> Iterator[tuple[int, Message]]:
        """Yield the replies that lie at the server by now, in the order of asking."""
        # asked for one by one: all at once would be in memory at once
        for identifier in list(self._waiting):
            for reply in self._grid.pull_messages([identifier]):
                # the link's own answer for a dead node names no sender: go by what it answers
                node = self._waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply

    @property
    def silent(self) -> list[int]:
        """The nodes that have not answered."""
        return list(self._waiting.values())
