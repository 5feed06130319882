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

import torch

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
from fedbt_app.parts import PartState
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
        return examples.client_data(self.config, base.tokenizer, base.tokenizer_id, self._partition)

    def capabilities(self, request: Request) -> Capabilities:
        """Say what this site has and can: names and counts only."""
        for warning in self._data.fit.warnings:
            log.warning("fedbt: %s: %s", self.name, warning)
        self._tell_labels()
        return Capabilities(
            name=self.name,
            fingerprint=self.checkpoint.fingerprint(self.task.head),
            base=without_folders(self.config.model),
            examples=len(self._data.train),
            heldout=len(self._data.heldout),
            local_depth=self.config.local_depth,
            device=str(self.device),
            label_counts=self._data.label_counts,
            fit=self._data.fit,
            held=self._pool(request).states(),
        )

    def _tell_labels(self) -> None:
        """Show the people of a site the names that are about to leave it, in its own log."""
        if self._partition is not None or not self.task.label_key:
            return  # rows of a simulation come from the server
        names = dict.fromkeys(map(self.task.plain_name, self._data.label_counts))
        shown = ", ".join(filter(None, names))
        log.info("fedbt: %s: label names that the server will see: %s", self.name, shown)

    def train(self, request: Request) -> Reply:
        """Bring the pool up to date, train the plan's blocks on the local rows, return their
        deltas.
        """
        if request.plan is None:
            raise FedBTError(
                "the server asked for training without a plan: update FedBT on both sides"
            )
        watch, meter = Stopwatch(self.device), FlopMeter()
        pool = self._pool(request)
        weights = Weights(self.checkpoint, pool.tensors, model_spec(self.config, request.labels))
        held = synchronise(pool, weights, request)
        if held != request.sync.expected:
            return Reply(LACKING, held=held)
        local = build(weights, request.plan, self.device, self._bfloat16)
        rows, collator = self._rows(request.plan.round), self._collator(request)
        with self._prefix_cache(rows, pool.folder / "prefix") as cache:
            result = train.run(
                local, rows, collator, self._settings(request.plan.round), meter, cache
            )
        return Reply(
            held=held,
            examples=result.examples,
            metrics={"train_loss": result.loss},
            deltas=self._encoded(local, weights, pool),
            costs=self._costs(request, result, meter, watch, cache),
        )

    def evaluate(self, request: Request) -> Reply:
        """Bring the pool up to date and evaluate the whole global model on the held-out rows."""
        config, watch = self.config, Stopwatch(self.device)
        pool = self._pool(request)
        weights = Weights(self.checkpoint, pool.tensors, model_spec(config, request.labels))
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

    def _settings(self, round_: int) -> TrainSettings:
        config = self.config
        return TrainSettings(
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate_in(round_),
            weight_decay=config.weight_decay,
            tokens_per_batch=config.tokens_per_batch,
            micro_batch_size=config.micro_batch_size,
            checkpointing=config.checkpointing,
            seed=(*self._seed, round_),
        )

    def _rows(self, round_: int) -> Sequence[Mapping[str, Any]]:
        """Return the training rows, in the version that is this round's turn where there are fixed
        ones.
        """
        rows: list[dict[str, Any]] = self._data.train.to_list()
        versions = self.config.fixed_versions
        if not versions:
            return rows
        return self.task.fixed(rows, self._reading(), (*self._seed, round_ % versions))

    def _prefix_cache(
        self, rows: Sequence[Mapping[str, Any]], folder: Path
    ) -> AbstractContextManager[Any]:
        """Open the cache for the blocks that no round of this run trains; rows masked anew each
        time have none.
        """
        config, architecture = self.config, self.checkpoint.architecture
        if not config.fixed_versions:
            return nullcontext()
        frozen = FrozenBlocks(
            base=f"{self.checkpoint.file_id} bf16={self._bfloat16}",
            depth=config.plan(architecture.depth).frozen_prefix(config.local_depth),
            hidden=architecture.hidden,
        )
        # each has a cache of its own
        budget = int(config.prefix_cache_gb * 1e9) // config.fixed_versions
        return PrefixCache.open(folder, frozen, rows, budget) or nullcontext()

    def _pool(self, request: Request) -> ParameterPool:
        return ParameterPool(self.config.pool_folder, request.sync.lineage, self.name)

    @cached_property
    def _tokens(self) -> SpecialTokens:
        return special_tokens(self.checkpoint.tokenizer())

    def _reading(self, labels: tuple[str, ...] = ()) -> Reading:
        return Reading(self._tokens, labels, self.config.mask_probability)

    def _collator(self, request: Request) -> Collator:
        return Collator(self.task, self._reading(request.labels))

    def _encoded(
        self, local: LocalModel, weights: Weights, pool: ParameterPool
    ) -> dict[str, Encoded]:
        """Encode the deltas of what was trained, part by part; what the codec drops is kept for the
        next time.
        """
        treated = _treated(local.deltas(weights), mechanisms(self.config))
        encoded = {}
        for part, deltas in treated:
            _check_finite(part, deltas)
            encoded[part], _, dropped = encode_with_feedback(
                deltas, pool.residual(part), self.config.codec
            )
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
        fused = self.device.type == "cuda" or not self.config.dropout
        model = CostModel(self.checkpoint.architecture, self.task, len(request.labels), fused=fused)
        shapes = [
            StepShape(batch, length, positions) for batch, length, positions, _ in result.shapes
        ]
        saved = (
            sum(model.prefix_flops(cache.depth, *shape) for shape in result.cached) if cache else 0
        )
        return ClientCosts(
            train_flops=meter.total,
            stock_flops=sum(
                model.stock_step_flops(shape.batch, self.config.max_length) for shape in shapes
            ),
            same_flops=sum(model.full_step_flops(shape) for shape in shapes),
            seconds=watch.seconds,
            peak_memory_bytes=watch.peak_memory_bytes,
            prefix_cache_bytes=cache.nbytes if cache else 0,
            saved_flops=saved,
        )


