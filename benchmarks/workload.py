"""What every method of the benchmark is given: random weights, batches of random word pieces."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fedbt_app.cli.presets import PRESETS
from fedbt_app.config import EMBEDDED
from fedbt_app.costs.cost_model import CostModel
from fedbt_app.data import phenotypes
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import HEAD, HeadKind
from fedbt_app.plan import METHODS, PAPER, RoundPlan, RunPlan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import IGNORED, Reading, SpecialTokens
from fedbt_app.tasks.batch import Batch, Collator
from fedbt_app.tensors import Tensors
from fedbt_app.training import train
from fedbt_app.training.prefix_cache import FrozenBlocks, PrefixCache

BATCH = 8
LENGTH = 128
ROUNDS = 10
QUANTILES = 4
SAMPLED_ROWS = 4000
TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
ARCHITECTURES = {
    "bert-base": PRESETS["bert-base"],
    "minilm-l6": PRESETS["minilm-l6"],
    "tiny": PRESETS["bert-base"] | TINY,
}
LABELS = tuple(f"label-{index}" for index in range(13))
TOKENS = SpecialTokens(pad=0, mask=103, special=(0, 100, 101, 102, 103), vocabulary=30522)


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share."""

    folder: Path
    task: str
    bfloat16: bool = False

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint, with a new head where it has none for the task."""
        spec = ModelSpec(TASKS[self.task], self.labels)
        bare = Weights(Checkpoint(self.folder), lambda _: {}, spec)
        head = new_tensors(bare.lacking(HEAD), seed=1)

        def held(part: str) -> Tensors:
            if part != HEAD:
                return {}
            return head

        return replace(bare, held=held)

    @property
    def arch(self) -> Architecture:
        """Dimensions of the checkpoint."""
        return self.weights.checkpoint.architecture

    @property
    def costs(self) -> CostModel:
        """What its steps cost by formula."""
        return CostModel(self.arch, TASKS[self.task], len(self.labels))

    @property
    def plan(self) -> RunPlan:
        """FedBT in the published order."""
        return RunPlan(METHODS["fedbt"], TASKS[self.task], self.arch.depth, ROUNDS, PAPER)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty for mlm."""
        if self.task == "mlm":
            return ()
        return LABELS

    @property
    def collator(self) -> Collator:
        """Makes batches of the task."""
        return Collator(TASKS[self.task], Reading(TOKENS, self.labels))

    def local_depths(self, method: str) -> tuple[int, ...]:
        """Depths to measure: in pre-training half the blocks and a third, else all of them."""
        depth = self.arch.depth
        if self.task == "mlm" and method.startswith("fedbt"):
            return depth // 2, depth // 3
        return (depth,)

    def schedule(self, local_depth: int) -> list[RoundPlan]:
        """Return FedBT's plans of all rounds."""
        return self.plan.rounds("client", local_depth)

    def build(self, plan: RoundPlan) -> LocalModel:
        """Build FedBT's local model."""
        return build(self.weights, plan, bfloat16=self.bfloat16)

    def open_cache(self, folder: Path, rows: Sequence[Any]) -> PrefixCache | None:
        """Open the frozen-prefix cache as a client does."""
        if self.task == "mlm":  # masks anew each time
            return None
        fingerprint = self.weights.checkpoint.fingerprint(TASKS[self.task].head)
        identity = f"{fingerprint} bf16={self.bfloat16}"
        frozen = FrozenBlocks(identity, self.plan.frozen_prefix(), self.arch.hidden)
        return PrefixCache.open(folder, frozen, rows, budget=1 << 40)


def write_checkpoint(folder: Path, name: str) -> None:
    """Write a BERT of random weights: config.json and model.safetensors."""
    config = ARCHITECTURES[name]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arch = Architecture.from_config(config, name)
    shapes = arch.model(HeadKind.MASKED_LM, 0)
    for key, shape in arch.head(HeadKind.SEQUENCE, 0).items():
        if "pooler" in key:
            shapes[key] = shape
    tensors = new_tensors(shapes, seed=0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Work:
    """One batch, as FedBT and as stock code read it."""

    batch: Batch
    dense: dict[str, torch.Tensor]  # padded to LENGTH, one label a position


@dataclass(frozen=True)
class Workload:
    """A client's rows of random word pieces, and some of their batches."""

    rows: list[dict[str, Any]]
    works: list[Work]  # that stand for all


def real_lengths(raw: Path | None) -> list[int]:
    """Return lengths of real texts in word pieces: of `raw`/train.jsonl.gz, or our definitions."""
    if raw is None:
        rows = phenotypes.classified_terms()["train"]
    else:
        with gzip.open(raw / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows]
    chosen = np.random.default_rng(0).permutation(len(texts))[:SAMPLED_ROWS]
    tokenizer = Checkpoint(find_model(EMBEDDED)).tokenizer()
    sampled = [texts[row] for row in chosen]
    pieces = tokenizer(sampled, truncation=True, max_length=LENGTH)["input_ids"]
    return [len(ids) for ids in pieces]


def random_rows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Make rows of random pieces; for ner every piece is a word, the most that the loss can read."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(1000, TOKENS.vocabulary, length)
        ids[0] = 101  # [CLS]
        ids[-1] = 102  # [SEP]
        names = [LABELS[index] for index in generator.integers(0, len(LABELS), length)]
        row = {
            "input_ids": ids.tolist(),
            "label": names[0],
            "tags": ["", *names[1:-1], ""],
        }
        rows.append(row)
    return rows


def make(setting: Setting, lengths: Sequence[int]) -> Workload:
    """Batch rows of these lengths as training does; pick quantiles of the batches' lengths."""
    rows = random_rows(lengths)
    batches = train.batches(rows, setting.collator, BATCH, np.random.default_rng(0))
    whole = [batch for batch in batches if len(batch.rows) == BATCH]
    whole.sort(key=lambda batch: batch.shape[1])
    count = min(QUANTILES, len(whole))
    works = []
    for index in range(count):
        middle = int((index + 0.5) * len(whole) / count)  # of the quantile
        batch = whole[middle]
        works.append(Work(batch, _dense(setting.task, batch)))
    return Workload(rows, works)


def _dense(task: str, batch: Batch) -> dict[str, torch.Tensor]:
    def widened(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, LENGTH - values.shape[1]))

    present = batch.mask
    if present is None:
        present = torch.ones_like(batch.input_ids, dtype=torch.bool)
    if task == "classification":
        labels = batch.labels[:, 0]
    else:
        labels = torch.full((BATCH, LENGTH), IGNORED).scatter(1, batch.positions, batch.labels)
    return {
        "input_ids": widened(batch.input_ids),
        "attention_mask": widened(present.long()),
        "labels": labels,
    }
