"""One client: answers the server's query, trains its local model, evaluates on its held-out rows.

A new object (in deployment a new process) answers each message; what must last is on disk, in the
parameter pool and the tokenised-data cache.
"""

import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedbt_app.client.pool import ParameterPool
from fedbt_app.codec.codec import decode
from fedbt_app.codec.feedback import encode_with_feedback
from fedbt_app.config import RunConfig
from fedbt_app.costs.cost_model import StepShape, full_plan, prefix_flops, step_flops, stock_step_flops
from fedbt_app.costs.ledger import ClientCosts
from fedbt_app.costs.meter import FlopMeter, Stopwatch
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError, without_folders
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.model.local_model import build, whole_plan
from fedbt_app.model.weights import Weights, model_spec
from fedbt_app.parts import PartState
from fedbt_app.plan import frozen_prefix
from fedbt_app.tasks.tasks import Collator, mask_once, special_tokens
from fedbt_app.tensors import Tensors, digest
from fedbt_app.training import train
from fedbt_app.training.prefix_cache import FrozenBlocks, PrefixCache
from fedbt_app.training.train import EVALUATION_BATCH, TrainResult
from fedbt_app.wire.messages import LACKING, Capabilities, Reply, Request
from fedbt_app.wire.updates import DELTA, Update


class Client:
    """A site as its run and node configuration describe it."""

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> None:
        self.config = RunConfig.load(run_config).with_node(node_config)
        self.device = pick_device(self.config.device)
        partition = (node_config.get("partition-id"), node_config.get("num-partitions"))
        self._partition = None
        if "data-path" not in node_config:
            if not all(isinstance(value, int) for value in partition):
                raise FedBTError("the node has neither data-path nor partition-id and num-partitions: set data-path")
            self._partition = (int(partition[0]), int(partition[1]))  # type: ignore[arg-type]
        self.name = str(node_config.get("name", f"client-{partition[0]}" if partition[0] is not None else "client"))

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
        return Capabilities(
            name=self.name,
            fingerprint=self.checkpoint.fingerprint(self.config.task),
            base=without_folders(self.config.model),
            examples=len(self._data.train),
            heldout=len(self._data.heldout),
            local_depth=self.config.local_depth,
            device=str(self.device),
            label_counts=self._data.label_counts,
            held=self._pool(request).states(),
        )

    def train(self, request: Request) -> Reply:
        """Bring the pool up to date, train the plan's blocks on the local rows, return their deltas."""
        if request.plan is None:
            raise FedBTError("the server asked for training without a plan: update FedBT on both sides")
        config, plan, watch, meter = self.config, request.plan, Stopwatch(self.device), FlopMeter()
        pool = self._pool(request)
        weights = Weights(self.checkpoint, pool.tensors, model_spec(config, request.labels))
        held = synchronise(pool, weights, request)
        if held != request.sync.expected:
            return Reply(LACKING, held=held)
        local = build(weights, plan, self.device, self._bfloat16)
        settings = train.TrainSettings(
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate_in(plan.round),
            weight_decay=config.weight_decay,
            tokens_per_batch=config.tokens_per_batch,
            micro_batch_size=config.micro_batch_size,
            checkpointing=config.checkpointing,
        )
        seed = [config.seed, zlib.crc32(self.name.encode()), plan.round]
        rows, collator = self._data.train.to_list(), self._collator(request)
        if config.task == "mlm" and config.fixed_versions:
            rows = mask_once(collator, rows, [*seed[:2], plan.round % config.fixed_versions])
        cache = self._prefix_cache(rows, pool.folder / "prefix")
        result = train.run(local, rows, collator, settings, meter, seed, cache)
        if cache:
            cache.close()
        encoded = {}
        for part, deltas in local.deltas(weights):
            _check_finite(part, deltas)
            encoded[part], _, dropped = encode_with_feedback(deltas, pool.residual(part), config.codec)
            pool.store_residual(part, dropped)
        return Reply(
            held=held,
            examples=result.examples,
            metrics={"train_loss": result.loss},
            deltas=encoded,
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
        metrics: dict[str, float] = {}
        if rows:
            local = build(weights, whole_plan(weights), self.device, self._bfloat16)
            size = min(config.micro_batch_size or config.batch_size, EVALUATION_BATCH)
            metrics = train.evaluate(local, rows, self._collator(request), size)
        costs = ClientCosts(seconds=watch.seconds, peak_memory_bytes=watch.peak_memory_bytes)
        return Reply(held=held, examples=len(rows), metrics=metrics, costs=costs)

    @property
    def _bfloat16(self) -> bool:
        return use_bfloat16(self.config.precision, self.device)

    def _prefix_cache(self, rows: list[dict[str, Any]], folder: Path) -> PrefixCache | None:
        """Open the cache for the blocks that no round of this run trains; rows masked anew each time have none."""
        config, arch = self.config, self.checkpoint.architecture
        if not config.fixed_versions:
            return None
        depth = frozen_prefix(
            config.method, config.task, arch.depth, config.local_depth, config.num_rounds, config.schedule
        )
        blocks = FrozenBlocks(f"{self.checkpoint.file_id} bf16={self._bfloat16}", depth, arch.hidden)
        budget = int(config.prefix_cache_gb * 1e9) // config.fixed_versions  # each has a cache of its own
        return PrefixCache.open(folder, blocks, rows, budget)

    def _pool(self, request: Request) -> ParameterPool:
        return ParameterPool(self.config.pool_folder, request.sync.lineage, self.name)

    def _collator(self, request: Request) -> Collator:
        config = self.config
        tokens = special_tokens(self.checkpoint.tokenizer())
        return Collator(config.task, tokens, request.labels, config.mask_probability)

    def _costs(
        self,
        request: Request,
        result: TrainResult,
        meter: FlopMeter,
        watch: Stopwatch,
        cache: PrefixCache | None,
    ) -> ClientCosts:
        arch, task, labels = self.checkpoint.architecture, self.config.task, len(request.labels)
        full, length = full_plan(arch.depth), self.config.max_length
        fused = self.device.type == "cuda" or not self.config.dropout
        return ClientCosts(
            train_flops=meter.total,
            stock_flops=sum(stock_step_flops(arch, task, labels, shape[0], length) for shape in result.shapes),
            same_flops=sum(
                step_flops(arch, task, labels, full, StepShape(*shape[:3]), fused=fused) for shape in result.shapes
            ),
            seconds=watch.seconds,
            peak_memory_bytes=watch.peak_memory_bytes,
            prefix_cache_bytes=cache.nbytes if cache else 0,
            saved_flops=sum(prefix_flops(arch, cache.depth, *shape) for shape in result.cached) if cache else 0,
        )


def _check_finite(part: str, deltas: Tensors) -> None:
    if not all(bool(delta.isfinite().all()) for delta in deltas.values()):
        raise FedBTError(f"training diverged, {part} is not finite: lower learning-rate")


def synchronise(pool: ParameterPool, weights: Weights, request: Request) -> dict[str, PartState]:
    """Apply the server's updates to the pool and return what it then holds.

    An update that does not give the digest it promises is not stored: the reply then says what is
    lacking and the server sends the part whole.
    """
    for update in request.sync.updates:
        if update.kind == DELTA and weights.lacking(update.part).keys() - pool.tensors(update.part).keys():
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
