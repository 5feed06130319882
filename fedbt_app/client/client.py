"""One client: answers the server's query, trains its local model, evaluates on its held-out rows.

A new object (in deployment a new process) answers each message; what must last is on disk, in the
parameter pool and the tokenised-data cache.
"""

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from fedbt_app.client.pool import ParameterPool
from fedbt_app.codec.codec import Encoded, decode
from fedbt_app.codec.feedback import encode_with_feedback
from fedbt_app.config import RunConfig
from fedbt_app.costs.cost_model import CostModel
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.ledger import ClientCosts
from fedbt_app.costs.meter import FlopMeter, Stopwatch
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError, without_folders
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import Weights, model_spec
from fedbt_app.parts import BASE, PartState
from fedbt_app.plan import untrained_plan
from fedbt_app.privacy import mechanisms
from fedbt_app.privacy.base import Mechanism
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading, SpecialTokens
from fedbt_app.tasks.batch import Collator, special_tokens
from fedbt_app.tensors import Tensors, digest
from fedbt_app.training import train
from fedbt_app.training.optimizer import TrainSettings
from fedbt_app.training.prefix_cache import FrozenBlocks, PrefixCache
from fedbt_app.training.train import EVALUATION_BATCH, TrainResult
from fedbt_app.wire.messages import LACKING, Capabilities, Reply, Request
from fedbt_app.wire.updates import DELTA, Update

log = logging.getLogger("flwr")


