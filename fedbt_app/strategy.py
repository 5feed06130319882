"""The server's strategy: who trains what, who gets what, and what becomes of the deltas.

It drives Flower's Grid itself instead of subclassing `flwr.serverapp.strategy.Strategy`: that loop
sends every client the same arrays, holds all replies in memory, averages metrics and goes on
silently when nobody answered, each of which is wrong here.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

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
    Reply,
    Request,
    Sync,
    read_reply,
    request_record,
    serialised_bytes,
)
from fedbt_app.plan import RoundPlan, plan_round
from fedbt_app.pool import Tensors
from fedbt_app.predict import full_model_bytes
from fedbt_app.roster import Participant, Roster
from fedbt_app.state import GlobalState, WeightedSum
from fedbt_app.tasks import merge_labels

log = logging.getLogger("flwr")


@dataclass
class Outcome:
    """What a finished run leaves."""

    rounds: list[RoundEntry] = field(default_factory=list)
    cost: Ledger = field(default_factory=Ledger)
    full_bytes_up: int = 0  # what full-model averaging would have sent for the same exchanges
    full_bytes_down: int = 0
    client_metrics: dict[str, float] = field(default_factory=dict)


class FedBT:
    """Federated training of selected blocks.

    Parameters
    ----------
    evaluate : called with the global state after each round; returns metrics on the central test set
    on_round : called with each finished round
    test_labels : names in the central test set: outputs for those too, though no client may have any
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        evaluate: Callable[["FedBT"], dict[str, float]],
        on_round: Callable[[RoundEntry], None],
        test_labels: Iterable[str] = (),
    ) -> None:
        positions = checkpoint.architecture.positions
        if config.max_length > positions:
            raise FedBTError(f"max-length={config.max_length} but {config.model} has {positions} positions: lower it")
        self.config, self.checkpoint = config, checkpoint
        self._evaluate, self._on_round, self._test_labels = evaluate, on_round, list(test_labels)
        self.lineage = uuid.uuid4().hex
        self.roster = Roster(config, checkpoint)
        self.labels: tuple[str, ...] = config.label_names
        self.outcome = Outcome()
        self.initial: dict[str, float] = {}

    def start(self, grid: Grid) -> Outcome:
        """Run all rounds.

        Raises
        ------
        FedBTError
            When too few clients connect, none is accepted, or every client of a round failed.
        """
        self.roster.gather(grid, self.lineage, self.labels, self.outcome.cost)
        reported = [one.capabilities.label_counts for one in self.roster.participants.values()]
        self.labels = self.labels or merge_labels(self.config.task, [*reported, self._test_labels])
        self.state = GlobalState(self.checkpoint, self.config.codec)
        self.weights = Weights(self.checkpoint, self.state.tensors, model_spec(self.config, self.labels))
        self._introduce(HEAD)
        self.initial = self._evaluate(self)
        log.info("fedbt: before training: %s", _shown(self.initial))
        for round_ in range(1, self.config.num_rounds + 1):
            self.roster.query(grid, self.lineage, self.labels, self.outcome.cost, round_)  # newcomers
            self._round(grid, round_)
        return self.outcome

    # -- a round ----------------------------------------------------------------------------------

    def _round(self, grid: Grid, round_: int) -> None:
        begin, cost, mean = time.monotonic(), Ledger(), WeightedSum()
        losses: list[tuple[int, float]] = []
        plans = {one.node: self._plan(one, round_) for one in self.roster.chosen(round_)}
        log.info("fedbt: round %d/%d: %d clients", round_, self.config.num_rounds, len(plans))
        trained, answered = set(), 0
        for one, reply in self._exchange(grid, MessageType.TRAIN, round_, plans, cost):
            plan = plans[one.node]
            try:
                deltas = self._checked_deltas(reply, plan)
            except FedBTError as error:
                self.roster.refuse(round_, one.name, str(error))
                continue
            mean.add(deltas, reply.examples)
            trained |= set(plan.trained_blocks)
            answered += 1
            losses.append((reply.examples, (reply.metrics or {}).get("train_loss", float("nan"))))
            log.info(
                "fedbt: round %d/%d: %s: loss %.4f, %d examples, %.2f TFLOP, %.2f MB up, %.1f s",
                *(round_, self.config.num_rounds, one.name, losses[-1][1], reply.examples),
                *(reply.costs.train_flops / 1e12, reply.costs.uplink_serialised_bytes / 1e6, reply.costs.seconds),
            )
        if not answered:
            raise FedBTError(f"round {round_}: every client failed: {self.roster.last_reason(round_)}")
        self.state.apply(mean.mean())
        last = round_ == self.config.num_rounds
        if self.config.client_evaluation == "every" or (last and self.config.client_evaluation == "final"):
            self._evaluate_on_clients(grid, round_, cost)
        examples = sum(weight for weight, _ in losses)
        metrics = {"train_loss": sum(weight * loss for weight, loss in losses) / examples}
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
        nodes: dict[int, RoundPlan | None] = dict.fromkeys(self.roster.participants)
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for _, reply in self._exchange(grid, MessageType.EVALUATE, round_, nodes, cost):
            for name, value in (reply.metrics or {}).items():
                if math.isfinite(value):
                    sums[name] = sums.get(name, 0.0) + reply.examples * value
                    weights[name] = weights.get(name, 0) + reply.examples
        self.outcome.client_metrics = {name: sums[name] / weights[name] for name in sums if weights[name]}
        examples = max(weights.values(), default=0)
        if examples:
            log.info("fedbt: on %d held-out rows at the clients: %s", examples, _shown(self.outcome.client_metrics))

    # -- messages ---------------------------------------------------------------------------------

    def _exchange(
        self, grid: Grid, kind: str, round_: int, plans: Mapping[int, RoundPlan | None], cost: Ledger
    ) -> Iterator[tuple[Participant, Reply]]:
        """Send every client what it lacks and its plan; yield (participant, good reply), book all bytes."""
        exchange = Exchange(grid, kind, str(round_), self.config.round_timeout)
        rest = "downlink_bytes" if kind == MessageType.TRAIN else "evaluation_bytes"
        asked_again: set[int] = set()

        def ask(one: Participant, whole: bool = False) -> None:
            updates = self.state.updates_for(one.held, whole)
            request = Request(Sync(self.lineage, updates, self.state.states()), self.labels, plans[one.node])
            size = exchange.send(one.node, request_record(request))
            by_cause: dict[str, int] = {}
            for update in updates:
                by_cause[update.cause] = by_cause.get(update.cause, 0) + update.encoded.nbytes
            cost.book_downlink(rest, size, by_cause)
            if "round" in by_cause:
                self.outcome.full_bytes_down += self._full_bytes()

        for node in plans:
            ask(self.roster.participants[node])
        for node, message in exchange.replies():
            one = self.roster.participants[node]
            if (reply := self._read(one, message, round_, kind, cost)) is None:
                continue
            one.held = dict(reply.held or {})
            if reply.status == LACKING and node not in asked_again:
                asked_again.add(node)  # its pool is not what it told before: bring it up to date, once
                log.info("fedbt: round %d: %s lacks parts of its pool, sending them", round_, one.name)
                ask(one, whole=True)
            elif reply.status == LACKING:
                self.roster.refuse(round_, one.name, "its pool stays incomplete: check the disk of its pool-dir")
            else:
                yield one, reply
        for node in exchange.silent:
            self.roster.refuse(round_, self.roster.participants[node].name, "did not answer in time (round-timeout)")

    def _read(self, one: Participant, message: Message, round_: int, kind: str, cost: Ledger) -> Reply | None:
        """Read and book one reply; None when it can't be used."""
        if not message.has_error():
            size = serialised_bytes(message)
            if kind == MessageType.TRAIN:
                cost.uplink_bytes += size
            else:
                cost.evaluation_bytes += size
        try:
            reply = read_reply(message)
            if reply.status == FAILED:
                raise FedBTError(reply.error)
        except FedBTError as error:
            self.roster.refuse(round_, one.name, str(error))
            return None
        cost.book_work(reply.costs)
        if reply.deltas:
            cost.uplink_payload_bytes += sum(encoded.nbytes for encoded in reply.deltas.values())
            self.outcome.full_bytes_up += self._full_bytes()
        return reply

    def _full_bytes(self) -> int:
        return full_model_bytes(self.checkpoint.architecture, self.config.task, len(self.labels))


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "no central test set"
