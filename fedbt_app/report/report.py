"""The record of a run on disk: report.json and rounds.jsonl; report.md and the plots beside them."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedbt_app.costs.ledger import Ledger, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.files import PARTIAL, READABLE, replace_text
from fedbt_app.report import markdown, plots
from fedbt_app.report.tables import COSTS, ratio_of

SCHEMA = 1
REPORT = "report.json"
PAGE = "report.md"
ROUNDS = "rounds.jsonl"
RATIOS = ("train_flops", "client_seconds", "uplink_bytes", "downlink_bytes")
FIXED = {  # names that other tools read
    "schema",
    "method",
    "task",
    "model",
    "seed",
    "rounds",
    "cost",
    "reference",
    "ratio",
    "ratio_same_optimisations",
    "initial",
    "final",
    "model_dir",
}


def _client_rows(report: Mapping[str, Any]) -> list[int]:
    return sorted(client["examples"] for client in report.get("clients", []))


# What two runs must have alike for their costs to be set against each other.
_LIKENESS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "task": lambda report: report["task"],
    "model": lambda report: report.get("base_fingerprint") or report["model"],
    "data": lambda report: report.get("data"),
    "number of rounds": lambda report: len(report["rounds"]),
    "rows of the clients": _client_rows,
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
    client_metrics : final, from the counts of all clients on their held-out rows; may be empty
    majority : accuracy of always answering the test set's most frequent class (classification)
    clients : `name`, `examples`, `local_depth`, `device` and `fit` of each
    test : of the central test set `rows` scored, `available` rows and `fit`
    warnings : what a person should know before trusting the scores, one line each
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
    test: dict[str, Any]
    warnings: list[str]
    refused: list[dict[str, Any]]
    data: str
    base_fingerprint: str
    tokenizer_fingerprint: str
    labels: list[str]
    model_dir: str
    config: dict[str, Any]
    versions: dict[str, str]


def to_json(record: RunRecord) -> dict[str, Any]:
    """Return report.json: the names in FIXED and the rest of the record; NaN is None."""
    values = asdict(record)
    source = values.pop("reference_source")
    reference = values["reference"]
    cost = values["cost"]
    # seconds are known of a measured run only, and that takes this app's own step
    same_seconds = None
    if source == "measured":
        same_seconds = reference.get("client_seconds")
    values["reference"] = {"source": source} | {name: reference.get(name) for name in COSTS}
    values["ratio"] = {name: ratio_of(cost[name], reference.get(name)) for name in RATIOS}
    values["ratio_same_optimisations"] = {
        "train_flops": ratio_of(cost["train_flops"], record.reference_same_flops),
        "client_seconds": ratio_of(cost["client_seconds"], same_seconds),
    }
    plain: dict[str, Any] = _plain({"schema": SCHEMA} | values)
    return plain


def differences(report: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name what keeps the costs of two runs from being set against each other."""
    names = [name for name, read in _LIKENESS.items() if read(report) != read(other)]
    settings = report.get("config", {})
    other_settings = other.get("config", {})
    for name in _LIKE_SETTINGS:
        if settings.get(name) != other_settings.get(name):
            names.append(name)
    return names


def append_round(folder: Path, entry: RoundEntry) -> None:
    """Add a line to rounds.jsonl and see it onto the disk."""
    line = json.dumps(_plain(asdict(entry)), allow_nan=False)
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
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
        for name in (REPORT, PAGE, ROUNDS, *plots.FILES):
            (folder / name).unlink(missing_ok=True)
        for left in folder.glob(f"{REPORT}.*{PARTIAL}"):  # by a process that was killed
            left.unlink(missing_ok=True)
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
    text = json.dumps(report, indent=2, allow_nan=False)
    replace_text(folder / REPORT, text, READABLE)
    return report


def load(path: Path | str) -> dict[str, Any]:
    """Read a report.json, given itself or its folder.

    Raises
    ------
    FedBTError
        When there is none, or it is not a report of this schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT
    report = _read_json(path)
    if not isinstance(report, dict) or "schema" not in report:
        raise FedBTError(f"{path} is not a report: give the report.json of a run")
    if report["schema"] != SCHEMA:
        raise FedBTError(
            f"{path} has schema {report['schema']!r}, not {SCHEMA}: read it with its own version"
        )
    if missing := sorted(FIXED - report.keys()):
        raise FedBTError(f"{path} lacks {', '.join(missing)}: give the report.json of a run")
    return report


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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


def _plain(value: Any) -> Any:
    """Make a value fit for strict JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
