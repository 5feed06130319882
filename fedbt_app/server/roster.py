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
from fedbt_app.wire.messages import (
    Capabilities,
    Request,
    Sync,
    name_in,
    read_capabilities,
    request_record,
)
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
        """Wait for `min-clients` nodes and query them, until one is reached or `round-timeout`.

        Raises
        ------
        FedBTError
            When too few connect, or none can take part, with the clients' own reasons.
        """
        deadline = time.monotonic() + self.config.round_timeout
        self.wait_for_clients(grid)
        self.query(grid, self.labels, cost, 0)
        while not self.participants and time.monotonic() < deadline:
            if not set(grid.get_node_ids()) - self._refused_nodes:
                break  # all have been heard
            time.sleep(NODE_POLL_SECONDS)
            self.query(grid, self.labels, cost, 0)
        if not self.participants:
            reasons = dict.fromkeys(refusal.reason for refusal in self.refusals)
            shown = "; ".join(reasons) or "nobody answered"
            raise FedBTError(f"no client can take part: {shown}")

    def wait_for_clients(self, grid: Grid) -> None:
        """Wait until `min-clients` nodes are connected."""
        wanted = self.config.min_clients
        deadline = time.monotonic() + self.config.round_timeout
        told = False
        while (connected := len(list(grid.get_node_ids()))) < wanted:
            if time.monotonic() > deadline:
                raise FedBTError(
                    f"{connected} of min-clients={wanted} clients connected: "
                    "start more SuperNodes or lower min-clients"
                )
            if not told:
                log.info("fedbt: %d of %d clients connected, waiting", connected, wanted)
                told = True
            time.sleep(NODE_POLL_SECONDS)

    def query(
        self,
        grid: Grid,
        labels: tuple[str, ...],
        cost: Ledger,
        number: int,
    ) -> None:
        """Ask every new node for its examples, labels, pool and device; refuse foreign bases."""
        connected = set(grid.get_node_ids())
        new = connected - self.participants.keys() - self._refused_nodes
        exchange = Exchange(
            grid,
            message_type=MessageType.QUERY,
            group=f"query-{number}",
            timeout=self.config.round_timeout,
        )
        for node in sorted(new):
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
                self.refuse(number, name_in(message) or f"node {node}", str(error))
        for node in exchange.undelivered:
            self.refuse(number, f"node {node}", "Flower did not take the query to it")
        for node in exchange.silent:
            self._refused_nodes.add(node)  # asked again, it would hold up every round as long
            self.refuse(number, f"node {node}", "did not answer the query in time")

    def _accept(
        self,
        node: int,
        capabilities: Capabilities,
        labels: tuple[str, ...],
        connected: set[int],
    ) -> None:
        self._check_base(capabilities)
        self._check_tokenizer(capabilities)
        if not capabilities.examples:
            raise FedBTError(f"{capabilities.name} has no training examples: check its data")
        self._drop_earlier(capabilities.name, connected)
        unknown = set(capabilities.label_counts) - set(labels)
        if labels and unknown:
            first = min(unknown)
            known = ", ".join(labels)
            raise FedBTError(
                f"{capabilities.name} has label {first!r}, not in the label set ({known}): "
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

    def _check_base(self, capabilities: Capabilities) -> None:
        mine = self.checkpoint.fingerprint(TASKS[self.config.task].head)
        if capabilities.fingerprint != mine:
            raise FedBTError(
                f"{capabilities.name} starts from another base: its {capabilities.base!r} is "
                f"{capabilities.fingerprint[:12]}, the run's {self.config.model!r} is {mine[:12]}; "
                "give it the same checkpoint (model-path)"
            )

    def _check_tokenizer(self, capabilities: Capabilities) -> None:
        mine = self.checkpoint.tokenizer_facts
        if capabilities.tokenizer != mine.fingerprint:
            raise FedBTError(
                f"{capabilities.name} makes other word pieces of its text: its tokenizer is "
                f"{capabilities.tokenizer[:12]} ({capabilities.tokenizer_description}), the run's is "
                f"{mine.fingerprint[:12]} ({mine.description}); give it the same tokenizer files (model-path)"
            )

    def _drop_earlier(self, name: str, connected: set[int]) -> None:
        """Forget a site that is back under a new node id; FedBTError when two have its name."""
        for node, participant in list(self.participants.items()):
            if participant.name != name:
                continue
            if node in connected:
                raise FedBTError(
                    f"two clients call themselves {name!r}: give each node its own name"
                )
            del self.participants[node]

    def chosen(self, number: int, attempt: int = 0) -> list[Participant]:
        """Choose the clients of a round's attempt by name and seed: the same in every run."""
        ordered = sorted(self.participants.values(), key=lambda participant: participant.name)
        share = round(self.config.participation * len(ordered))
        wanted = max(self.config.min_replies, share)
        if wanted >= len(ordered):
            return ordered
        generator = np.random.default_rng([self.config.seed, number, attempt])
        drawn = generator.choice(len(ordered), wanted, replace=False)
        return [ordered[index] for index in sorted(drawn)]

    @property
    def draws(self) -> bool:
        """Whether rounds take some clients only: to lag is no fault then, and books as downlink."""
        return self.config.participation < 1

    def refuse(self, number: int, client: str, reason: str) -> None:
        """Note that something of `client` was not used; the round goes on without it."""
        self.refusals.append(Refusal(number, client, reason))
        log.warning("fedbt: %s", LeftOut(number, client, reason))

    def last_reason(self, number: int) -> str:
        """Return why the last client of that round was left out; nothing when none was."""
        for refusal in reversed(self.refusals):
            if refusal.round == number:
                return refusal.reason
        return ""
