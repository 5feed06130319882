"""The server's talk with the clients: it updates pools, checks replies and books every byte."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedbt_app.codec.codec import decode
from fedbt_app.costs.cost_model import full_model_bytes
from fedbt_app.costs.ledger import Cause, Downlink, Outcome
from fedbt_app.errors import FedBTError
from fedbt_app.model.weights import Weights
from fedbt_app.plan import RoundPlan
from fedbt_app.server.roster import Participant, Roster
from fedbt_app.server.state import GlobalState
from fedbt_app.tensors import Tensors
from fedbt_app.wire.exchange import Exchange
from fedbt_app.wire.messages import (
    FAILED,
    LACKING,
    Reply,
    Request,
    Sync,
    read_reply,
    request_record,
)
from fedbt_app.wire.records import serialised_bytes

log = logging.getLogger("flwr")
# of one weight in one round: no training of BERT comes near, and sums of such stay finite
LARGEST_STEP = 1e6


@dataclass(frozen=True)
class Dialogue:
    """The talk with the clients of one run; a reply that cannot be used costs nothing but itself.

    Attributes
    ----------
    outcome : whose ledger books every message
    timeout : seconds to wait for all answers to a round's messages
    """

    grid: Grid
    roster: Roster
    state: GlobalState
    weights: Weights
    outcome: Outcome
    timeout: float

    def welcome(self, number: int) -> None:
        """Query the nodes that joined, or came back, since the last round."""
        labels = self.weights.spec.labels
        self.roster.query(self.grid, labels, self.outcome.cost, number)

    def train(
        self, number: int, plans: Mapping[int, RoundPlan]
    ) -> Iterator[tuple[Participant, Reply, Tensors]]:
        """Have nodes train by their plans; yield each usable reply with its decoded deltas."""
        for participant, reply in self._talk(MessageType.TRAIN, number, plans):
            plan = plans[participant.node]
            try:
                deltas = self._checked_deltas(reply, plan)
            except FedBTError as error:
                self.roster.refuse(number, participant.name, str(error))
                continue
            yield participant, reply, deltas

    def evaluate(self, number: int) -> Iterator[Reply]:
        """Have every participant evaluate; delivers the round's result to each as well."""
        no_plans = dict.fromkeys(self.roster.participants)
        for _, reply in self._talk(MessageType.EVALUATE, number, no_plans):
            yield reply

    def _checked_deltas(self, reply: Reply, plan: RoundPlan) -> Tensors:
        """Decode and check a whole reply before any of it is used."""
        sent = reply.deltas or {}
        wanted = set(plan.trained_parts)
        extra = sorted(sent.keys() - wanted)
        if extra:
            raise FedBTError(f"sent a delta of {extra[0]!r}, which nobody asked for")
        missing = sorted(wanted - sent.keys())
        if missing:
            raise FedBTError(f"sent no delta of {missing[0]!r}")
        if not reply.examples:
            raise FedBTError("says that it trained on 0 examples")
        deltas: Tensors = {}
        for part in plan.trained_parts:
            encoded = sent[part]
            shapes = self.weights.shapes(part)
            decoded = decode(encoded.arrays, encoded.header, shapes)
            for name, tensor in decoded.items():
                _check_step(name, tensor)
            deltas |= decoded
        return deltas

    def _talk(
        self,
        kind: str,
        number: int,
        plans: Mapping[int, RoundPlan | None],
    ) -> Iterator[tuple[Participant, Reply]]:
        """Send every client what it lacks and its plan; yield good replies, book all bytes."""
        exchange = Exchange(self.grid, kind, str(number), self.timeout)
        for node, plan in plans.items():
            self._ask(exchange, self.roster.participants[node], plan)
        asked_again: set[int] = set()
        for node, message in exchange.replies():
            participant = self.roster.participants[node]
            reply = self._read(participant, message, number, kind)
            if reply is None:
                continue
            participant.held = dict(reply.held or {})
            if reply.status != LACKING:
                yield participant, reply
            elif node in asked_again:
                reason = "its pool stays incomplete: check the disk of its pool-dir"
                self.roster.refuse(number, participant.name, reason)
            else:
                # its pool is not what it told before: bring it up to date, once
                asked_again.add(node)
                log.info(
                    "fedbt: round %d: %s lacks parts of its pool, sending them",
                    number,
                    participant.name,
                )
                self._ask(exchange, participant, plans[node], whole=True)
        self._refuse_unheard(exchange, number)

    def _refuse_unheard(self, exchange: Exchange, number: int) -> None:
        for node in exchange.undelivered:
            name = self.roster.participants[node].name
            self.roster.refuse(number, name, "Flower did not take the message to it")
        for node in exchange.silent:
            name = self.roster.participants[node].name
            self.roster.refuse(number, name, "did not answer in time (round-timeout)")

    def _ask(
        self,
        exchange: Exchange,
        participant: Participant,
        plan: RoundPlan | None,
        whole: bool = False,
    ) -> None:
        """Send one client its request and book it; without a plan, to evaluate.

        `whole` sends values, not deltas: to a client whose pool is not what it had said.
        """
        updates = self.state.updates_for(participant.held, whole)
        sync = Sync(self.roster.lineage, updates, self.state.states())
        request = Request(sync, self.weights.spec.labels, plan)
        size = exchange.send(participant.node, request_record(request))
        if not size:
            return
        sent = Downlink()
        for update in updates:
            cause = update.cause
            if self.roster.draws and cause is Cause.CATCH_UP and not whole:
                cause = Cause.ROUND  # late by plan: it was not drawn
            sent.add(cause, update.encoded.nbytes)
        self.outcome.cost.book_request(sent, size, evaluation=plan is None)
        if whole:
            self.outcome.cost.healed_parts += len(updates)
        if sent.round:
            self.outcome.full_bytes_down += self._full_bytes()

    def _read(
        self,
        participant: Participant,
        message: Message,
        number: int,
        kind: str,
    ) -> Reply | None:
        """Read and book one reply; None when it can't be used."""
        cost = self.outcome.cost
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
            self.roster.refuse(number, participant.name, str(error))
            return None
        cost.book_work(reply.costs)
        if reply.deltas:
            cost.uplink_payload_bytes += sum(encoded.nbytes for encoded in reply.deltas.values())
            self.outcome.full_bytes_up += self._full_bytes()
        return reply

    def _full_bytes(self) -> int:
        spec = self.weights.spec
        architecture = self.weights.checkpoint.architecture
        return full_model_bytes(architecture, spec.task.head, len(spec.labels))


def _check_step(name: str, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        return
    bounds = torch.aminmax(tensor)  # one pass, without a copy of magnitudes
    least = bounds.min.item()
    most = bounds.max.item()
    if max(-least, most) > LARGEST_STEP:
        raise FedBTError(
            f"sent a delta of {name} of more than {LARGEST_STEP:g}: lower learning-rate"
        )
