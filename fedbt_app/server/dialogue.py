"""The server's talk with the clients: pools are brought up to date, replies checked, every byte
booked.
"""

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
    """The talk with the clients of one run; a reply that cannot be used is refused and costs the
    round nothing else.

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

    def welcome(self, round_: int) -> None:
        """Query the nodes that joined, or came back, since the last round."""
        self.roster.query(self.grid, self.weights.spec.labels, self.outcome.cost, round_)

    def train(
        self, round_: int, plans: Mapping[int, RoundPlan]
    ) -> Iterator[tuple[Participant, Reply, Tensors]]:
        """Have nodes train by their plans; yield each usable reply with its decoded deltas."""
        for participant, reply in self._talk(MessageType.TRAIN, round_, plans):
            try:
                deltas = self._checked_deltas(reply, plans[participant.node])
            except FedBTError as error:
                self.roster.refuse(round_, participant.name, str(error))
                continue
            yield participant, reply, deltas

    def evaluate(self, round_: int) -> Iterator[Reply]:
        """Have every participant evaluate; delivers the round's result to each as well."""
        for _, reply in self._talk(
            MessageType.EVALUATE, round_, dict.fromkeys(self.roster.participants)
        ):
            yield reply

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
                if (
                    tensor.numel()
                    and max(abs(bound.item()) for bound in torch.aminmax(tensor)) > LARGEST_STEP
                ):
                    raise FedBTError(
                        f"sent a delta of {name} of more than {LARGEST_STEP:g}: lower learning-rate"
                    )
            deltas |= decoded
        return deltas

    def _talk(
        self, kind: str, round_: int, plans: Mapping[int, RoundPlan | None]
    ) -> Iterator[tuple[Participant, Reply]]:
        """Send every client what it lacks and its plan; yield (participant, good reply), book all
        bytes.
        """
        exchange = Exchange(self.grid, kind, str(round_), self.timeout)
        asked_again: set[int] = set()
        for node, plan in plans.items():
            self._ask(exchange, self.roster.participants[node], plan)
        for node, message in exchange.replies():
            participant = self.roster.participants[node]
            reply = self._read(participant, message, round_, kind)
            if reply is None:
                continue
            participant.held = dict(reply.held or {})
            if reply.status == LACKING and node not in asked_again:
                # its pool is not what it told before: bring it up to date, once
                asked_again.add(node)
                log.info(
                    "fedbt: round %d: %s lacks parts of its pool, sending them",
                    round_,
                    participant.name,
                )
                self._ask(exchange, participant, plans[node], whole=True)
            elif reply.status == LACKING:
                self.roster.refuse(
                    round_,
                    participant.name,
                    "its pool stays incomplete: check the disk of its pool-dir",
                )
            else:
                yield participant, reply
        for node in exchange.undelivered:
            self.roster.refuse(
                round_, self.roster.participants[node].name, "Flower did not take the message to it"
            )
        for node in exchange.silent:
            self.roster.refuse(
                round_,
                self.roster.participants[node].name,
                "did not answer in time (round-timeout)",
            )

    def _ask(
        self,
        exchange: Exchange,
        participant: Participant,
        plan: RoundPlan | None,
        whole: bool = False,
    ) -> None:
        """Send one client its request (to evaluate, without a plan), and book it; `whole` sends
        values, not deltas.
        """
        updates = self.state.updates_for(participant.held, whole)
        sync = Sync(self.roster.lineage, updates, self.state.states())
        size = exchange.send(
            participant.node, request_record(Request(sync, self.weights.spec.labels, plan))
        )
        if not size:
            return
        sent = Downlink()
        for update in updates:
            late_by_plan = self.roster.draws and update.cause is Cause.CATCH_UP and not whole
            sent.add(Cause.ROUND if late_by_plan else update.cause, update.encoded.nbytes)
        self.outcome.cost.book_request(sent, size, evaluation=plan is None)
        self.outcome.cost.healed_parts += len(updates) if whole else 0
        if sent.round:
            self.outcome.full_bytes_down += self._full_bytes()

    def _read(
        self, participant: Participant, message: Message, round_: int, kind: str
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
            self.roster.refuse(round_, participant.name, str(error))
            return None
        cost.book_work(reply.costs)
        if reply.deltas:
            cost.uplink_payload_bytes += sum(encoded.nbytes for encoded in reply.deltas.values())
            self.outcome.full_bytes_up += self._full_bytes()
        return reply

    def _full_bytes(self) -> int:
        spec = self.weights.spec
        return full_model_bytes(
            self.weights.checkpoint.architecture, spec.task.head, len(spec.labels)
        )
