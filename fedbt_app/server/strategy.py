"""The server's strategy: who trains what, who gets what, and what becomes of the deltas.

It drives Flower's Grid itself instead of subclassing `flwr.serverapp.strategy.Strategy`: that loop
sends every client the same arrays, holds all replies in memory, averages metrics and goes on
silently when nobody answered, each of which is wrong here.
"""

import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.weights import Weights, model_spec, new_tensors
from fedbt_app.parts import HEAD
from fedbt_app.plan import RoundPlan, plan_round, scheduled_blocks
from fedbt_app.progress.events import BeforeTraining, Blocks, HeldOut, Metrics, Replied, RoundBegan, RoundDone, WentOn
from fedbt_app.server.aggregation import WeightedSum
from fedbt_app.server.dialogue import Dialogue
from fedbt_app.server.roster import Participant, Roster
from fedbt_app.server.snapshot import Progress
from fedbt_app.server.state import GlobalState
from fedbt_app.tasks.tasks import merge_labels

log = logging.getLogger("flwr")
REPEATS = 3  # of one round, with below-minimum=repeat


@dataclass(frozen=True)
class _Replies:
    """What the usable replies of a round come to."""

    mean: WeightedSum
    blocks: set[int]
    losses: list[tuple[int, float]]  # examples and training loss, of each


