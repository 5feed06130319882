"""The server's strategy: who trains what, who gets what, and what becomes of the deltas.

It drives Flower's Grid itself instead of subclassing `flwr.serverapp.strategy.Strategy`: that loop
sends every client the same arrays, holds all replies in memory, averages metrics and goes on
silently when nobody answered, each of which is wrong here.
"""

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedbt_app.blocks import HEAD
from fedbt_app.checkpoint import Checkpoint
from fedbt_app.codec import decode
from fedbt_app.config import RunConfig
from fedbt_app.costs import Ledger, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.exchange import Exchange
from fedbt_app.local_model import Weights, model_spec, new_tensors
from fedbt_app.messages import (
    FAILED,
    LACKING,
    Capabilities,
    Reply,
    Request,
    Sync,
    read_capabilities,
    read_reply,
    request_record,
    serialised_bytes,
)
from fedbt_app.plan import RoundPlan, plan_round
from fedbt_app.pool import PartState, Tensors
from fedbt_app.predict import full_model_bytes
from fedbt_app.state import GlobalState, WeightedSum
from fedbt_app.tasks import merge_labels

log = logging.getLogger("flwr")
NODE_POLL_SECONDS = 1.0


@dataclass
class Participant:
    """A client that the query accepted, and what its pool holds as far as the server knows."""

    node: int
    capabilities: Capabilities
    held: dict[str, PartState]
    contacted: bool = False  # it has been sent the tensors that the base lacks

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
class Outcome:
    """What a finished run leaves."""

    rounds: list[RoundEntry] = field(default_factory=list)
    cost: Ledger = field(default_factory=Ledger)
    full_bytes_up: int = 0  # what full-model averaging would have sent for the same exchanges
    full_bytes_down: int = 0
    client_metrics: dict[str, float] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)


