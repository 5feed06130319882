"""The server's strategy: who trains what, who gets what, and what becomes of the deltas.

It drives Flower's Grid itself instead of subclassing `flwr.serverapp.strategy.Strategy`: that loop
sends every client the same arrays, holds all replies in memory, averages metrics and goes on
silently when nobody answered, each of which is wrong here.
"""

import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedbt_app.aggregation import OPTIMIZERS
from fedbt_app.aggregation.base import ServerOptimizer
from fedbt_app.choices import made
from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.weights import Weights, model_spec
from fedbt_app.parts import HEAD
from fedbt_app.privacy import mechanisms
from fedbt_app.progress.events import BeforeTraining, Metrics, WentOn
from fedbt_app.server import spellings
from fedbt_app.server.dialogue import Dialogue
from fedbt_app.server.roster import Roster
from fedbt_app.server.rounds import Hooks, Rounds
from fedbt_app.server.snapshot import Progress
from fedbt_app.server.state import GlobalState
from fedbt_app.tasks import TASKS

log = logging.getLogger("flwr")
TEST_SET = "the central test set"  # as a writer of labels


@dataclass(frozen=True)
class FedBT:
    """Federated training of selected blocks.

    Attributes
    ----------
    test_labels
        names in the central test set: outputs for those too, though no client may have any
    """

    config: RunConfig
    checkpoint: Checkpoint
    test_labels: Iterable[str] = ()

    def __post_init__(self) -> None:
        """Refuse settings that do not fit the model."""
        self.checkpoint.check_length(self.config.max_length)
        # refuses blocks that the model has not
        self.config.plan(self.checkpoint.architecture.depth)

    def start(
        self,
        grid: Grid,
        hooks: Hooks | None = None,
        stopped: Progress | None = None,
    ) -> Rounds:
        """Do all rounds, or those that a stopped run had yet to do; returns them, done.

        Raises
        ------
        FedBTError
            When too few clients connect, none is accepted, too few replies of a round are usable,
            or the stopped run had another base.
        """
        hooks = hooks or Hooks()
        if stopped:
            rounds = self._resume(grid, hooks, stopped)
        else:
            rounds = self._begin(grid, hooks)
        rounds.run()
        return rounds

    def _begin(self, grid: Grid, hooks: Hooks) -> Rounds:
        outcome = Outcome()
        labels = TASKS[self.config.task].given_labels(self.config.label_names)
        roster = Roster(self.config, self.checkpoint, uuid.uuid4().hex, labels)
        roster.gather(grid, outcome.cost)
        state = GlobalState(self.checkpoint, self.config.codec, self._optimizer())
        dialogue = self._dialogue(grid, roster, state, outcome)
        nodes = len(set(grid.get_node_ids()))
        rounds = self._rounds(dialogue, hooks, nodes)
        rounds.introduce(HEAD)
        rounds.initial.update(hooks.evaluate(rounds.weights))
        log.info("fedbt: %s", BeforeTraining(Metrics(rounds.initial)))
        rounds.keep()
        return rounds

    def _resume(self, grid: Grid, hooks: Hooks, stopped: Progress) -> Rounds:
        self._check_base(stopped)
        outcome = stopped.outcome
        roster = Roster(self.config, self.checkpoint, stopped.lineage, stopped.labels)
        roster.gather(grid, outcome.cost)
        roster.refusals[:0] = stopped.refusals
        state = GlobalState(
            self.checkpoint,
            codec=self.config.codec,
            optimizer=self._optimizer(),
            parts=dict(stopped.parts),
        )
        dialogue = self._dialogue(grid, roster, state, outcome)
        rounds = self._rounds(dialogue, hooks, stopped.nodes)
        rounds.initial.update(stopped.initial)
        for mechanism, memory in zip(rounds.mechanisms, stopped.mechanisms, strict=True):
            mechanism.memory = memory
        self._tell(outcome)
        return rounds

    def _tell(self, outcome: Outcome) -> None:
        went_on = WentOn(
            round=len(outcome.rounds),
            rounds=self.config.num_rounds,
            tflop=outcome.cost.train_flops / 1e12,
            mb_up=outcome.cost.uplink_bytes / 1e6,
            mb_down=outcome.cost.downlink_bytes / 1e6,
        )
        log.info("fedbt: %s", went_on)

    def _dialogue(
        self,
        grid: Grid,
        roster: Roster,
        state: GlobalState,
        outcome: Outcome,
    ) -> Dialogue:
        """Settle the label set, now that the clients are known, and with it the model."""
        spec = model_spec(self.config, self._labels(roster))
        return Dialogue(
            grid=grid,
            roster=roster,
            state=state,
            weights=Weights(self.checkpoint, state.tensors, spec),
            outcome=outcome,
            timeout=self.config.round_timeout,
        )

    def _rounds(self, dialogue: Dialogue, hooks: Hooks, nodes: int) -> Rounds:
        rounds = Rounds(
            config=self.config,
            dialogue=dialogue,
            mechanisms=mechanisms(self.config),
            nodes=nodes,
            hooks=hooks,
        )
        rounds.warnings.extend(self._label_warnings(dialogue.roster))
        for warning in rounds.warnings:
            log.warning("fedbt: %s", warning)
        return rounds

    def _labels(self, roster: Roster) -> tuple[str, ...]:
        """Return the label set; FedBTError when it leaves nothing to learn."""
        task = TASKS[self.config.task]
        reported = [
            participant.capabilities.label_counts for participant in roster.participants.values()
        ]
        trained = roster.labels or task.merged_labels(reported)
        if task.label_key and len(trained) < 2:
            key = task.label_key.replace("_", "-")
            raise FedBTError(
                f"all training data has one label, {', '.join(map(repr, trained))}: there is nothing to learn; "
                f"set {key} to the column of the labels, or add data with others"
            )
        return roster.labels or task.merged_labels([*reported, self.test_labels])

    def _label_warnings(self, roster: Roster) -> list[str]:
        """Name labels that differ in their spelling alone; a given label set has them on purpose."""
        if self.config.label_names:
            return []
        plain_name = TASKS[self.config.task].plain_name
        writers = {
            participant.name: participant.capabilities.label_counts
            for participant in roster.participants.values()
        }
        written = writers | {TEST_SET: self.test_labels}
        return spellings.warnings(
            {
                writer: {name for name in map(plain_name, labels) if name}
                for writer, labels in written.items()
            }
        )

    def _optimizer(self) -> ServerOptimizer:
        return made(OPTIMIZERS, self.config.server_optimizer, self.config)

    def _check_base(self, stopped: Progress) -> None:
        mine = self.checkpoint.fingerprint(TASKS[self.config.task].head)
        if stopped.fingerprint != mine:
            raise FedBTError(
                "the stopped run started from another base: "
                f"it was {stopped.fingerprint[:12]}, {self.config.model!r} is {mine[:12]} now; "
                "put the same checkpoint there"
            )
