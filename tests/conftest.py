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
from flwr.app import Message

import client_app
from fedbt_app.config import RunConfig, defaults
from fedbt_app.costs.ledger import Outcome
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import EMBEDDINGS, HEAD, block_part
from fedbt_app.plan import DEPTH_METHODS, PAPER
from fedbt_app.server.roster import Participant, Refusal
from fedbt_app.server.rounds import Rounds
from fedbt_app.server.strategy import FedBT
from fedbt_app.tensors import Tensors
from fedbt_app.wire.local_grid import LocalGrid

torch.set_num_threads(1)  # these models are too small to share out
SENTENCE = "the patient has severe acute renal cardiac hepatic failure of kidney heart liver and chronic pain no mild"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a BERT of 4 blocks with random weights and a word-piece vocabulary of the words above."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *string.ascii_lowercase,
        "##s",
        "##ly",
    ]
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
            rows.append(
                {"text": " ".join([*words, organ]), "label": organ, "site": generator.choice("AB")}
            )
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
            words = [
                *generator.choices(WORDS, k=generator.randint(3, 9)),
                generator.choice(list(tags)),
            ]
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
            "codec": "float32",
        }
        if changes.get("method", "fedbt") in DEPTH_METHODS:
            values["schedule"] = PAPER  # the blocks take turns, which is the harder case
        return values | {name.replace("_", "-"): value for name, value in changes.items()}

    return make


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    """Return a function that makes a small run's RunConfig."""
    return lambda **changes: RunConfig.load(settings(**changes))


@pytest.fixture
def small(settings: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a function that makes the configuration of a run of few rows, without client evaluation."""
    few = {"max_train_examples": 36, "batch_size": 16, "client_evaluation": "never"}
    return lambda **changes: settings(**(few | changes))


class RecordingGrid(LocalGrid):
    """Keeps all messages in order in `sent` and `received`.

    `tamper(node, message)` may replace a reply, or return None to lose it.
    """

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: dict[int, dict[str, Any]],
        tamper: Callable[[int, Message], Message | None] = lambda node, reply: reply,
    ) -> None:
        super().__init__(client_app.app, run_config, nodes)
        self.tamper = tamper
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        identifiers = list(super().push_messages(messages))
        self.sent += messages
        self.received += [self._replies[name] for name in identifiers if name in self._replies]
        return identifiers

    def answer(self, node: int, message: Message) -> Message | None:
        reply = super().answer(node, message)
        return None if reply is None else self.tamper(node, reply)


@dataclass
class Federated:
    """A run without central test set, report and export: the strategy alone."""

    rounds: Rounds
    grid: RecordingGrid

    @property
    def outcome(self) -> Outcome:
        """The books."""
        return self.rounds.outcome

    @property
    def refusals(self) -> list[Refusal]:
        """What was not used, and why."""
        return self.rounds.roster.refusals

    @property
    def participants(self) -> list[Participant]:
        """The clients that the query accepted."""
        return list(self.rounds.roster.participants.values())

    @property
    def tensors(self) -> Tensors:
        """The global model's tensors, by canonical name."""
        depth = self.rounds.weights.checkpoint.architecture.depth
        parts = (EMBEDDINGS, *map(block_part, range(depth)), HEAD)
        return {
            name: value for part in parts for name, value in self.rounds.weights.part(part).items()
        }


def federate(
    values: dict[str, Any],
    nodes: dict[int, dict[str, Any]],
    tamper: Callable[[int, Message], Message | None] = lambda node, reply: reply,
) -> Federated:
    """Run the strategy with the configuration `values` (dashed keys)."""
    config, grid = RunConfig.load(values), RecordingGrid(values, nodes, tamper)
    return Federated(FedBT(config, Checkpoint(Path(config.model))).start(grid), grid)


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