class FedBT:
    """Federated training of selected blocks.

    Parameters
    ----------
    evaluate : called with the global state after each round; returns metrics on the central test set
    on_round : called with each finished round
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        evaluate: Callable[["FedBT"], dict[str, float]],
        on_round: Callable[[RoundEntry], None],
    ) -> None:
        self.config, self.checkpoint = config, checkpoint
        self._evaluate, self._on_round = evaluate, on_round
        self.lineage = uuid.uuid4().hex
        self.participants: dict[int, Participant] = {}
        self.labels: tuple[str, ...] = config.label_names
        self.outcome = Outcome()
        self.initial: dict[str, float] = {}
        self._refused_nodes: set[int] = set()

    def start(self, grid: Grid) -> Outcome:
        """Run all rounds.

        Raises
        ------
        FedBTError
            When too few clients connect, none is accepted, or every client of a round failed.
        """
        self._wait_for_clients(grid)
        self._query(grid, 0)
        self._require_participants()
        self.labels = self.labels or merge_labels(
            self.config.task, (one.capabilities.label_counts for one in self.participants.values())
        )
        self.state = GlobalState(self.checkpoint, self.config.codec)
        self.weights = Weights(self.checkpoint, self.state.tensors, model_spec(self.config, self.labels))
        self._introduce(HEAD)
        self.initial = self._evaluate(self)
        log.info("fedbt: before training: %s", _shown(self.initial))
        for round_ in range(1, self.config.num_rounds + 1):
            self._query(grid, round_)
            self._round(grid, round_)
        return self.outcome

    # -- who takes part ---------------------------------------------------------------------------

    def _wait_for_clients(self, grid: Grid) -> None:
        deadline, told = time.monotonic() + self.config.round_timeout, False
        while (connected := len(list(grid.get_node_ids()))) < self.config.min_clients:
            if time.monotonic() > deadline:
                raise FedBTError(
                    f"{connected} of min-clients={self.config.min_clients} clients connected: start more SuperNodes "
                    "or lower min-clients"
                )
            if not told:
                log.info("fedbt: %d of %d clients connected, waiting", connected, self.config.min_clients)
                told = True
            time.sleep(NODE_POLL_SECONDS)

    def _query(self, grid: Grid, round_: int) -> None:
        """Ask every node not yet asked for its examples, labels, pool and device; refuse foreign bases."""
        new = [n for n in grid.get_node_ids() if n not in self.participants and n not in self._refused_nodes]
        exchange = Exchange(grid, MessageType.QUERY, f"query-{round_}", self.config.round_timeout)
        cost = self.outcome.cost
        for node in new:
            content = request_record(Request(Sync(self.lineage, [], {})))
            cost.first_contact_bytes += serialised_bytes(exchange.send(node, content))
        for node, message in exchange.replies():
            try:
                if not message.has_error():
                    cost.first_contact_bytes += serialised_bytes(message)
                self._accept(node, read_capabilities(message))
            except FedBTError as error:
                self._refused_nodes.add(node)
                self._refuse(round_, f"node {node}", str(error))
        for node in exchange.silent:
            self._refuse(round_, f"node {node}", "did not answer the query in time")

    def _accept(self, node: int, capabilities: Capabilities) -> None:
        mine = self.checkpoint.fingerprint
        if capabilities.fingerprint != mine:
            raise FedBTError(
                f"{capabilities.name} starts from another base: its {capabilities.base!r} is "
                f"{capabilities.fingerprint[:12]}, the run's {self.config.model!r} is {mine[:12]}; "
                "give it the same checkpoint (model-path)"
            )
        if not capabilities.examples:
            raise FedBTError(f"{capabilities.name} has no training examples: check its data")
        if any(one.name == capabilities.name for one in self.participants.values()):
            raise FedBTError(f"two clients call themselves {capabilities.name!r}: give each node its own name")
        unknown = set(capabilities.label_counts) - set(self.labels) if self.labels else set()
        if unknown:
            known = ", ".join(self.labels)
            raise FedBTError(f"{capabilities.name} has label {sorted(unknown)[0]!r}, not in the label set ({known})")
        self.participants[node] = Participant(node, capabilities, dict(capabilities.held))
        log.info(
            "fedbt: %s joins: %d examples, %d held out, on %s",
            *(capabilities.name, capabilities.examples, capabilities.heldout, capabilities.device),
        )

    def _require_participants(self) -> None:
        if not self.participants:
            reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in self.outcome.refusals)) or "nobody answered"
            raise FedBTError(f"no client can take part: {reasons}")

    def _chosen(self, round_: int) -> list[Participant]:
        ordered = sorted(self.participants.values(), key=lambda one: one.name)
        wanted = max(1, round(self.config.participation * len(ordered)))
        if wanted == len(ordered):
            return ordered
        generator = np.random.default_rng([self.config.seed, round_])
        return [ordered[index] for index in sorted(generator.choice(len(ordered), wanted, replace=False))]

    # -- a round ----------------------------------------------------------------------------------

    def _round(self, grid: Grid, round_: int) -> None:
        begin, cost, mean = time.monotonic(), Ledger(), WeightedSum()
        self._losses: list[tuple[int, float]] = []
        plans = {one.node: self._plan(one, round_) for one in self._chosen(round_)}
        log.info("fedbt: round %d/%d: %d clients", round_, self.config.num_rounds, len(plans))
        trained, answered = set(), 0
        for one, reply in self._exchange(grid, MessageType.TRAIN, round_, plans, cost):
            plan = plans[one.node]
            assert plan is not None
            try:
                deltas = self._checked_deltas(reply, plan)
            except FedBTError as error:
                self._refuse(round_, one.name, str(error))
                continue
            mean.add(deltas, reply.examples)
            trained |= set(plan.trained_blocks)
            answered += 1
            self._losses.append((reply.examples, (reply.metrics or {}).get("train_loss", float("nan"))))
            log.info(
                "fedbt: round %d/%d: %s: loss %.4f, %d examples, %.2f TFLOP, %.2f MB up, %.1f s",
                *(round_, self.config.num_rounds, one.name, self._losses[-1][1], reply.examples),
                *(reply.costs.train_flops / 1e12, reply.costs.uplink_serialised_bytes / 1e6, reply.costs.seconds),
            )
        if not answered:
            raise FedBTError(f"round {round_}: every client failed: {self._last_reason(round_)}")
        self.state.apply(mean.mean(), seed=self.config.seed + round_)
        last = round_ == self.config.num_rounds
        if self.config.client_evaluation == "every" or (last and self.config.client_evaluation == "final"):
            self._evaluate_on_clients(grid, round_, cost)
        examples = sum(weight for weight, _ in self._losses)
        metrics = {"train_loss": sum(weight * loss for weight, loss in self._losses) / examples}
        metrics |= self._evaluate(self)
        entry = RoundEntry(
            round=round_,
            trained_blocks=sorted(trained),
            clients=answered,
            train_flops=cost.train_flops,
            uplink_bytes=cost.uplink_bytes,
            downlink_bytes=cost.downlink_bytes,
            seconds=time.monotonic() - begin,
            metrics=metrics,
        )
        self.outcome.cost.add(cost)
        self.outcome.rounds.append(entry)
        self._on_round(entry)
        log.info(
            "fedbt: round %d/%d done in %.1f s: blocks %s, %s, %.2f MB up, %.2f MB down",
            *(round_, self.config.num_rounds, entry.seconds, entry.trained_blocks or "none", _shown(metrics)),
            *(entry.uplink_bytes / 1e6, entry.downlink_bytes / 1e6),
        )

    def _plan(self, one: Participant, round_: int) -> RoundPlan:
        config, depth = self.config, self.checkpoint.architecture.depth
        local_depth = one.capabilities.local_depth or config.local_depth
        plan = plan_round(
            config.method, config.task, depth, local_depth, config.num_rounds, round_ - 1, config.seed, one.name
        )
        for part in plan.trained_parts:
            self._introduce(part)
        return plan

    def _introduce(self, part: str) -> None:
        """Make those tensors of `part` that the base lacks, when it is needed for the first time."""
        if part not in self.state.states() and (lacking := self.weights.lacking(part)):
            self.state.introduce(part, new_tensors(lacking, self.config.seed))

    def _checked_deltas(self, reply: Reply, plan: RoundPlan) -> Tensors:
        """Decode and check a whole reply before any of it is used."""
        sent, wanted = reply.deltas or {}, set(plan.trained_parts)
        if extra := sorted(sent.keys() - wanted):
            raise FedBTError(f"sent a delta of {extra[0]!r}, which nobody asked for")
        if missing := sorted(wanted - sent.keys()):
            raise FedBTError(f"sent no delta of {missing[0]!r}")
        if not reply.examples:
            raise FedBTError("says that it trained on 0 examples")
        deltas: Tensors = {}
        for part in plan.trained_parts:
            decoded = decode(sent[part].arrays, sent[part].header, self.weights.shapes(part))
            for name, tensor in decoded.items():
                if not bool(tensor.isfinite().all()):
                    raise FedBTError(f"sent a delta of {name} that is not finite: lower learning-rate")
            deltas |= decoded
        return deltas

    def _evaluate_on_clients(self, grid: Grid, round_: int, cost: Ledger) -> None:
        """Evaluate on held-out rows; delivers the round's result to every client as well."""
        nodes: dict[int, RoundPlan | None] = dict.fromkeys(self.participants)
        sums: dict[str, float] = {}
        examples = 0
        for _, reply in self._exchange(grid, MessageType.EVALUATE, round_, nodes, cost):
            examples += reply.examples
            for name, value in (reply.metrics or {}).items():
                sums[name] = sums.get(name, 0.0) + reply.examples * value
        self.outcome.client_metrics = {name: total / examples for name, total in sums.items()} if examples else {}
        if examples:
            log.info("fedbt: on %d held-out rows at the clients: %s", examples, _shown(self.outcome.client_metrics))

    # -- messages ---------------------------------------------------------------------------------

    def _exchange(self, grid: Grid, kind: str, round_: int, plans: dict[int, RoundPlan | None], cost: Ledger):  # type: ignore[no-untyped-def]
        """Send every client what it lacks and its plan; yield (participant, good reply), book all bytes."""
        exchange = Exchange(grid, kind, str(round_), self.config.round_timeout)
        rest = "downlink_bytes" if kind == MessageType.TRAIN else "evaluation_bytes"
        asked_again: set[int] = set()

        def ask(one: Participant) -> None:
            updates = self.state.updates_for(one.held)
            request = Request(Sync(self.lineage, updates, self.state.states()), self.labels, plans[one.node])
            message = exchange.send(one.node, request_record(request))
            by_cause: dict[str, int] = {}
            for update in updates:
                size = sum(array.nbytes for array in update.encoded.arrays.values())
                by_cause[update.cause] = by_cause.get(update.cause, 0) + size
            cost.book_downlink(rest, serialised_bytes(message), by_cause)
            if "round" in by_cause:
                self.outcome.full_bytes_down += self._full_bytes()

        for node in plans:
            ask(self.participants[node])
        for node, message in exchange.replies():
            one = self.participants[node]
            if (reply := self._read(one, message, round_, kind, cost)) is None:
                continue
            one.held = dict(reply.held or {})
            if reply.status == LACKING and node not in asked_again:
                asked_again.add(node)  # its pool is not what it told before: bring it up to date, once
                log.info("fedbt: round %d: %s lacks parts of its pool, sending them", round_, one.name)
                ask(one)
            elif reply.status == LACKING:
                self._refuse(round_, one.name, "its pool stays incomplete: check the disk of its pool-dir")
            else:
                yield one, reply
        for node in exchange.silent:
            self._refuse(round_, self.participants[node].name, "did not answer in time (round-timeout)")

    def _read(self, one: Participant, message: Message, round_: int, kind: str, cost: Ledger) -> Reply | None:
        """Read and book one reply; None when it can't be used."""
        try:
            reply = read_reply(message)
            if reply.status == FAILED:
                raise FedBTError(reply.error)
        except FedBTError as error:
            self._refuse(round_, one.name, str(error))
            return None
        size = serialised_bytes(message)
        cost.book_work(reply.costs)
        if kind == MessageType.TRAIN:
            cost.uplink_bytes += size
            cost.uplink_payload_bytes += sum(
                array.nbytes for part in (reply.deltas or {}).values() for array in part.arrays.values()
            )
            self.outcome.full_bytes_up += self._full_bytes() if reply.deltas else 0
        else:
            cost.evaluation_bytes += size
        return reply

    def _full_bytes(self) -> int:
        return full_model_bytes(self.checkpoint.architecture, self.config.task, len(self.labels))

    def _refuse(self, round_: int, client: str, reason: str) -> None:
        self.outcome.refusals.append(Refusal(round_, client, reason))
        log.warning("fedbt: round %d: %s is left out: %s", round_, client, reason)

    def _last_reason(self, round_: int) -> str:
        reasons = [refusal.reason for refusal in self.outcome.refusals if refusal.round == round_]
        return reasons[-1] if reasons else "nobody answered"


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "no central test set"
