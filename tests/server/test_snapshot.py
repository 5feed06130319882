"""Resuming: a run that was killed or stopped ends as if it had not been; what cannot be resumed is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingGrid
from flwr.app import ConfigRecord, Message

import server_app
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.server import job
from fedbt_app.server import snapshot as snapshot_module
from fedbt_app.server.snapshot import FOLDER, INDEX, Snapshot
from fedbt_app.wire.local_grid import simulated
from fedbt_app.wire.records import serialised_bytes

Values = dict[str, Any]
TIMES = {"seconds", "client_seconds", "peak_memory_bytes"}  # differ between any two runs


class Killed(BaseException):
    """The end of the process, as far as a test can have it."""


class MortalGrid(RecordingGrid):
    """Dies in round `round_`, after `answers` of its nodes have trained."""

    def __init__(self, values: Values, clients: int, round_: int, answers: int) -> None:
        super().__init__(values, simulated(clients))
        self.round, self.left = str(round_), answers

    def answer(self, node: int, message: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.metadata.group_id == self.round:
            if not self.left:
                raise Killed
            self.left -= 1
        return super().answer(node, message)


@pytest.fixture
def values(settings: Callable[..., Values], tmp_path: Path) -> Callable[..., Values]:
    """Return a function that makes the configuration of a small run in a folder, and with pools, of its own."""

    def make(name: str, **changes: Any) -> Values:
        few = {"max_train_examples": 36, "max_test_examples": 8, "batch_size": 16, "num_rounds": 4}
        own = {"output_dir": str(tmp_path / name), "pool_dir": str(tmp_path / f"{name}-pools")}
        return settings(**(few | own | changes))

    return make


def run(values: Values, grid: RecordingGrid | None = None, clients: int = 2) -> dict[str, Any]:
    return server_app.run(grid or RecordingGrid(values, simulated(clients)), RunConfig.load(values))


def kill(values: Values, round_: int, answers: int = 0, clients: int = 2) -> None:
    """Run until so many clients have trained in round `round_`, and no further."""
    with pytest.raises(Killed):
        run(values, MortalGrid(values, clients, round_, answers))


def resumed(values: Values) -> Values:
    return values | {"resume": values["output-dir"]}


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """Return of a report what two equal runs have in common."""
    entries = [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in report["rounds"]
    ]
    cost = {
        name: value
        for name, value in report["cost"].items()
        if name not in TIMES | {"first_contact_bytes"}
    }
    left = {"rounds", "cost", "reference", "config", "model_dir"}
    return {name: value for name, value in report.items() if name not in left} | {
        "rounds": entries,
        "cost": cost,
    }


def model(values: Values) -> bytes:
    return (Path(values["output-dir"]) / "model" / "model.safetensors").read_bytes()


def refusal(values: Values) -> str:
    with pytest.raises(FedBTError) as caught:
        run(values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "int4"])
@pytest.mark.parametrize(
    "changes",
    [
        {"task": "classification"},
        {"task": "mlm", "local_depth": 2, "client_evaluation": "every"},
        {"task": "ner", "method": "fedbt-lora", "participation": 0.5, "server_momentum": 0.5},
    ],
    ids=lambda changes: changes["task"],
)
def test_killed_and_resumed_run_ends_as_one_that_never_stopped(
    values: Callable[..., Values], changes: dict[str, Any], codec: str
) -> None:
    clients = 4 if "participation" in changes else 2
    whole, stopped = (
        values("whole", codec=codec, **changes),
        values("stopped", codec=codec, **changes),
    )
    expected = run(whole, clients=clients)
    kill(stopped, 3, clients=clients)
    grid = RecordingGrid(resumed(stopped), simulated(clients))
    report = run(resumed(stopped), grid)
    assert model(stopped) == model(whole)
    assert comparable(report) == comparable(expected)
    for name in ("train_flops", "uplink_bytes", "downlink_bytes"):
        assert report["reference"][name] == expected["reference"][name]
    queries = [one for one in grid.sent + grid.received if one.metadata.message_type == "query"]
    asked_again = sum(map(serialised_bytes, queries))
    assert (
        report["cost"]["first_contact_bytes"]
        == expected["cost"]["first_contact_bytes"] + asked_again
    )
    lines = (Path(stopped["output-dir"]) / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report["rounds"]


@pytest.mark.parametrize("codec", ["float32", "int4"])
@pytest.mark.parametrize("round_", [1, 3])
def test_run_killed_within_a_round_does_that_round_again_to_the_same_model(
    values: Callable[..., Values], round_: int, codec: str
) -> None:
    whole, stopped = values("whole", codec=codec), values("stopped", codec=codec)
    expected = run(whole)
    kill(stopped, round_, answers=1)  # whose pool and residual have moved on
    report = run(resumed(stopped))
    assert model(stopped) == model(whole)
    assert [entry["metrics"] for entry in report["rounds"]] == [
        entry["metrics"] for entry in expected["rounds"]
    ]
    assert report["cost"]["catch_up_bytes"] == 0


def test_run_that_is_killed_again_and_again_arrives(values: Callable[..., Values]) -> None:
    whole, stopped = values("whole"), values("stopped")
    run(whole)
    kill(stopped, 1)
    for round_ in (2, 3, 4):
        kill(resumed(stopped), round_, answers=1)
    run(resumed(stopped))
    assert model(stopped) == model(whole)


def test_run_that_failed_after_its_last_round_needs_no_training_to_finish(
    values: Callable[..., Values], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise FedBTError("disk full")

    stopped = values("stopped", num_rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(job, "export", fail)
        refusal(stopped)
    grid = RecordingGrid(resumed(stopped), simulated(2))
    report = run(resumed(stopped), grid)
    assert {message.metadata.message_type for message in grid.sent} == {"query"}
    assert len(report["rounds"]) == 1


def test_run_below_the_minimum_is_resumed_with_what_it_cost_so_far(
    values: Callable[..., Values],
) -> None:
    def fail(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train" and reply.metadata.group_id == "2" and node == 11:
            reply.content["reply"] = ConfigRecord({"status": "failed", "error": "disk full"})
        return reply

    whole, stopped = values("whole", codec="int4"), values("stopped", codec="int4", min_replies=2)
    expected = run(whole)
    with pytest.raises(FedBTError, match=rf"--resume {stopped['output-dir']}`"):
        run(stopped, RecordingGrid(stopped, simulated(2), fail))
    report = run(resumed(stopped) | {"min-replies": 1, "below-minimum": "repeat"})
    assert model(stopped) == model(whole)
    assert report["refused"] == [{"round": 2, "client": "client-1", "reason": "disk full"}]
    assert report["rounds"][1]["uplink_bytes"] > 1.5 * expected["rounds"][1]["uplink_bytes"]
    for name in ("train_flops", "uplink_bytes", "downlink_bytes"):
        assert sum(entry[name] for entry in report["rounds"]) == report["cost"][name]


def test_moved_output_folder_is_gone_on_with_where_it_is(
    values: Callable[..., Values], tmp_path: Path
) -> None:
    stopped = values("stopped", num_rounds=2)
    kill(stopped, 2)
    shutil.move(stopped["output-dir"], tmp_path / "moved")
    report = run(stopped | {"resume": str(tmp_path / "moved")})
    assert report["model_dir"] == str(tmp_path / "moved" / "model")
    assert not Path(stopped["output-dir"]).exists()


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(values: Callable[..., Values]) -> Values:
    """Return the configuration of a run that was killed in its second round."""
    made = values("stopped", codec="int4", num_rounds=2)
    kill(made, 2)
    return made


def files(values: Values) -> dict[str, Path]:
    return {path.name: path for path in (Path(values["output-dir"]) / FOLDER).iterdir()}


def test_damaged_or_missing_file_is_refused_by_name(stopped: Values) -> None:
    assert set(files(stopped)) == {INDEX, "head@1.safetensors", "block.3@1.safetensors"}
    for name, path in files(stopped).items():
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for spoilt in (b"", content[:middle], content[:-1], flipped):
            path.write_bytes(spoilt)
            assert f"{name} is damaged" in refusal(resumed(stopped))
        path.unlink()
        assert ("no stopped run" if name == INDEX else f"{name} is damaged") in refusal(
            resumed(stopped)
        )
        path.write_bytes(content)
    run(resumed(stopped))


def test_snapshot_of_another_format_is_refused(
    stopped: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "FORMAT", snapshot_module.FORMAT + 1)
    assert "another version of FedBT" in refusal(resumed(stopped))


def test_snapshot_with_other_config_keys_is_refused(stopped: Values) -> None:
    path = files(stopped)[INDEX]
    index = json.loads(path.read_text())
    del index["run"]["config"]["codec"]
    index["digest"] = snapshot_module._digest(index["run"])
    path.write_text(json.dumps(index))
    assert "another version of FedBT" in refusal(resumed(stopped))


def test_another_base_under_the_same_name_is_refused(
    values: Callable[..., Values], tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    shutil.copytree(tiny_bert, tmp_path / "bert")
    stopped = values("stopped", model=str(tmp_path / "bert"), num_rounds=2)
    kill(stopped, 2)
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(tiny_bert)).save_pretrained(tmp_path / "bert")
    assert "another base" in refusal(resumed(stopped))


@pytest.mark.parametrize(
    ("key", "value"), [("num-rounds", 3), ("codec", "int8"), ("seed", 6), ("output-dir", "x")]
)
def test_contradicting_setting_is_refused_by_key(stopped: Values, key: str, value: Any) -> None:
    line = refusal(resumed(stopped) | {key: value})
    assert line.startswith(f"{key}={value} but the run in ")
    assert f"{key}={stopped[key]}" in line
    run(resumed(stopped))


def test_settings_of_waiting_may_be_changed(stopped: Values) -> None:
    run(resumed(stopped) | {"min-clients": 1, "round-timeout": 60.0, "below-minimum": "repeat"})


# What is on the disk ----------------------------------------------------------------------------------------------


def test_finished_run_leaves_no_snapshot_and_is_not_resumed(stopped: Values) -> None:
    run(resumed(stopped))
    assert not (Path(stopped["output-dir"]) / FOLDER).exists()
    assert "no stopped run" in refusal(resumed(stopped))
    assert (Path(stopped["output-dir"]) / "report.json").exists()


def test_new_run_drops_the_snapshot_and_nothing_that_is_not_its_own(stopped: Values) -> None:
    folder = Path(stopped["output-dir"]) / FOLDER
    (folder / "my cv.pdf").write_text("mine")
    kill(stopped, 1)
    assert set(files(stopped)) == {INDEX, "head@0.safetensors", "my cv.pdf"}
    run(stopped)
    assert set(files(stopped)) == {"my cv.pdf"}


def test_only_parts_that_changed_are_written_again(
    values: Callable[..., Values], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = snapshot_module.write_tensors

    def watch(path: Path, *rest: Any) -> Any:
        written.append(path.name.removesuffix(".safetensors"))
        return write(path, *rest)

    monkeypatch.setattr(snapshot_module, "write_tensors", watch)
    stopped = values("stopped", task="mlm")  # trains the blocks 0, 0, 1, 1
    kill(stopped, 3)
    run(resumed(stopped))
    assert written == [
        "head@0",
        "head@1",
        "block.0@1",
        "head@2",
        "block.0@2",
        "head@3",
        "block.1@1",
        "head@4",
        "block.1@2",
    ]


@pytest.mark.parametrize("failing", ["write_tensors", "replace_text"])
def test_snapshot_that_cannot_be_written_stops_the_run_and_leaves_the_one_before(
    values: Callable[..., Values], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    whole, stopped = (values(name, num_rounds=2, codec="int4") for name in ("whole", "stopped"))
    run(whole)
    kill(stopped, 2)
    before = {name: path.read_bytes() for name, path in files(stopped).items()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, failing, fail)
        line = refusal(
            resumed(stopped)
        )  # the clients' evaluation has brought their pools ahead of it
    assert "No space left on device" in line
    assert f"--resume {stopped['output-dir']}" in line
    assert {
        name: path.read_bytes() for name, path in files(stopped).items() if name in before
    } == before
    run(resumed(stopped))
    assert model(stopped) == model(whole)


def test_snapshot_says_how_the_run_was_started(stopped: Values) -> None:
    snapshot = Snapshot(Path(stopped["output-dir"]))
    assert snapshot.settings == RunConfig.load(stopped).values()
    assert snapshot.nodes == 2
