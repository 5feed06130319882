"""One run from its settings to its report: its reference, its strategy, its exported model."""

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
from fedbt_app.report.tables import left_out
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
        for warning in self._checkpoint.tokenizer_facts.warnings:
            log.warning("fedbt: %s", warning)
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
            self._config.max_length,
        )
        result = report.write(self._folder, record)
        self._snapshot.remove()
        for warning in record.warnings:
            log.warning("fedbt: %s", warning)
        for client, reason in left_out(result).items():
            log.warning("fedbt: left out: %s: %s", client, reason)
        log.info(
            "fedbt: report in %s, model in %s", self._folder / "report.md", self._folder / "model"
        )
        return result

    def _prepare_output(self) -> Callable[[RoundEntry], None]:
        """Clear what an earlier run left in the output folder; returns what notes a round there."""
        done = []
        finished = None
        if self._stopped:
            done = self._stopped.outcome.rounds
            finished = len(done)
        add_scalars = tracking.board(self._folder, self._config.tensorboard, finished)
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
        config = self._config
        outcome = rounds.outcome
        clients = [_about(participant) for participant in rounds.roster.participants.values()]
        reference_source = "predicted"
        reference = _predicted_reference(outcome)
        measured = self._like_reference(clients)
        if measured:
            reference_source = "measured"
            reference = measured["cost"]
        last = outcome.rounds[-1].metrics
        return report.RunRecord(
            method=config.method,
            task=config.task,
            model=config.model,
            seed=config.seed,
            rounds=outcome.rounds,
            cost=outcome.cost,
            reference=reference,
            reference_source=reference_source,
            reference_same_flops=outcome.cost.same_flops,
            initial=rounds.initial,
            final={name: last[name] for name in rounds.initial},
            client_metrics=outcome.client_metrics,
            majority=self._test.majority,
            clients=clients,
            test={
                "rows": len(self._test.rows),
                "available": self._test.available,
                "fit": asdict(self._test.fit),
            },
            warnings=self._warnings(rounds),
            refused=[asdict(refusal) for refusal in rounds.roster.refusals],
            data=examples.describe(config),
            base_fingerprint=self._fingerprint,
            tokenizer_fingerprint=self._checkpoint.tokenizer_facts.fingerprint,
            labels=list(rounds.labels),
            model_dir=str(self._folder / "model"),
            config=config.values(),
            versions=_versions(),
        )

    def _warnings(self, rounds: Rounds) -> list[str]:
        """Return what a person should know before trusting the scores."""
        found = [*self._checkpoint.tokenizer_facts.warnings, *rounds.warnings]
        found += [f"central test set: {warning}" for warning in self._test.fit.warnings]
        for participant in rounds.roster.participants.values():
            for warning in participant.capabilities.fit.warnings:
                found.append(f"{participant.name}: {warning}")
        return found

    def _measured_reference(self) -> dict[str, Any] | None:
        """Return the report of the finished full-model run that `reference` names, if any.

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
        method = other["method"]
        if method != FULL:
            raise FedBTError(
                f"reference {config.reference} has method {method!r}, not {FULL!r}: name another"
            )
        mine = {
            "task": config.task,
            "model": config.model,
            "base_fingerprint": self._fingerprint,
            "data": examples.describe(config),
            "rounds": [None] * config.num_rounds,
            "config": config.values(),
        }
        unlike = ", ".join(report.differences(other | mine, other))
        if unlike:
            raise FedBTError(
                f"reference {config.reference} differs from this run in {unlike}: "
                "name a full run like it"
            )
        return other

    def _like_reference(self, clients: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the reference if its clients were like these; else the predicted one serves."""
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
        "fit": asdict(capabilities.fit),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = version(name)
    return versions


def _predicted_reference(outcome: Outcome) -> dict[str, float | None]:
    """Return the costs of full-model averaging by stock steps: same batches, same exchanges."""
    return {
        "train_flops": outcome.cost.stock_flops,
        "uplink_bytes": outcome.full_bytes_up,
        "downlink_bytes": outcome.full_bytes_down,
    }