class FedBT:
    """Federated training of selected blocks.

    Parameters
    ----------
    evaluate : called with the global state after each round; returns metrics on the central test set
    on_round : called with each finished round
    test_labels : names in the central test set: outputs for those too, though no client may have any
    keep : called with the progress before the first round, after each, and before a stop below `min-replies`
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        evaluate: Callable[["FedBT"], dict[str, float]],
        on_round: Callable[[RoundEntry], None],
        test_labels: Iterable[str] = (),
        keep: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        positions = checkpoint.architecture.positions
        if config.max_length > positions:
            raise FedBTError(f"max-length={config.max_length} but {config.model} has {positions} positions: lower it")
        depth = checkpoint.architecture.depth
        scheduled_blocks(config.schedule, config.task, depth, depth, config.num_rounds)  # refuses what is none
        self.config, self.checkpoint = config, checkpoint
        self._evaluate, self._on_round, self._test_labels, self._keep = evaluate, on_round, list(test_labels), keep
        self.lineage = uuid.uuid4().hex
        self.roster = Roster(config, checkpoint)
        self.labels: tuple[str, ...] = config.label_names
        self.outcome = Outcome()
        self.initial: dict[str, float] = {}

    def start(self, grid: Grid, stopped: Progress | None = None) -> Outcome:
        """Run all rounds, or those that a stopped run had yet to do.

        Raises
        ------
        FedBTError
            When too few clients connect, none is accepted, too few replies of a round are usable, or the stopped run
            had another base.
        """
        if stopped:
            self._check_base(stopped)
            self.lineage, self.labels, self.outcome = stopped.lineage, stopped.labels, stopped.outcome
        self.roster.gather(grid, self.lineage, self.labels, self.outcome.cost)
        self.nodes = stopped.nodes if stopped else len(set(grid.get_node_ids()))
        reported = [one.capabilities.label_counts for one in self.roster.participants.values()]
        self.labels = self.labels or merge_labels(self.config.task, [*reported, self._test_labels])
        parts = dict(stopped.parts) if stopped else {}
        self.state = GlobalState(self.checkpoint, self.config.codec, self.config.server_momentum, parts)
        self.weights = Weights(self.checkpoint, self.state.tensors, model_spec(self.config, self.labels))
        self._dialogue = Dialogue(
            *(grid, self.lineage, self.roster, self.state, self.weights, self.outcome, self.config.round_timeout)
        )
        if stopped:
            self.initial = stopped.initial
            self.roster.refusals[:0] = stopped.refusals
            done, cost = len(self.outcome.rounds), self.outcome.cost
            costs = (cost.train_flops / 1e12, cost.uplink_bytes / 1e6, cost.downlink_bytes / 1e6)
            log.info("fedbt: %s", WentOn(done, self.config.num_rounds, *costs))
        else:
            self._introduce(HEAD)
            self.initial = self._evaluate(self)
            log.info("fedbt: %s", BeforeTraining(Metrics(self.initial)))
            self._keep(self._progress())
        for round_ in range(len(self.outcome.rounds) + 1, self.config.num_rounds + 1):
            self._round(round_)
        return self.outcome

    def _progress(self) -> Progress:
        return Progress(
            lineage=self.lineage,
            labels=self.labels,
            nodes=self.nodes,
            fingerprint=self.checkpoint.fingerprint(self.config.task),
            initial=self.initial,
            outcome=self.outcome,
            refusals=self.roster.refusals,
            parts=self.state.parts,
        )

    def _check_base(self, stopped: Progress) -> None:
        mine = self.checkpoint.fingerprint(self.config.task)
        if stopped.fingerprint != mine:
            raise FedBTError(
                f"the stopped run started from another base: it was {stopped.fingerprint[:12]}, {self.config.model!r} "
                f"is {mine[:12]} now; put the same checkpoint there"
            )

    # -- a round ----------------------------------------------------------------------------------

    def _round(self, round_: int) -> None:
        begin = time.monotonic()
        replies = self._enough_replies(round_)
        self.state.apply(replies.mean.mean())
        last = round_ == self.config.num_rounds
        if self.config.client_evaluation == "every" or (last and self.config.client_evaluation == "final"):
            self._evaluate_on_clients(round_)
        examples = sum(weight for weight, _ in replies.losses)
        metrics = {"train_loss": sum(weight * loss for weight, loss in replies.losses) / examples}
        if last or self.config.central_evaluation == "every":
            metrics |= self._evaluate(self)
        entry = RoundEntry(
            round=round_,
            trained_blocks=sorted(replies.blocks),
            clients=len(replies.losses),
            train_flops=self._booked_since("train_flops"),
            uplink_bytes=self._booked_since("uplink_bytes"),
            downlink_bytes=self._booked_since("downlink_bytes"),
            seconds=time.monotonic() - begin,
            metrics=metrics,
        )
        self.outcome.rounds.append(entry)
        self._keep(self._progress())
        self._on_round(entry)
        done = RoundDone(
            *(round_, self.config.num_rounds, entry.seconds, Blocks(entry.trained_blocks), Metrics(metrics)),
            *(entry.uplink_bytes / 1e6, entry.downlink_bytes / 1e6, entry.train_flops / 1e12),
        )
        log.info("fedbt: %s", done)

    def _booked_since(self, cost: str) -> int:
        """Return what was booked since the last finished round: that of repeated and stopped attempts too."""
        booked: int = getattr(self.outcome.cost, cost) - sum(getattr(entry, cost) for entry in self.outcome.rounds)
        return booked

    def _enough_replies(self, round_: int) -> _Replies:
        """Have a round's clients train; below `min-replies` again, or stop. Only the books show what did not count."""
        repeats = REPEATS if self.config.below_minimum == "repeat" else 0
        for attempt in itertools.count():
            self._dialogue.welcome(round_)
            chosen = self.roster.chosen(round_, attempt)
            replies = self._train(round_, chosen)
            if len(replies.losses) >= self.config.min_replies:
                break
            problem = (
                f"round {round_}: {len(replies.losses)} of {len(chosen)} clients gave a usable reply, "
                f"min-replies={self.config.min_replies}"
            )
            if reason := self.roster.last_reason(round_):
                problem += f" ({reason})"
            if attempt == repeats:
                self._keep(self._progress())
                raise FedBTError(f"{problem}: go on with `fedbt run --resume {self.config.output_folder}`")
            log.warning("fedbt: %s: the round is repeated (%d of %d)", problem, attempt + 1, repeats)
        return replies

    def _train(self, round_: int, chosen: list[Participant]) -> _Replies:
        replies = _Replies(WeightedSum(), set(), [])
        plans = {one.node: self._plan(one, round_) for one in chosen}
        log.info("fedbt: %s", RoundBegan(round_, self.config.num_rounds, len(plans)))
        for one, reply, deltas in self._dialogue.train(round_, plans):
            replies.mean.add(deltas, reply.examples)
            replies.blocks.update(plans[one.node].trained_blocks)
            loss = (reply.metrics or {}).get("train_loss", float("nan"))
            replies.losses.append((reply.examples, loss))
            replied = Replied(
                *(round_, self.config.num_rounds, one.name, loss, reply.examples),
                *(reply.costs.train_flops / 1e12, reply.costs.uplink_serialised_bytes / 1e6, reply.costs.seconds),
            )
            log.info("fedbt: %s", replied)
        return replies

    def _plan(self, one: Participant, round_: int) -> RoundPlan:
        config, depth = self.config, self.checkpoint.architecture.depth
        local_depth = one.capabilities.local_depth or config.local_depth
        plan = plan_round(
            *(config.method, config.task, depth, local_depth, config.num_rounds, round_ - 1, config.seed, one.name),
            config.schedule,
        )
        for part in plan.trained_parts:
            self._introduce(part)
        return plan

    def _introduce(self, part: str) -> None:
        """Make those tensors of `part` that the base lacks, when it is needed for the first time."""
        if part not in self.state.states() and (lacking := self.weights.lacking(part)):
            self.state.introduce(part, new_tensors(lacking, self.config.seed))

    def _evaluate_on_clients(self, round_: int) -> None:
        """Evaluate on held-out rows; delivers the round's result to every client as well."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for reply in self._dialogue.evaluate(round_):
            for name, value in (reply.metrics or {}).items():
                if math.isfinite(value):
                    sums[name] = sums.get(name, 0.0) + reply.examples * value
                    weights[name] = weights.get(name, 0) + reply.examples
        self.outcome.client_metrics = {name: sums[name] / weights[name] for name in sums if weights[name]}
        examples = max(weights.values(), default=0)
        if examples:
            log.info("fedbt: %s", HeldOut(examples, Metrics(self.outcome.client_metrics)))
