"""Shared fixtures: a tiny BERT on disk, and a Grid that calls the client app in this process."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbt_app.config import RunConfig, defaults

WORDS = "the patient has severe acute renal cardiac hepatic failure of kidney heart liver and chronic pain no mild".split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a BERT of 4 blocks with random weights and a word-piece vocabulary of the words above."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", "##s", "##ly"]
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


@pytest.fixture()
def site_data(tmp_path: Path) -> Path:
    """Write 120 labelled sentences as train.jsonl and 40 as test.jsonl; the label follows from the organ's word."""
    folder = tmp_path / "site-data"
    folder.mkdir()
    generator = random.Random(3)
    for split, size in (("train", 120), ("test", 40)):
        rows = []
        for _ in range(size):
            organ = generator.choice(["kidney", "heart", "liver"])
            words = generator.choices(WORDS[:8], k=generator.randint(3, 9))
            rows.append({"text": " ".join([*words, organ]), "label": organ, "site": generator.choice("AB")})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture()
def settings(tiny_bert: Path, site_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a small run's configuration, by dashed keys."""

    def make(**changes: Any) -> dict[str, Any]:
        values = defaults() | {
            "model": str(tiny_bert),
            "dataset": str(site_data),
            "partitioner": "iid",
            "num-rounds": 2,
            "batch-size": 8,
            "max-length": 32,
            "output-dir": str(tmp_path / "run"),
            "cache-dir": str(tmp_path / "cache"),
            "seed": 5,
        }
        return values | {name.replace("_", "-"): value for name, value in changes.items()}

    return make


@pytest.fixture()
def config(settings: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    """Return a function that makes a small run's RunConfig."""
    return lambda **changes: RunConfig.load(settings(**changes))


class LocalGrid(Grid):
    """Answers messages by calling the client app here and now; `nodes` maps node id to node config.

    `tamper(node, message)` may replace a reply, or return None to lose it.
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
            context = Context(1, node, self.nodes[node], RecordDict(), self.run_config)
            reply = self.tamper(node, app(message, context))
            if reply is not None:
                self._replies[message.object_id] = reply
            identifiers.append(message.object_id)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]


def simulated(count: int, **extra: Any) -> dict[int, dict[str, Any]]:
    """Return the node configs of `count` simulated clients."""
    return {10 + index: {"partition-id": index, "num-partitions": count, **extra} for index in range(count)}


