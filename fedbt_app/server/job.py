"""One run from its settings to its report: what it is set against, the strategy, the exported
model.
"""

import logging
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from flwr.serverapp import Grid

from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome, RoundEntry
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.plan import FULL
from fedbt_app.report import report, tracking
from fedbt_app.report.export import export, model_card, refuse_to_overwrite
from fedbt_app.server.central import CentralTest
from fedbt_app.server.roster import Participant
from fedbt_app.server.rounds import Hooks, Rounds
from fedbt_app.server.snapshot import Progress, Snapshot
from fedbt_app.server.strategy import FedBT
from fedbt_app.tasks import TASKS

log = logging.getLogger("flwr")
LIBRARIES = ("flwr", "torch", "transformers", "datasets", "peft")


class Job:
    """A run, with all that can be read and refused before the first client is asked.

    Raises
    ------
    FedBTError
        When settings, model, data, reference or the stopped run do not fit each other; nothing is
        written or removed then.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._folder = config.output_folder.resolve()
        self._snapshot = Snapshot(self._folder)
        self._stopped = self._snapshot.load(config) if config.resume else None
        base = find_model(config.model)
        refuse_to_overwrite(self._folder / "model", base)
        self._checkpoint = Checkpoint(base, config.cache_folder)
        self._fingerprint = self._checkpoint.fingerprint(TASKS[config.task].head)
        self._reference = self._measured_reference()
        self._test = CentralTest(config, self._checkpoint)

        self._strategy = FedBT(config, self._checkpoint, self._test.label_counts)

    def run(self, grid: Grid) -> dict[str, Any]:
        """Train, export the model and write the report; returns the report."""
        hooks = Hooks(self._test.evaluate, self._prepare_output(), self._keep)
        rounds = self._strategy.start(grid, hooks, self._stopped)
        record = self._record(rounds)
        export(
            self._folder / "model",
            rounds.weights,
            model_card(report.to_json(record), self._checkpoint),
        )
        result = report.write(self._folder, record)
        self._snapshot.remove()
        log.info(
            "fedbt: report in %s, model in %s", self._folder / "report.md", self._folder / "model"
        )
        return result

    def _prepare_output(self) -> Callable[[RoundEntry], None]:
        """Clear what an earlier run left in the output folder; returns what takes down a finished
        round there.
        """
        done = self._stopped.outcome.rounds if self._stopped else []
        add_scalars = tracking.board(
            self._folder, self._config.tensorboard, len(done) if self._stopped else None
        )
        report.clear(self._folder)
        for entry in done:
            report.append_round(self._folder, entry)
        if not self._stopped:
            self._snapshot.remove()

        def take_down(entry: RoundEntry) -> None:
            report.append_round(self._folder, entry)
            add_scalars(entry)

        return take_down

    def _keep(self, progress: Progress) -> None:
        self._snapshot.store(self._config, progress)

    def _record(self, rounds: Rounds) -> report.RunRecord:
        config, outcome = self._config, rounds.outcome
        clients = [_about(participant) for participant in rounds.roster.participants.values()]
        measured = self._like_reference(clients)
        return report.RunRecord(
            method=config.method,
            task=config.task,
            model=config.model,
            seed=config.seed,
            rounds=outcome.rounds,
            cost=outcome.cost,
            reference=measured["cost"] if measured else _predicted_reference(outcome),
            reference_source="measured" if measured else "predicted",
            reference_same_flops=outcome.cost.same_flops,
            initial=rounds.initial,
            final={name: outcome.rounds[-1].metrics[name] for name in rounds.initial},
            client_metrics=outcome.client_metrics,
            majority=self._test.majority,
            clients=clients,
            refused=[asdict(refusal) for refusal in rounds.roster.refusals],
            warnings=rounds.warnings,
            data=examples.describe(config),
            base_fingerprint=self._fingerprint,
            labels=list(rounds.labels),
            model_dir=str(self._folder / "model"),
            config=config.values(),
            versions={"python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
        )

    def _measured_reference(self) -> dict[str, Any] | None:
        """Return the report of the finished full-model run that `reference` names; None when it
        names none.

        Raises
        ------
        FedBTError
            When it is not of a full-model run like this one, as far as can be told before the
            clients are known.
        """
        config = self._config
        if not config.reference:
            return None
        other = report.load(config.reference)
        if other["method"] != FULL:
            raise FedBTError(
                f"reference {config.reference} has method {other['method']!r}, not {FULL!r}: name another"
            )
        mine = {
            "task": config.task,
            "model": config.model,
            "base_fingerprint": self._fingerprint,
            "data": examples.describe(config),
            "rounds": [None] * config.num_rounds,
            "config": config.values(),
        }
        if unlike := report.differences(other | mine, other):
            raise FedBTError(
                f"reference {config.reference} differs from this run in {', '.join(unlike)}: name a full run like it"
            )
        return other

    def _like_reference(self, clients: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the reference if its clients were like these; else costs are set against predicted
        ones.
        """
        measured = self._reference
        if measured is None:
            return None
        unlike = report.differences(measured | {"clients": clients}, measured)
        if not unlike:
            return measured
        log.warning(
            "fedbt: reference differs in %s: costs are set against predicted ones",
            ", ".join(unlike),
        )
        return None


def _about(participant: Participant) -> dict[str, Any]:
    capabilities = participant.capabilities
    return {
        "name": participant.name,
        "examples": capabilities.examples,
        "local_depth": capabilities.local_depth,
        "device": capabilities.device,
    }


def _predicted_reference(outcome: Outcome) -> dict[str, float | None]:
    """Return what full-model averaging by stock steps would have cost for the same batches and
    exchanges.
    """
    return {
        "train_flops": outcome.cost.stock_flops,
        "uplink_bytes": outcome.full_bytes_up,
        "downlink_bytes": outcome.full_bytes_down,
    }
