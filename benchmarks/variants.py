"""The training steps that the benchmark compares, all from one checkpoint of random weights."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fedbt_app import embedded, forward, train
from fedbt_app.blocks import HEAD, PRESETS, Architecture
from fedbt_app.checkpoint import Checkpoint, find_model
from fedbt_app.config import EMBEDDED
from fedbt_app.local_model import LocalModel, ModelSpec, Weights, build, new_tensors
from fedbt_app.plan import RoundPlan, frozen_prefix, plan_round
from fedbt_app.predict import StepShape, default_shape, full_plan, round_costs, step_flops, stock_step_flops
from fedbt_app.prefix import PrefixCache
from fedbt_app.tasks import IGNORED, Batch, Collator, SpecialTokens

BATCH, LENGTH, ROUNDS, QUANTILES, SAMPLED_ROWS = 8, 128, 10, 4, 4000
TASKS = ("mlm", "classification", "ner")
METHODS = ("full-stock", "full-optimised", "fedbt-plain", "fedbt", "lora")
ARCHITECTURES = {  # with the number of attention heads
    "bert-base": (PRESETS["bert-base"], 12),
    "minilm-l6": (PRESETS["minilm-l6"], 12),
    "tiny": (Architecture(4, 64, 256, 30522), 4),
}
LABELS = tuple(f"label-{index}" for index in range(13))
TOKENS = SpecialTokens(pad=0, mask=103, special=(0, 100, 101, 102, 103), vocabulary=30522)
SETTINGS = train.TrainSettings(epochs=1, batch_size=BATCH, learning_rate=5e-5, weight_decay=0.01)


@dataclass(frozen=True)
class Work:
    """One batch, as FedBT reads it and as stock code does: padded to LENGTH, one label a position."""

    batch: Batch
    dense: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A client's rows of random word pieces and, of the batches made of them, some that stand for all."""

    rows: list[dict[str, Any]]
    works: list[Work]


@dataclass(frozen=True)
class Part:
    """One step that is measured; a method costs the sum of its parts, each times its share.

    Attributes
    ----------
    run : the whole step, from the forward pass to `zero_grad`
    predicted : its FLOPs by formula, where there is one
    padded : it costs the same for every batch, as all are padded to LENGTH
    """

    share: float
    run: Callable[[Work], None]
    predicted: Callable[[StepShape], int] | None = None
    padded: bool = False


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share."""

    folder: Path
    task: str
    bfloat16: bool = False

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint, with a new head where it has none for the task."""
        spec = ModelSpec(self.task, self.labels)
        bare = Weights(Checkpoint(self.folder), lambda _: {}, spec)
        head = new_tensors(bare.lacking(HEAD), seed=1)
        return replace(bare, held=lambda part: head if part == HEAD else {})

    @property
    def arch(self) -> Architecture:
        """Dimensions of the checkpoint."""
        return self.weights.checkpoint.architecture

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty for mlm."""
        return () if self.task == "mlm" else LABELS

    @property
    def collator(self) -> Collator:
        """Makes batches of the task."""
        return Collator(self.task, TOKENS, self.labels)

    def local_depths(self, method: str) -> tuple[int, ...]:
        """Depths to measure: in pre-training half the blocks and a third, else all of them."""
        depth = self.arch.depth
        return (depth // 2, depth // 3) if self.task == "mlm" and method.startswith("fedbt") else (depth,)

    def schedule(self, local_depth: int) -> list[RoundPlan]:
        """Return FedBT's plans of all rounds."""
        return [
            plan_round("fedbt", self.task, self.arch.depth, local_depth, ROUNDS, round_, seed=0, client="client")
            for round_ in range(ROUNDS)
        ]

    def build(self, plan: RoundPlan) -> LocalModel:
        """Build FedBT's local model."""
        return build(self.weights, plan, bfloat16=self.bfloat16)

    def open_cache(self, folder: Path, rows: Sequence[Any]) -> PrefixCache | None:
        """Open the frozen-prefix cache as a client does: there is none in pre-training."""
        depth = 0 if self.task == "mlm" else frozen_prefix("fedbt", self.task, self.arch.depth, 0, ROUNDS)
        base = f"{self.weights.checkpoint.fingerprint} bf16={self.bfloat16}" if depth else ""
        return PrefixCache.open(folder, depth, rows, self.arch.hidden, base, budget=1 << 40)


