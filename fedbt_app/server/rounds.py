"""The rounds of a run, once its clients and its labels are known."""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fedbt_app.aggregation import RULES
from fedbt_app.aggregation.base import Rule
from fedbt_app.choices import made
from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.model.weights import Weights, new_tensors
from fedbt_app.plan import RoundPlan, RunPlan
from fedbt_app.privacy.base import Mechanism
from fedbt_app.progress.events import Blocks, HeldOut, Metrics, Replied, RoundBegan, RoundDone
from fedbt_app.server.dialogue import Dialogue
from fedbt_app.server.roster import Participant, Roster
from fedbt_app.server.snapshot import Progress
from fedbt_app.server.state import GlobalState
from fedbt_app.wire.messages import Reply

log = logging.getLogger("flwr")
REPEATS = 3  # of one round, with below-minimum=repeat


@dataclass(frozen=True)
class Hooks:
    """What is done at certain points of a run.

    Attributes
    ----------
    evaluate
        called with the global model before the first and after each round; returns central metrics
    on_round : called with each finished round
    keep
        called with the progress before the first round, after each, and before a stop below
        `min-replies`
    """

    evaluate: Callable[[Weights], dict[str, float]] = lambda weights: {}
    on_round: Callable[[RoundEntry], None] = lambda entry: None
    keep: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True)
