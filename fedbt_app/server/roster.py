"""Who takes part: connected nodes, the query, refusals, and each round's choice."""

import logging
import time
from dataclasses import dataclass, field

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Ledger
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import PartState
from fedbt_app.progress.events import LeftOut
from fedbt_app.tasks import TASKS
from fedbt_app.wire.exchange import Exchange
from fedbt_app.wire.messages import Capabilities, Request, Sync, read_capabilities, request_record
from fedbt_app.wire.records import serialised_bytes

log = logging.getLogger("flwr")
NODE_POLL_SECONDS = 1.0


@dataclass
class Participant:
    """A client that the query accepted, and what its pool holds as far as the server knows."""

    node: int
    capabilities: Capabilities
    held: dict[str, PartState]

    @property
    def name(self) -> str:
        """The client's own name."""
        return self.capabilities.name


@dataclass(frozen=True)
class Refusal:
    """A reply (or a client) that was not used, and why."""

    round: int
    client: str
    reason: str


@dataclass
class Roster:
    """The clients of a run.

    Attributes
    ----------
    lineage : names the run: pools of the clients are kept by it
    labels
        as the configuration or the stopped run gives them; empty when the clients' are to be merged
    """

    config: RunConfig
    checkpoint: Checkpoint
    lineage: str
    labels: tuple[str, ...]
    participants: dict[int, Participant] = field(default_factory=dict)  # by node id
    refusals: list[Refusal] = field(default_factory=list)
    _refused_nodes: set[int] = field(default_factory=set)

    def gather(self, grid: Grid, cost: Ledger) -> None:
        """Wait for `min-clients` nodes and query them, again where none could be reached, until
        `round-timeout`.

        Raises
        ------
        FedBTError
            When too few connect, or none can take part, with the clients' own reasons.
        """
        deadline = time.monotonic() + self.config.round_timeout
        self.wait_for_clients(grid)
        self.query(grid, self.labels, cost, 0)
        while (
            not self.participants
            and time.monotonic() < deadline
            and set(grid.get_node_ids()) - self._refused_nodes
        ):
            time.sleep(NODE_POLL_SECONDS)
            self.query(grid, self.labels, cost, 0)
        if not self.participants:
            reasons = (
                "; ".join(dict.fromkeys(refusal.reason for refusal in self.refusals))
                or "nobody answered"
            )
            raise FedBTError(f"no client can take part: {reasons}")

    def wait_for_clients(self, grid: Grid) -> None:
        """Wait until `min-clients` nodes are connected."""
        deadline, told = time.monotonic() + self.config.round_timeout, False
        while (connected := len(list(grid.get_node_ids()))) < self.config.min_clients:
            if time.monotonic() > deadline:
                raise FedBTError(
                    f"{connected} of min-clients={self.config.min_clients} clients connected: start more SuperNodes "
                    "or lower min-clients"
                )
            if not told:
                log.info(
                    "fedbt: %d of %d clients connected, waiting", connected, self.config.min_clients
                )
                told = True
            time.sleep(NODE_POLL_SECONDS)

    def query(self, grid: Grid, labels: tuple[str, ...], cost: Ledger, round_: int) -> None:
        """Ask every node not yet asked for its examples, labels, pool and device; refuse foreign
        bases.
        """
        connected = set(grid.get_node_ids())
        new = sorted(connected - self.participants.keys() - self._refused_nodes)
        exchange = Exchange(grid, MessageType.QUERY, f"query-{round_}", self.config.round_timeout)
        for node in new:
            content = request_record(Request(Sync(self.lineage, [], {})))
            cost.first_contact_bytes += exchange.send(node, content)
        for node, message in exchange.replies():
            try:
                if not message.has_error():
                    # unless it is accepted; a node that cannot be reached is asked again
                    self._refused_nodes.add(node)
                    cost.first_contact_bytes += serialised_bytes(message)
                self._accept(node, read_capabilities(message), labels, connected)
                self._refused_nodes.discard(node)
            except FedBTError as error:
                self.refuse(round_, f"node {node}", str(error))
        for node in exchange.undelivered:
            self.refuse(round_, f"node {node}", "Flower did not take the query to it")
        for node in exchange.silent:
            self._refused_nodes.add(node)  # asked again, it would hold up every round as long
            self.refuse(round_, f"node {node}", "did not answer the query in time")

    def _accept(
        self, node: int, capabilities: Capabilities, labels: tuple[str, ...], connected: set[int]
    ) -> None:
        mine = self.checkpoint.fingerprint(TASKS[self.config.task].head)
        if capabilities.fingerprint != mine:
            raise FedBTError(
                f"{capabilities.name} starts from another base: its {capabilities.base!r} is "
                f"{capabilities.fingerprint[:12]}, the run's {self.config.model!r} is {mine[:12]}; "
                "give it the same checkpoint (model-path)"
            )
        if not capabilities.examples:
            raise FedBTError(f"{capabilities.name} has no training examples: check its data")
        for other in [
            known for known in self.participants.values() if known.name == capabilities.name
        ]:
            if other.node in connected:
                raise FedBTError(
                    f"two clients call themselves {capabilities.name!r}: give each node its own name"
                )
            del self.participants[other.node]  # the same site, back under a new node id
        unknown = set(capabilities.label_counts) - set(labels) if labels else set()
        if unknown:
            known = ", ".join(labels)
            raise FedBTError(
                f"{capabilities.name} has label {sorted(unknown)[0]!r}, not in the label set ({known}): "
                "set its label-map, or mend its data"
            )
        self.participants[node] = Participant(node, capabilities, dict(capabilities.held))
        log.info(
            "fedbt: %s joins: %d examples, %d held out, on %s",
            capabilities.name,
            capabilities.examples,
            capabilities.heldout,
            capabilities.device,
        )

    def chosen(self, round_: int, attempt: int = 0) -> list[Participant]:
        """Choose the clients of a round's first or repeated attempt, by name and seed: the same in
        every run.
        """
        ordered = sorted(self.participants.values(), key=lambda participant: participant.name)
        wanted = max(self.config.min_replies, round(self.config.participation * len(ordered)))
        if wanted >= len(ordered):
            return ordered
        generator = np.random.default_rng([self.config.seed, round_, attempt])
        return [
            ordered[index]
            for index in sorted(generator.choice(len(ordered), wanted, replace=False))
        ]

    @property
    def draws(self) -> bool:
        """Whether rounds take some of the clients only: to lag behind is then no fault, and books
        as downlink.
        """
        return self.config.participation < 1

    def refuse(self, round_: int, client: str, reason: str) -> None:
        """Note that something of `client` was not used; the round goes on without it."""
        self.refusals.append(Refusal(round_, client, reason))
        log.warning("fedbt: %s", LeftOut(round_, client, reason))

    def last_reason(self, round_: int) -> str:
        """Return why the last client of that round was left out; nothing when none was."""
        reasons = [refusal.reason for refusal in self.refusals if refusal.round == round_]
        return reasons[-1] if reasons else ""