def write_checkpoint(folder: Path, name: str) -> None:
    """Write a BERT of random weights: config.json and model.safetensors."""
    arch, heads = ARCHITECTURES[name]
    config = {
        "model_type": "bert",
        "num_hidden_layers": arch.depth,
        "hidden_size": arch.hidden,
        "num_attention_heads": heads,
        "intermediate_size": arch.intermediate,
        "vocab_size": arch.vocabulary,
        "max_position_embeddings": arch.positions,
        "type_vocab_size": arch.token_types,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pooler = {key: shape for key, shape in arch.head("classification", 0).items() if "pooler" in key}
    tensors = new_tensors(arch.model("mlm", 0) | pooler, seed=0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Rows and batches ---------------------------------------------------------------------------------------------


def real_lengths(raw: Path | None) -> list[int]:
    """Return lengths in word pieces of real texts: those of `raw`/train.jsonl.gz, or clinical definitions."""
    if raw is None:
        texts = [row["text"] for row in embedded.rows("classification")["train"]]
    else:
        with gzip.open(raw / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
    chosen = np.random.default_rng(0).permutation(len(texts))[:SAMPLED_ROWS]
    tokenizer = Checkpoint(find_model(EMBEDDED)).tokenizer()
    return [
        len(ids) for ids in tokenizer([texts[row] for row in chosen], truncation=True, max_length=LENGTH)["input_ids"]
    ]


def random_rows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Make rows of random pieces; for ner every piece is a word, the most that the loss can read."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(1000, TOKENS.vocabulary, length)
        ids[0], ids[-1] = 101, 102
        names = [LABELS[index] for index in generator.integers(0, len(LABELS), length)]
        rows.append({"input_ids": ids.tolist(), "label": names[0], "tags": ["", *names[1:-1], ""]})
    return rows


def workload(setting: Setting, lengths: Sequence[int]) -> Workload:
    """Batch rows of these lengths as training does, and pick evenly spaced quantiles of the batches' lengths."""
    rows = random_rows(lengths)
    made = train.batches(rows, setting.collator, BATCH, np.random.default_rng(0))
    whole = sorted((one for one in made if len(one.rows) == BATCH), key=lambda one: one.shape[1])
    count = min(QUANTILES, len(whole))
    picked = [whole[int((index + 0.5) * len(whole) / count)] for index in range(count)]
    return Workload(rows, [Work(one, _dense(setting.task, one)) for one in picked])


def _dense(task: str, batch: Batch) -> dict[str, torch.Tensor]:
    def widened(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, LENGTH - values.shape[1]))

    present = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
    labels = torch.full((BATCH, LENGTH), IGNORED).scatter(1, batch.positions, batch.labels)
    return {
        "input_ids": widened(batch.input_ids),
        "attention_mask": widened(present.long()),
        "labels": batch.labels[:, 0] if task == "classification" else labels,
    }


# Methods ------------------------------------------------------------------------------------------------------


def parts(setting: Setting, method: str, local_depth: int, load: Workload, largest: bool = False) -> list[Part]:
    """Build a method's models and return its steps; `largest` for the plan that needs most memory only."""
    arch, task, labels = setting.arch, setting.task, len(setting.labels)
    if method == "full-stock":
        predicted = partial(_stock_flops, arch, task, labels)
        return [Part(1, _stock_step(stock_model(setting), setting.bfloat16), predicted, padded=True)]
    if method == "lora":
        return [Part(1, _stock_step(_lora(setting), setting.bfloat16), padded=True)]
    if method == "full-optimised":
        plan = full_plan(arch.depth)
        return [Part(1, _exact_step(setting.build(plan)), partial(step_flops, arch, task, labels, plan))]
    plans = _largest(setting, local_depth) if largest else _distinct(setting.schedule(local_depth))
    if method == "fedbt-plain":
        models = [(setting.build(plan).module.train(), share) for plan, share in plans]
        return [Part(share, _stock_step(model, setting.bfloat16), padded=True) for model, share in models]
    return _fedbt(setting, plans, setting.open_cache(setting.folder / "prefix", load.rows))


def stock_model(setting: Setting) -> Any:
    """Load transformers' own model as anybody would."""
    from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

    if setting.task == "mlm":
        return BertForMaskedLM.from_pretrained(setting.folder).train()
    stock: Any = BertForSequenceClassification if setting.task == "classification" else BertForTokenClassification
    return stock.from_pretrained(setting.folder, num_labels=len(LABELS)).train()


def _lora(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=None if setting.task == "mlm" else ["classifier"],
    )
    return get_peft_model(stock_model(setting), config).train()


def _fedbt(setting: Setting, plans: list[tuple[RoundPlan, float]], cache: PrefixCache | None) -> list[Part]:
    """Make the parts of the product's own steps; filling the cache costs each example one pass in all rounds."""
    flops = partial(step_flops, setting.arch, setting.task, len(setting.labels))
    locals_ = [setting.build(plan) for plan, _ in plans]
    if cache is None:
        pairs = zip(plans, locals_, strict=True)
        return [Part(share, _exact_step(local), partial(flops, plan)) for (plan, share), local in pairs]

    def fill(work: Work) -> None:
        cache.write(work.batch, forward.prefix(locals_[0], work.batch, cache.depth).states)

    def above(plan: RoundPlan, shape: StepShape) -> int:
        return flops(replace(plan, local_blocks=plan.local_blocks[cache.depth :]), shape)

    first = plans[0][0]
    made = [Part(1 / ROUNDS, fill, lambda shape: flops(first, shape) - above(first, shape))]
    for (plan, share), local in zip(plans, locals_, strict=True):
        made.append(Part(share, _exact_step(local, cache), partial(above, plan)))
    return made


def _stock_step(model: Any, bfloat16: bool) -> Callable[[Work], None]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])

    def run(work: Work) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**work.dense).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _exact_step(local: LocalModel, cache: PrefixCache | None = None) -> Callable[[Work], None]:
    optimizer = train._adamw(list(local.trained.values()), SETTINGS)

    def run(work: Work) -> None:
        start = None
        if cache is not None:
            states = cache.read(work.batch)
            assert states is not None, "the cache is filled first"
            start = forward.Prefix(cache.depth, states)
        forward.loss(local, work.batch, start).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _stock_flops(arch: Architecture, task: str, labels: int, _: StepShape) -> int:
    return stock_step_flops(arch, task, labels, BATCH, LENGTH)


def _distinct(plans: list[RoundPlan]) -> list[tuple[RoundPlan, float]]:
    """Take one of all plans that compute the same, with their share: which frozen blocks were drawn is no matter."""
    kinds: dict[tuple[int, int, int], list[RoundPlan]] = {}
    for plan in plans:
        kinds.setdefault((len(plan.local_blocks), plan.lowest_trained, len(plan.trained_blocks)), []).append(plan)
    return [(same[0], len(same) / len(plans)) for same in kinds.values()]


def _largest(setting: Setting, local_depth: int) -> list[tuple[RoundPlan, float]]:
    shape = default_shape(setting.task, BATCH, LENGTH, setting.collator.mask_probability)

    def memory(plan: RoundPlan) -> int:
        return round_costs(setting.arch, setting.task, len(setting.labels), plan, shape).memory_bytes

    return [(max(setting.schedule(local_depth), key=memory), 1.0)]