class Client:
    """A site as its run and node configuration describe it."""

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> None:
        self.config = RunConfig.load(run_config).with_node(node_config)
        self.task = TASKS[self.config.task]
        self.device = pick_device(self.config.device)
        self._partition = _partition(node_config)
        self.name = _name(node_config)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base that every site starts from."""
        return Checkpoint(find_model(self.config.model), self.config.cache_folder)

    @cached_property
    def _data(self) -> examples.ClientData:
        base = self.checkpoint
        return examples.client_data(
            self.config,
            tokenizer=base.tokenizer,
            tokenizer_id=base.tokenizer_id,
            partition=self._partition,
        )

    def capabilities(self, request: Request) -> Capabilities:
        """Say what this site has and can: names and counts only."""
        return self.offer(self._pool(request).states())

    def offer(self, held: Mapping[str, PartState]) -> Capabilities:
        """Return all that the answer to a query says; `held` is what the pool holds."""
        for warning in (*self.checkpoint.tokenizer_facts.warnings, *self._data.fit.warnings):
            log.warning("fedbt: %s: %s", self.name, warning)
        self._tell_labels()
        return Capabilities(
            name=self.name,
            fingerprint=self.checkpoint.fingerprint(self.task.head),
            base=without_folders(self.config.model),
            tokenizer=self.checkpoint.tokenizer_facts.fingerprint,
            tokenizer_description=self.checkpoint.tokenizer_facts.description,
            examples=len(self._data.train),
            heldout=len(self._data.heldout),
            local_depth=self.config.local_depth,
            device=str(self.device),
            label_counts=self._data.label_counts,
            fit=self._data.fit,
            held=dict(held),
        )

    def _tell_labels(self) -> None:
        """Show the people of a site the names that are about to leave it, in its own log."""
        if self._partition is not None or not self.task.label_key:
            return  # rows of a simulation come from the server
        names = dict.fromkeys(map(self.task.plain_name, self._data.label_counts))
        shown = ", ".join(filter(None, names))
        log.info("fedbt: %s: label names that the server will see: %s", self.name, shown)

    def train(self, request: Request) -> Reply:
        """Bring the pool up to date, train the plan's blocks on local rows, return their deltas."""
        plan = request.plan
        if plan is None:
            raise FedBTError(
                "the server asked for training without a plan: update FedBT on both sides"
            )
        watch = Stopwatch(self.device)
        meter = FlopMeter()
        pool = self._pool(request)
        weights = self._weights(pool, request)
        held = synchronise(pool, weights, request)
        if held != request.sync.expected:
            return Reply(LACKING, held=held)
        local = build(weights, plan, self.device, self._bfloat16)
        rows = self._rows(plan.round)
        collator = self._collator(request)
        settings = self._settings(plan.round)
        with self._prefix_cache(rows, pool.folder / "prefix") as cache:
            result = train.run(local, rows, collator, settings, meter, cache)
        return Reply(
            held=held,
            examples=result.examples,
            metrics={"train_loss": result.loss},
            deltas=self._encoded(local, weights, pool),
            costs=self._costs(request, result, meter, watch, cache),
        )

    def evaluate(self, request: Request) -> Reply:
        """Bring the pool up to date and evaluate the whole global model on the held-out rows."""
        config = self.config
        watch = Stopwatch(self.device)
        pool = self._pool(request)
        weights = self._weights(pool, request)
        held = synchronise(pool, weights, request)
        if held != request.sync.expected:
            return Reply(LACKING, held=held)
        rows = self._data.heldout.to_list()
        tally: dict[str, float] = {}
        if rows:
            plan = untrained_plan(self.checkpoint.architecture.depth)
            local = build(weights, plan, self.device, self._bfloat16)
            size = min(config.micro_batch_size or config.batch_size, EVALUATION_BATCH)
            tally = train.evaluate(local, rows, self._collator(request), size).tally
        costs = ClientCosts(seconds=watch.seconds, peak_memory_bytes=watch.peak_memory_bytes)
        return Reply(held=held, examples=len(rows), tally=tally, costs=costs)

    @property
    def _bfloat16(self) -> bool:
        return use_bfloat16(self.config.precision, self.device)

    @property
    def _seed(self) -> tuple[int, int]:
        """The run's seed and what tells this client from others."""
        return self.config.seed, zlib.crc32(self.name.encode())

    def _settings(self, number: int) -> TrainSettings:
        config = self.config
        return TrainSettings(
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate_in(number),
            weight_decay=config.weight_decay,
            tokens_per_batch=config.tokens_per_batch,
            micro_batch_size=config.micro_batch_size,
            checkpointing=config.checkpointing,
            seed=(*self._seed, number),
        )

    def _rows(self, number: int) -> Sequence[Mapping[str, Any]]:
        """Return the training rows; of fixed versions, the one whose turn a round is."""
        rows: list[dict[str, Any]] = self._data.train.to_list()
        versions = self.config.fixed_versions
        if not versions:
            return rows
        seed = (*self._seed, number % versions)
        return self.task.fixed(rows, self._reading(), seed)

    def _prefix_cache(
        self, rows: Sequence[Mapping[str, Any]], folder: Path
    ) -> AbstractContextManager[Any]:
        """Open the cache for the blocks that no round trains; rows masked anew have none."""
        config = self.config
        architecture = self.checkpoint.architecture
        if not config.fixed_versions:
            return nullcontext()
        plan = config.plan(architecture.depth)
        frozen = FrozenBlocks(
            base=f"{self.checkpoint.file_id} bf16={self._bfloat16}",
            depth=plan.frozen_prefix(config.local_depth),
            hidden=architecture.hidden,
        )
        # each version has a cache of its own
        budget = int(config.prefix_cache_gb * 1e9) // config.fixed_versions
        return PrefixCache.open(folder, frozen, rows, budget) or nullcontext()

    def _pool(self, request: Request) -> ParameterPool:
        return ParameterPool(self.config.pool_folder, request.sync.lineage, self.name)

    def _weights(self, pool: ParameterPool, request: Request) -> Weights:
        spec = model_spec(self.config, request.labels)
        return Weights(self.checkpoint, pool.tensors, spec)

    @cached_property
    def _tokens(self) -> SpecialTokens:
        return special_tokens(self.checkpoint.tokenizer())

    def _reading(self, labels: tuple[str, ...] = ()) -> Reading:
        return Reading(self._tokens, labels, self.config.mask_probability)

    def _collator(self, request: Request) -> Collator:
        return Collator(self.task, self._reading(request.labels))

    def _encoded(
        self,
        local: LocalModel,
        weights: Weights,
        pool: ParameterPool,
    ) -> dict[str, Encoded]:
        """Encode the trained deltas, part by part; what the codec drops is kept for next time."""
        treated = _treated(local.deltas(weights), mechanisms(self.config))
        encoded = {}
        for part, deltas in treated:
            _check_finite(part, deltas)
            residual = pool.residual(part)
            sent, _, dropped = encode_with_feedback(deltas, residual, self.config.codec)
            encoded[part] = sent
            pool.store_residual(part, dropped)
        return encoded

    def _costs(
        self,
        request: Request,
        result: TrainResult,
        meter: FlopMeter,
        watch: Stopwatch,
        cache: PrefixCache | None,
    ) -> ClientCosts:
        model = CostModel(
            self.checkpoint.architecture,
            task=self.task,
            num_labels=len(request.labels),
            fused=self.device.type == "cuda" or not self.config.dropout,
        )
        stock = 0
        same = 0
        for batch, length, positions, _ in result.shapes:
            stock += model.stock_step_flops(batch, self.config.max_length)
            same += model.full_step_flops(StepShape(batch, length, positions))
        saved = 0
        cache_bytes = 0
        if cache:
            cache_bytes = cache.nbytes
            for batch, length in result.cached:
                saved += model.prefix_flops(cache.depth, batch, length)
        return ClientCosts(
            train_flops=meter.total,
            stock_flops=stock,
            same_flops=same,
            seconds=watch.seconds,
            peak_memory_bytes=watch.peak_memory_bytes,
            prefix_cache_bytes=cache_bytes,
            saved_flops=saved,
        )


