"""Shared fixtures: a tiny BERT on disk, and a Grid that calls the client app in this process."""

import json
import logging
import random
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedbt_app.blocks import EMBEDDINGS, HEAD, block_part
from fedbt_app.checkpoint import Checkpoint
from fedbt_app.config import RunConfig, defaults
from fedbt_app.pool import Tensors
from fedbt_app.roster import Participant, Refusal
from fedbt_app.strategy import FedBT, Outcome

torch.set_num_threads(1)  # these models are too small to share out
SENTENCE = "the patient has severe acute renal cardiac hepatic failure of kidney heart liver and chronic pain no mild"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a BERT of 4 blocks with random weights and a word-piece vocabulary of the words above."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *string.ascii_lowercase, "##s", "##ly"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def site_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 120 labelled sentences as train.jsonl and 40 as test.jsonl; the label is the organ in the text."""
    folder = tmp_path_factory.mktemp("site-data")
    generator = random.Random(3)
    for split, size in (("train", 120), ("test", 40)):
        rows = []
        for _ in range(size):
            organ = generator.choice(["kidney", "heart", "liver"])
            words = generator.choices(WORDS[:8], k=generator.randint(3, 9))
            rows.append({"text": " ".join([*words, organ]), "label": organ, "site": generator.choice("AB")})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def ner_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 60 tagged sentences as train.jsonl and 20 as test.jsonl; organs and `pain` are entities."""
    folder = tmp_path_factory.mktemp("ner-data")
    generator = random.Random(4)
    tags = {"kidney": "B-Organ", "heart": "B-Organ", "liver": "B-Organ", "pain": "B-Sign"}
    for split, size in (("train", 60), ("test", 20)):
        rows = []
        for _ in range(size):
            words = [*generator.choices(WORDS, k=generator.randint(3, 9)), generator.choice(list(tags))]
            rows.append({"tokens": words, "ner_tags": [tags.get(word, "O") for word in words]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for tokenised data that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(
    tiny_bert: Path, site_data: Path, ner_data: Path, cache: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a small run's configuration, by dashed keys; task=ner gets its own data."""

    def make(**changes: Any) -> dict[str, Any]:
        values = defaults() | {
            "model": str(tiny_bert),
            "dataset": str(ner_data if changes.get("task") == "ner" else site_data),
            "partitioner": "iid",
            "num-rounds": 2,
            "batch-size": 8,
            "max-length": 32,
            "output-dir": str(tmp_path / "run"),
            "cache-dir": str(cache),
            "pool-dir": str(tmp_path / "pools"),
            "seed": 5,
            "precision": "float32",
        }
        return values | {name.replace("_", "-"): value for name, value in changes.items()}

    return make


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    """Return a function that makes a small run's RunConfig."""
    return lambda **changes: RunConfig.load(settings(**changes))


def over_the_wire(message: Message) -> Message:
    """Return `message` as the other side gets it: serialised by Flower, and read back."""
    contents = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.object_id
    return arrived


class LocalGrid(Grid):
    """Answers messages by calling the client app here and now; `nodes` maps node id to node config.

    Every message goes through Flower's serialisation. `tamper(node, message)` may replace a reply, or
    return None to lose it. `sent` and `received` keep all messages in order.
    """

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: dict[int, dict[str, Any]],
        tamper: Callable[[int, Message], Message | None] = lambda node, reply: reply,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.run_config, self.nodes, self.tamper = run_config, nodes, tamper
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used")

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise AssertionError("holds every reply in memory: use push and pull")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        from client_app import app

        identifiers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            node = message.metadata.dst_node_id
            self.sent.append(message)
            identifiers.append(message.object_id)
            if node not in self.nodes:  # it is gone: nobody answers
                continue
            context = Context(1, node, self.nodes[node], RecordDict(), self.run_config)
            reply = self.tamper(node, app(over_the_wire(message), context))
            if reply is not None:
                reply = over_the_wire(reply)
                self.received.append(reply)
                self._replies[message.object_id] = reply
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]


def simulated(count: int, **extra: Any) -> dict[int, dict[str, Any]]:
    """Return the node configs of `count` simulated clients."""
    return {10 + index: {"partition-id": index, "num-partitions": count, **extra} for index in range(count)}


@dataclass
class Federated:
    """A run without central test set, report and export: the strategy alone."""

    strategy: FedBT
    grid: LocalGrid
    outcome: Outcome

    @property
    def refusals(self) -> list[Refusal]:
        """What was not used, and why."""
        return self.strategy.roster.refusals

    @property
    def participants(self) -> list[Participant]:
        """The clients that the query accepted."""
        return list(self.strategy.roster.participants.values())

    @property
    def tensors(self) -> Tensors:
        """The global model's tensors, by canonical name."""
        depth = self.strategy.checkpoint.architecture.depth
        parts = (EMBEDDINGS, *map(block_part, range(depth)), HEAD)
        return {name: value for part in parts for name, value in self.strategy.weights.part(part).items()}


def federate(
    values: dict[str, Any],
    nodes: dict[int, dict[str, Any]],
    tamper: Callable[[int, Message], Message | None] = lambda node, reply: reply,
) -> Federated:
    """Run the strategy with the configuration `values` (dashed keys)."""
    config, grid = RunConfig.load(values), LocalGrid(values, nodes, tamper)
    strategy = FedBT(config, Checkpoint(Path(config.model)), lambda strategy: {}, lambda entry: None)
    return Federated(strategy, grid, strategy.start(grid))


@pytest.fixture
def flower_log() -> Iterator[list[str]]:
    """Collect what is logged while the test runs, one string a record."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect()
    logging.getLogger("flwr").addHandler(handler)
    yield lines
    logging.getLogger("flwr").removeHandler(handler)
