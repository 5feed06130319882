"""The server's side of the Flower app: configuration -> strategy -> exported model and report."""

import logging
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbt_app.config import NO_DATA, RunConfig
from fedbt_app.costs.ledger import Outcome, RoundEntry
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.model.local_model import build, whole_plan
from fedbt_app.report import report, tracking
from fedbt_app.report.export import export, model_card
from fedbt_app.server.snapshot import Snapshot
from fedbt_app.server.strategy import FedBT
from fedbt_app.tasks.tasks import Collator, majority_score, special_tokens
from fedbt_app.training import train

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federated job; on a mistake that a person can mend, say it in one line and fail."""
    try:
        run(grid, RunConfig.load(context.run_config))
    except FedBTError as error:
        log.error("fedbt: error: %s", error)
        raise RuntimeError(str(error)) from None  # Flower takes a SystemExit for success


def run(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """Train, export the model, write the report; returns the report. A run that is resumed goes on where it stopped."""
    folder = config.output_folder.resolve()
    snapshot = Snapshot(folder)
    stopped = snapshot.load(config) if config.resume else None
    checkpoint = Checkpoint(find_model(config.model), config.cache_folder)
    measured = _measured_reference(config, checkpoint)
    test = TestSet(config, checkpoint)

    def on_round(entry: RoundEntry) -> None:
        report.append_round(folder, entry)
        add_scalars(entry)

    strategy = FedBT(
        config,
        checkpoint,
        test.evaluate,
        on_round,
        test.label_counts,
        lambda progress: snapshot.store(config, progress),
    )
    # Only now, as a mistake in the settings must not cost what an earlier run left in the folder.
    add_scalars = tracking.board(folder, config.tensorboard, len(stopped.outcome.rounds) if stopped else None)
    report.clear(folder)
    for entry in stopped.outcome.rounds if stopped else []:
        report.append_round(folder, entry)
    if not stopped:
        snapshot.remove()
    outcome = strategy.start(grid, stopped)
    clients = [
        {
            "name": one.name,
            "examples": one.capabilities.examples,
            "local_depth": one.capabilities.local_depth,
            "device": one.capabilities.device,
        }
        for one in strategy.roster.participants.values()
    ]
    if measured and (unlike := report.differences(measured | {"clients": clients}, measured)):
        log.warning("fedbt: reference differs in %s: costs are set against predicted ones", ", ".join(unlike))
        measured = None
    record = report.RunRecord(
        method=config.method,
        task=config.task,
        model=config.model,
        seed=config.seed,
        rounds=outcome.rounds,
        cost=outcome.cost,
        reference=measured["cost"] if measured else _predicted_reference(outcome),
        reference_source="measured" if measured else "predicted",
        reference_same_flops=outcome.cost.same_flops,
        initial=strategy.initial,
        final={name: outcome.rounds[-1].metrics[name] for name in strategy.initial},
        client_metrics=outcome.client_metrics,
        majority=test.majority,
        clients=clients,
        refused=[asdict(refusal) for refusal in strategy.roster.refusals],
        data=examples.describe(config),
        base_fingerprint=checkpoint.fingerprint(config.task),
        labels=list(strategy.labels),
        model_dir=str(folder / "model"),
        config=config.values(),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("flwr", "torch", "transformers", "datasets", "peft")},
    )
    export(folder / "model", strategy.weights, model_card(report.to_json(record), checkpoint))
    result = report.write(folder, record)
    snapshot.remove()
    log.info("fedbt: report in %s, model in %s", folder / "report.md", folder / "model")
    return result


def _measured_reference(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the report of the finished full-model run that `reference` names; None when it names none.

    Raises
    ------
    FedBTError
        When it is not of a full-model run like this one, as far as can be told before the clients are known.
    """
    if not config.reference:
        return None
    other = report.load(config.reference)
    if other["method"] != "full":
        raise FedBTError(f"reference {config.reference} has method {other['method']!r}, not 'full': name another")
    mine = {
        "task": config.task,
        "model": config.model,
        "base_fingerprint": checkpoint.fingerprint(config.task),
        "data": examples.describe(config),
        "rounds": [None] * config.num_rounds,
        "config": config.values(),
    }
    if unlike := report.differences(other | mine, other):
        raise FedBTError(
            f"reference {config.reference} differs from this run in {', '.join(unlike)}: name a full run like it"
        )
    return other


def _predicted_reference(outcome: Outcome) -> dict[str, float | None]:
    """Return what full-model averaging by stock steps would have cost for the same batches and exchanges."""
    return {
        "train_flops": outcome.cost.stock_flops,
        "uplink_bytes": outcome.full_bytes_up,
        "downlink_bytes": outcome.full_bytes_down,
    }


class TestSet:
    """The central test set, and the global model's metrics on it."""

    def __init__(self, config: RunConfig, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._device = pick_device(config.device)
        self.rows: list[dict[str, Any]] = []
        self.label_counts: dict[str, int] = {}
        if config.dataset != NO_DATA:
            found = examples.test_data(config, checkpoint.tokenizer, checkpoint.tokenizer_id)
            self.rows, self.label_counts = found.to_list(), examples.label_counts(config.task, [found])

    @property
    def majority(self) -> float | None:
        """Accuracy of always answering the most frequent class."""
        if self._config.task != "classification" or not self.rows:
            return None
        return majority_score(self.label_counts)

    def evaluate(self, strategy: FedBT) -> dict[str, float]:
        """Return the metrics of the strategy's global model; none without a test set."""
        if not self.rows:
            return {}
        config = self._config
        tokens = special_tokens(self._checkpoint.tokenizer())
        collator = Collator(config.task, tokens, strategy.labels, config.mask_probability)
        bfloat16 = use_bfloat16(config.precision, self._device)
        local = build(strategy.weights, whole_plan(strategy.weights), self._device, bfloat16)
        return train.evaluate(local, self.rows, collator, train.EVALUATION_BATCH)
