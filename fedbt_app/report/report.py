"""The record of a run on disk: report.json with fixed names, rounds.jsonl; report.md and the plots
beside it.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedbt_app.costs.ledger import Ledger, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.report import markdown, plots
from fedbt_app.report.tables import COSTS, ratio_of

SCHEMA = 1
REPORT, PARTIAL, PAGE, ROUNDS = "report.json", "report.json.part", "report.md", "rounds.jsonl"
RATIOS = ("train_flops", "client_seconds", "uplink_bytes", "downlink_bytes")
FIXED = {"schema", "method", "task", "model", "seed", "rounds", "cost", "reference", "ratio"}
FIXED |= {"ratio_same_optimisations", "initial", "final", "model_dir"}
_LIKENESS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "task": lambda report: report["task"],
    "model": lambda report: report.get("base_fingerprint") or report["model"],
    "data": lambda report: report.get("data"),
    "number of rounds": lambda report: len(report["rounds"]),
    "rows of the clients": lambda report: sorted(
        one["examples"] for one in report.get("clients", [])
    ),
}
_LIKE_SETTINGS = ("local-epochs", "max-length", "max-train-examples", "participation")


@dataclass
class RunRecord:
    """What a finished run knows.

    Attributes
    ----------
    reference : the cost keys for full-model FedAvg on the same data and rounds, None where unknown
    reference_source : "measured" or "predicted"
    reference_same_flops : FLOPs of full-model training with this app's own optimisations
    initial, final : metrics on the central test set; empty without one
    client_metrics : final, on the clients' held-out rows, weighted by rows; may be empty
    majority : accuracy of always answering the test set's most frequent class (classification)
    clients : `name`, `examples`, `local_depth`, `device` of each
    refused : `round`, `client`, `reason` of each reply that was not used
    """

    method: str
    task: str
    model: str
    seed: int
    rounds: list[RoundEntry]
    cost: Ledger
    reference: dict[str, float | None]
    reference_source: str
    reference_same_flops: int | None
    initial: dict[str, float]
    final: dict[str, float]
    client_metrics: dict[str, float]
    majority: float | None
    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    data: str
    base_fingerprint: str
    labels: list[str]
    model_dir: str
    config: dict[str, Any]
    versions: dict[str, str]


def to_json(record: RunRecord) -> dict[str, Any]:
    """Return report.json: the fixed names that other tools read and the rest of the record; NaN is
    None.
    """
    values = asdict(record)
    source, reference, cost = values.pop("reference_source"), values["reference"], values["cost"]
    values["reference"] = {"source": source} | {name: reference.get(name) for name in COSTS}
    values["ratio"] = {name: ratio_of(cost[name], reference.get(name)) for name in RATIOS}
    same = {"train_flops": record.reference_same_flops}
    # seconds are known of a measured run only, and that takes this app's own step
    same["client_seconds"] = values["reference"]["client_seconds"] if source == "measured" else None
    values["ratio_same_optimisations"] = {
        name: ratio_of(cost[name], full) for name, full in same.items()
    }
    plain: dict[str, Any] = _plain({"schema": SCHEMA} | values)
    return plain


def differences(report: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name what keeps the costs of two runs from being set against each other: task, model, data,
    how much of it.
    """
    found = [name for name, read in _LIKENESS.items() if read(report) != read(other)]
    settings, others = report.get("config", {}), other.get("config", {})
    return found + [name for name in _LIKE_SETTINGS if settings.get(name) != others.get(name)]


def append_round(folder: Path, entry: RoundEntry) -> None:
    """Add a line to rounds.jsonl and see it onto the disk."""
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(asdict(entry)), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def clear(folder: Path) -> None:
    """Create `folder`, or remove an earlier report from it, report.json first, and nothing else.

    Raises
    ------
    FedBTError
        When the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (REPORT, PARTIAL, PAGE, ROUNDS, *plots.FILES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise FedBTError(
            f"output-dir {folder} is unusable ({error.strerror}): choose another folder"
        ) from None


def write(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Write the plots, report.md and last, at one stroke, report.json; return what it holds."""
    report = to_json(record)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)
    images = plots.write_plots(folder, report)
    (folder / PAGE).write_text(markdown.render(report, images), encoding="utf-8")
    with (folder / PARTIAL).open("w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / PARTIAL, folder / REPORT)
    return report


def load(path: Path | str) -> dict[str, Any]:
    """Read a report.json, given itself or its folder.

    Raises
    ------
    FedBTError
        When there is none, or it is not a report of this schema.
    """
    path = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedBTError(
            f"{path} does not exist: give the output-dir of a run that finished"
        ) from None
    except OSError as error:
        raise FedBTError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from None
    except ValueError:
        raise FedBTError(f"{path} is not JSON: give the report.json of a run") from None
    if not isinstance(report, dict) or "schema" not in report:
        raise FedBTError(f"{path} is not a report: give the report.json of a run")
    if report["schema"] != SCHEMA:
        raise FedBTError(
            f"{path} has schema {report['schema']!r}, not {SCHEMA}: read it with its own version"
        )
    if missing := sorted(FIXED - report.keys()):
        raise FedBTError(f"{path} lacks {', '.join(missing)}: give the report.json of a run")
    return report


def _plain(value: Any) -> Any:
    """Make a value fit for strict JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
