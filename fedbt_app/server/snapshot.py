"""The server's snapshot of a run: all that it needs to go on after a crash or a stop.

In the folder `resume` of the output folder: a file for each part, named by its version and written
only when that has changed, and `run.json`, which holds the rest and says which files belong
together. It is replaced last, at one stroke, so that there is one whole snapshot at any time.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedbt_app.codec.codec import Encoded
from fedbt_app.config import RunConfig, defaults
from fedbt_app.costs.ledger import Ledger, Outcome, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.files import PARTIAL, replace_text
from fedbt_app.parts import PartState
from fedbt_app.server.roster import Refusal
from fedbt_app.server.state import Part, Step
from fedbt_app.tensors import Tensors, read_tensors, write_tensors

FORMAT = 3  # raise it when what is stored changes
FOLDER = "resume"
INDEX = "run.json"
# They decide how long a run waits, when it stops and what it shows, not what it computes: they may
# change on resume.
MAY_CHANGE = {
    "resume",
    "min-clients",
    "min-replies",
    "below-minimum",
    "round-timeout",
    "tensorboard",
}


@dataclass(frozen=True)
class Progress:
    """What a run has come to after some rounds.

    Attributes
    ----------
    nodes : how many were connected at the start: a simulation splits its rows over them
    fingerprint : of the base checkpoint
    initial : metrics before training
    mechanisms : what the privacy mechanisms' server halves remember, in their order
    """

    lineage: str
    labels: tuple[str, ...]
    nodes: int
    fingerprint: str
    initial: dict[str, float]
    outcome: Outcome
    refusals: list[Refusal]
    parts: Mapping[str, Part]
    mechanisms: list[dict[str, Any]]


class Snapshot:
    """The latest snapshot of the run whose output folder this is."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.folder = output / FOLDER
        self._stored: dict[str, Any] = {}  # the index's entries of the parts

    def store(self, config: RunConfig, progress: Progress) -> None:
        """Replace the snapshot.

        Raises
        ------
        FedBTError
            When it cannot be written; the one before is then still whole.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stored = {}
            for name, part in progress.parts.items():
                stored[name] = self._store_part(name, part)
            self._stored = stored
            run = dict(vars(progress))
            run["config"] = config.values()
            run["outcome"] = asdict(progress.outcome)
            run["refusals"] = [asdict(refusal) for refusal in progress.refusals]
            run["parts"] = stored
            index = {"format": FORMAT, "digest": _digest(run), "run": run}
            replace_text(self.folder / INDEX, json.dumps(index))
            # only now: until here the snapshot before this one was whole
            self._drop_outdated()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FedBTError(
                f"the snapshot {self.folder} cannot be written ({reason}): "
                f"free some space, then go on with `fedbt run --resume {self._output}`"
            ) from None

    def load(self, config: RunConfig) -> Progress:
        """Read the snapshot for a run of the settings `config`.

        Raises
        ------
        FedBTError
            When there is none, it is damaged or of another format, or its run has other settings.
        """
        self.check(config)
        run = self._run
        parts = {}
        for name, entry in run["parts"].items():
            parts[name] = self._load_part(name, entry)
        self._stored = run["parts"]
        outcome = dict(run["outcome"])
        outcome["rounds"] = [RoundEntry(**entry) for entry in outcome["rounds"]]
        outcome["cost"] = Ledger(**outcome["cost"])
        return Progress(
            lineage=run["lineage"],
            labels=tuple(run["labels"]),
            nodes=run["nodes"],
            fingerprint=run["fingerprint"],
            initial=run["initial"],
            outcome=Outcome(**outcome),
            refusals=[Refusal(**refusal) for refusal in run["refusals"]],
            parts=parts,
            mechanisms=run["mechanisms"],
        )

    def check(self, config: RunConfig) -> None:
        """Refuse settings under which the run would not go on as it began."""
        for name, value in config.values().items():
            stored = self.settings[name]
            if value != stored and name not in MAY_CHANGE:
                raise FedBTError(
                    f"{name}={value} but the run in {self._output} has {name}={stored}: "
                    f"drop {name}, or start a new run without resume"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings by dashed key."""
        return dict(self._run["config"])

    @property
    def nodes(self) -> int:
        """How many nodes the run began with."""
        return int(self._run["nodes"])

    def remove(self) -> None:
        """Remove the snapshot, if there is one, and nothing else."""
        (self.folder / INDEX).unlink(missing_ok=True)
        self._stored = {}
        self._drop_outdated()
        with contextlib.suppress(OSError):  # not there, or it holds what is not ours
            self.folder.rmdir()

    @cached_property
    def _run(self) -> dict[str, Any]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FedBTError(
                f"{self._output} holds no stopped run (a run that finished leaves no snapshot): "
                "give the output-dir of one that was stopped"
            ) from None
        except (OSError, ValueError):
            raise self._damaged(path) from None
        if not isinstance(index, dict) or not {"format", "digest", "run"} <= index.keys():
            raise self._damaged(path)
        foreign = FedBTError(
            f"{path} was written by another version of FedBT: resume the run with that one"
        )
        if index["format"] != FORMAT:
            raise foreign
        run: dict[str, Any] = index["run"]
        if index["digest"] != _digest(run):
            raise self._damaged(path)
        if run["config"].keys() != defaults().keys():
            raise foreign
        return run

    def _store_part(self, name: str, part: Part) -> dict[str, Any]:
        state = asdict(part.state)
        known = self._stored.get(name)
        if known and known["state"] == state:
            return dict(known)
        steps = []
        for step in part.steps:
            entry = {
                "before": step.before and asdict(step.before),
                "state": asdict(step.state),
                "header": step.delta.header,
            }
            steps.append(entry)
        path = self._file(name, state)
        stored = write_tensors(path, part.state.version, _packed(part))
        return {"state": state, "steps": steps, "digest": stored.digest}

    def _load_part(self, name: str, entry: Mapping[str, Any]) -> Part:
        path = self._file(name, entry["state"])
        read = read_tensors(path)
        if read is None:
            raise self._damaged(path)
        stored, tensors = read
        if stored.digest != entry["digest"]:
            raise self._damaged(path)
        return _unpacked(entry, tensors)

    def _file(self, part: str, state: Mapping[str, Any]) -> Path:
        return self.folder / f"{part}@{state['version']}.safetensors"

    def _drop_outdated(self) -> None:
        """Remove the files of all parts that the index does not name."""
        named = [self._file(name, entry["state"]) for name, entry in self._stored.items()]
        for pattern in ("*@*.safetensors", f"*{PARTIAL}"):
            for path in self.folder.glob(pattern):
                if path not in named:
                    path.unlink()

    def _damaged(self, path: Path) -> FedBTError:
        return FedBTError(f"the snapshot {path} is damaged: start a new run without resume")