def _partition(node_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return which part of how many a simulated client has; None for a site with its own data."""
    if "data-path" in node_config:
        return None
    partition = node_config.get("partition-id")
    partitions = node_config.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(partitions, int):
        raise FedBTError(
            "the node has neither data-path nor partition-id and num-partitions: set data-path"
        )
    return partition, partitions


def _name(node_config: Mapping[str, Any]) -> str:
    name = "client"
    partition = node_config.get("partition-id")
    if partition is not None:
        name = f"client-{partition}"
    return str(node_config.get("name", name))


def _treated(
    parts: Iterable[tuple[str, Tensors]], treatments: Sequence[Mechanism]
) -> Iterable[tuple[str, Tensors]]:
    """Let the privacy mechanisms treat the deltas; without any, parts stay one by one in memory."""
    if not treatments:
        return parts
    deltas = dict(parts)
    for mechanism in treatments:
        deltas = mechanism.on_client(deltas)
    return deltas.items()


def _check_finite(part: str, deltas: Tensors) -> None:
    for delta in deltas.values():
        if not delta.isfinite().all():
            raise FedBTError(f"training diverged, {part} is not finite: lower learning-rate")


def synchronise(
    pool: ParameterPool,
    weights: Weights,
    request: Request,
) -> dict[str, PartState]:
    """Apply the server's updates to the pool and return what it then holds.

    An update that does not give the digest it promises is not stored: the reply then says what is
    lacking and the server sends the part whole.
    """
    for update in request.sync.updates:
        if update.kind == DELTA and _has_lost(pool, weights, update.part):
            continue
        tensors = _updated(weights, update)
        if digest(tensors) == update.state.digest:
            pool.store(update.part, update.state.version, tensors)
    held = pool.states()
    expected = request.sync.expected
    for part in held.keys() - expected.keys():
        pool.drop(part)  # of a round that a server resumed from an earlier one does not know
    return {part: held[part] for part in expected if part in held}


def _has_lost(pool: ParameterPool, weights: Weights, part: str) -> bool:
    """Say whether the pool lacks tensors that the base does not hold either: no delta fits them."""
    only_in_pool = weights.lacking(part).keys()
    return bool(only_in_pool - pool.tensors(part).keys())


def _updated(weights: Weights, update: Update) -> Tensors:
    if update.state.version == BASE:  # what the server made of what the base lacks
        shapes = weights.lacking(update.part)
    else:
        shapes = weights.shapes(update.part)
    sent = decode(update.encoded.arrays, update.encoded.header, shapes)
    if update.kind != DELTA:
        return sent
    current = weights.part(update.part)
    return {name: current[name] + delta for name, delta in sent.items()}