def _partition(node_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return which part of how many a simulated client has; None for a site with data of
    its own.
    """
    if "data-path" in node_config:
        return None
    partition, of = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(of, int):
        raise FedBTError(
            "the node has neither data-path nor partition-id and num-partitions: set data-path"
        )
    return partition, of


def _name(node_config: Mapping[str, Any]) -> str:
    partition = node_config.get("partition-id")
    return str(node_config.get("name", "client" if partition is None else f"client-{partition}"))


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
    if not all(bool(delta.isfinite().all()) for delta in deltas.values()):
        raise FedBTError(f"training diverged, {part} is not finite: lower learning-rate")


def synchronise(pool: ParameterPool, weights: Weights, request: Request) -> dict[str, PartState]:
    """Apply the server's updates to the pool and return what it then holds.

    An update that does not give the digest it promises is not stored: the reply then says what is
    lacking and the server sends the part whole.
    """
    for update in request.sync.updates:
        if (
            update.kind == DELTA
            and weights.lacking(update.part).keys() - pool.tensors(update.part).keys()
        ):
            continue  # a delta to tensors that this pool has lost
        tensors = _updated(weights, update)
        if digest(tensors) == update.state.digest:
            pool.store(update.part, update.state.version, tensors)
    held, expected = pool.states(), request.sync.expected
    for part in held.keys() - expected.keys():
        pool.drop(part)  # of a round that a server resumed from an earlier one does not know
    return {part: held[part] for part in expected if part in held}


def _updated(weights: Weights, update: Update) -> dict[str, torch.Tensor]:
    shapes = weights.shapes(update.part) if update.state.version else weights.lacking(update.part)
    sent = decode(update.encoded.arrays, update.encoded.header, shapes)
    if update.kind != DELTA:
        return sent
    current = weights.part(update.part)
    return {name: current[name] + delta for name, delta in sent.items()}