class Replies:
    """What the usable replies of a round come to.

    Attributes
    ----------
    losses : (examples, training loss) of each
    """

    rule: Rule
    blocks: set[int] = field(default_factory=set)
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def train_loss(self) -> float:
        """The mean training loss, weighted by examples."""
        examples = sum(weight for weight, _ in self.losses)
        return sum(weight * loss for weight, loss in self.losses) / examples


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run; once `run` has returned, what they have come to.

    Attributes
    ----------
    nodes : how many were connected when the run began
    initial : metrics before training
    warnings : what a person should know before trusting the scores
    """

    config: RunConfig
    dialogue: Dialogue
    mechanisms: list[Mechanism]
    nodes: int
    hooks: Hooks
    initial: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def roster(self) -> Roster:
        """Who takes part."""
        return self.dialogue.roster

    @property
    def state(self) -> GlobalState:
        """The global parts."""
        return self.dialogue.state

    @property
    def weights(self) -> Weights:
        """The global model."""
        return self.dialogue.weights

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names, in the order of their ids."""
        return self.weights.spec.labels

    @property
    def outcome(self) -> Outcome:
        """The books."""
        return self.dialogue.outcome

    @property
    def plan(self) -> RunPlan:
        """What the run trains."""
        return self.config.plan(self.weights.checkpoint.architecture.depth)

    def run(self) -> None:
        """Do all that are yet to be done."""
        done = len(self.outcome.rounds)
        for number in range(done + 1, self.config.num_rounds + 1):
            self._round(number)

    def keep(self) -> None:
        """Store the progress."""
        weights = self.weights
        progress = Progress(
            lineage=self.roster.lineage,
            labels=weights.spec.labels,
            nodes=self.nodes,
            fingerprint=weights.checkpoint.fingerprint(weights.spec.task.head),
            initial=self.initial,
            outcome=self.outcome,
            refusals=self.roster.refusals,
            parts=self.state.parts,
            mechanisms=[mechanism.memory for mechanism in self.mechanisms],
        )
        self.hooks.keep(progress)

    def introduce(self, part: str) -> None:
        """Make the tensors of `part` that the base lacks, when it is needed for the first time."""
        if part in self.state.states():
            return
        lacking = self.weights.lacking(part)
        if lacking:
            self.state.introduce(part, new_tensors(lacking, self.config.seed))

    # -- a round ----------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        begin = time.monotonic()
        replies = self._enough_replies(number)
        self.state.apply(replies.rule.result())
        if self._now(self.config.client_evaluation, number):
            self._evaluate_on_clients(number)
        metrics = {"train_loss": replies.train_loss}
        if self._last(number) or self.config.central_evaluation == "every":
            metrics |= self.hooks.evaluate(self.weights)
        entry = RoundEntry(
            round=number,
            trained_blocks=sorted(replies.blocks),
            clients=len(replies.losses),
            train_flops=self.outcome.flops_since_last_round,
            uplink_bytes=self.outcome.uplink_since_last_round,
            downlink_bytes=self.outcome.downlink_since_last_round,
            seconds=time.monotonic() - begin,
            metrics=metrics,
        )
        self.outcome.rounds.append(entry)
        self.keep()
        self.hooks.on_round(entry)
        self._tell(entry)

    def _last(self, number: int) -> bool:
        return number == self.config.num_rounds

    def _now(self, when: str, number: int) -> bool:
        """Say whether what a setting asks for `every` round, or the `final` one, is due."""
        return when == "every" or (when == "final" and self._last(number))

    def _tell(self, entry: RoundEntry) -> None:
        done = RoundDone(
            round=entry.round,
            rounds=self.config.num_rounds,
            seconds=entry.seconds,
            blocks=Blocks(entry.trained_blocks),
            metrics=Metrics(entry.metrics),
            mb_up=entry.uplink_bytes / 1e6,
            mb_down=entry.downlink_bytes / 1e6,
            tflop=entry.train_flops / 1e12,
        )
        log.info("fedbt: %s", done)

    def _enough_replies(self, number: int) -> Replies:
        """Have a round's clients train; below `min-replies` again, or stop.

        Only the books show what did not count.
        """
        repeats = 0
        if self.config.below_minimum == "repeat":
            repeats = REPEATS
        for attempt in itertools.count():
            self.dialogue.welcome(number)
            chosen = self.roster.chosen(number, attempt)
            replies = self._train(number, chosen)
            usable = len(replies.losses)
            if usable >= self.config.min_replies:
                break
            problem = self._too_few(number, usable, len(chosen))
            if attempt == repeats:
                self.keep()
                raise FedBTError(
                    f"{problem}: go on with `fedbt run --resume {self.config.output_folder}`"
                )
            log.warning(
                "fedbt: %s: the round is repeated (%d of %d)",
                problem,
                attempt + 1,
                repeats,
            )
        return replies

    def _too_few(self, number: int, usable: int, asked: int) -> str:
        problem = (
            f"round {number}: {usable} of {asked} clients gave a usable reply, "
            f"min-replies={self.config.min_replies}"
        )
        reason = self.roster.last_reason(number)
        if reason:
            problem += f" ({reason})"
        return problem

    def _train(self, number: int, chosen: list[Participant]) -> Replies:
        replies = Replies(made(RULES, self.config.aggregation, self.config))
        plans = {participant.node: self._planned(participant, number) for participant in chosen}
        began = RoundBegan(number, self.config.num_rounds, len(plans))
        log.info("fedbt: %s", began)
        for participant, reply, deltas in self.dialogue.train(number, plans):
            for mechanism in self.mechanisms:
                deltas = mechanism.on_server(deltas)
            replies.rule.add(deltas, reply.examples)
            replies.blocks.update(plans[participant.node].trained_blocks)
            metrics = reply.metrics or {}
            loss = metrics.get("train_loss", math.nan)
            replies.losses.append((reply.examples, loss))
            self._tell_reply(number, participant, reply, loss)
        return replies

    def _tell_reply(
        self,
        number: int,
        participant: Participant,
        reply: Reply,
        loss: float,
    ) -> None:
        replied = Replied(
            round=number,
            rounds=self.config.num_rounds,
            client=participant.name,
            loss=loss,
            examples=reply.examples,
            tflop=reply.costs.train_flops / 1e12,
            mb_up=reply.costs.uplink_serialised_bytes / 1e6,
            seconds=reply.costs.seconds,
        )
        log.info("fedbt: %s", replied)

    def _planned(self, participant: Participant, number: int) -> RoundPlan:
        local_depth = participant.capabilities.local_depth or self.config.local_depth
        plan = self.plan.round(number - 1, participant.name, local_depth)
        for part in plan.trained_parts:
            self.introduce(part)
        return plan

    def _evaluate_on_clients(self, number: int) -> None:
        """Evaluate on held-out rows; delivers the round's result to every client as well.

        Counts are summed over the sites: the scores are those of one process over all of their rows.
        """
        sums: Counter[str] = Counter()
        examples = 0
        for reply in self.dialogue.evaluate(number):
            sums.update(reply.tally or {})
            examples += reply.examples
        if not sums:
            return
        self.outcome.client_metrics = self.weights.spec.task.scored(sums, self.labels)
        log.info("fedbt: %s", HeldOut(examples, Metrics(self.outcome.client_metrics)))