def _packed(part: Part) -> Tensors:
    """Put all of a part's tensors under names that `_unpacked` takes apart."""
    packed = {f"value/{name}": tensor for name, tensor in part.tensors.items()}
    packed |= {f"residual/{name}": tensor for name, tensor in part.residual.items()}
    packed |= {f"memory/{name}": tensor for name, tensor in part.memory.items()}
    for index, step in enumerate(part.steps):
        for name, array in step.delta.arrays.items():
            packed[f"{index}/{name}"] = torch.tensor(array)
    return packed


def _unpacked(entry: Mapping[str, Any], packed: Tensors) -> Part:
    sections: dict[str, Tensors] = {}
    for key, tensor in packed.items():
        section, _, name = key.partition("/")
        sections.setdefault(section, {})[name] = tensor
    steps = []
    for index, told in enumerate(entry["steps"]):
        arrays = {name: tensor.numpy() for name, tensor in sections[str(index)].items()}
        step = Step(
            before=told["before"] and PartState(**told["before"]),
            state=PartState(**told["state"]),
            delta=Encoded(arrays, told["header"]),
        )
        steps.append(step)
    return Part(
        tensors=sections["value"],
        state=PartState(**entry["state"]),
        steps=tuple(steps),
        residual=sections.get("residual", {}),
        memory=sections.get("memory", {}),
    )


def _digest(run: Mapping[str, Any]) -> str:
    text = json.dumps(run, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
