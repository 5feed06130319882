"""`fedbt plan`: what a run would train and cost, by round, from the model's dimensions alone."""

import math
from dataclasses import dataclass, replace

from fedbt_app.codec.formats import CODECS
from fedbt_app.config import RunConfig
from fedbt_app.costs.cost_model import BYTES, CostModel, RoundCosts
from fedbt_app.costs.formulas import StepShape
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.plan import RoundPlan, full_plan
from fedbt_app.tasks import TASKS


@dataclass(frozen=True)
class Preview:
    """One client's predicted run beside full-model training of the same rows.

    FLOPs are sums over a round's steps; `stock` is the stock full-model step padded to max-length,
    `same` full-model training with this app's optimisations. Bytes are one way. The `frozen_blocks`
    lowest ones stay as they are in all rounds: their output takes `cache_bytes` of disk, if it is
    `cached`.
    """

    rounds: list[RoundCosts]
    steps: int
    stock_step_flops: int
    same_step_flops: int
    full_bytes: int
    full_memory: int
    codec: str
    frozen_blocks: int
    cache_bytes: int
    cached: bool

    @property
    def bytes_ratio(self) -> float:
        """Bytes each way over all rounds, against full-model federated averaging."""
        return self._mean_bytes / self.full_bytes

    @property
    def flops_ratio(self) -> float:
        """FLOPs over all rounds, against the stock full-model step."""
        return self._mean_flops / self.stock_step_flops

    @property
    def flops_ratio_same(self) -> float:
        """FLOPs over all rounds, against full-model training with the same optimisations."""
        return self._mean_flops / self.same_step_flops

    @property
    def mean_amounts(self) -> list[str]:
        """The cells of the mean over all rounds; of memory the largest."""
        largest = max(costs.memory_bytes for costs in self.rounds)
        return self.amounts(self._mean_flops, self._mean_bytes, largest)

    def amounts(self, flops: float, size: float, memory: float) -> list[str]:
        """Return the cells under HEADS: of a step's FLOPs, and bytes of an exchange and memory."""
        return [
            f"{self.steps * flops / 1e12:.2f}",
            f"{100 * flops / self.stock_step_flops:.1f} %",
            f"{100 * flops / self.same_step_flops:.1f} %",
            f"{size / 1e6:.2f}",
            f"{100 * size / self.full_bytes:.2f} %",
            f"{memory / 1e9:.2f}",
        ]

    @property
    def _mean_flops(self) -> float:
        return sum(costs.step_flops for costs in self.rounds) / len(self.rounds)

    @property
    def _mean_bytes(self) -> float:
        return sum(costs.exchange_bytes for costs in self.rounds) / len(self.rounds)


def preview(
    config: RunConfig, architecture: Architecture, num_labels: int, examples: int
) -> Preview:
    """Predict a run for a client of `examples` full-length rows, the prefix cache included."""
    model = CostModel(
        architecture,
        TASKS[config.task],
        num_labels,
        rank=config.lora_rank,
        codec=config.codec,
    )
    in_float32 = replace(model, codec="float32")
    shape = model.full_shape(config.batch_size, config.max_length, config.mask_probability)
    full = in_float32.round(full_plan(architecture.depth), shape)
    # any client's: which blocks it draws is open
    run_plan = replace(config.plan(architecture.depth), seed=0)
    plans = run_plan.rounds(local_depth=config.local_depth)
    rounds = [model.round(plan, shape) for plan in plans]
    frozen = run_plan.frozen_prefix(config.local_depth)
    pieces = examples * config.max_length * config.fixed_versions
    size = pieces * architecture.hidden * BYTES
    cached = bool(frozen) and 0 < size <= config.prefix_cache_gb * 1e9
    if cached:
        rounds = [_over_cache(config, model, costs, shape, frozen) for costs in rounds]
    return Preview(
        rounds=rounds,
        steps=math.ceil(examples / config.batch_size) * config.local_epochs,
        stock_step_flops=model.stock_step_flops(shape.batch, shape.length),
        same_step_flops=full.step_flops,
        full_bytes=full.exchange_bytes,
        full_memory=full.memory_bytes,
        codec=config.codec,
        frozen_blocks=frozen,
        cache_bytes=size,
        cached=cached,
    )


def _over_cache(
    config: RunConfig, model: CostModel, costs: RoundCosts, shape: StepShape, frozen: int
) -> RoundCosts:
    """Return a round's costs over the cache of the frozen blocks' output."""
    flops = model.step_flops(costs.plan, shape, start=frozen)
    if costs.plan.round < config.fixed_versions:  # the first epoch fills the cache
        flops += model.prefix_flops(frozen, shape.batch, shape.length) // config.local_epochs
    return replace(costs, step_flops=flops)


HEADS = (
    "TFLOP",
    "of stock\nfull",
    "of same-\nopt. full",
    "MB each\nway",
    "of full",
    "memory\nGB (est.)",
)


def print_preview(shown: Preview, title: str) -> None:
    """Print the table with rich."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("round", justify="right")
    table.add_column("trained blocks", no_wrap=True)
    table.add_column("local\nblocks", justify="right", no_wrap=True)
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for costs in shown.rounds:
        plan = costs.plan
        amounts = shown.amounts(costs.step_flops, costs.exchange_bytes, costs.memory_bytes)
        table.add_row(str(plan.round + 1), _trained(plan), str(len(plan.local_blocks)), *amounts)
    table.add_section()
    table.add_row("mean", f"over {len(shown.rounds)} rounds", "", *shown.mean_amounts)
    full = shown.amounts(shown.stock_step_flops, shown.full_bytes, shown.full_memory)
    table.add_row("full", "all (stock step)", "", *full)
    console = Console()
    console.width = max(console.width, 104)
    console.print(table)
    console.print(_below(shown), highlight=False, soft_wrap=True)


def _below(shown: Preview) -> str:
    before_zstd = ""
    if CODECS[shown.codec].zstd:
        before_zstd = " before zstd"
    return (
        f"bytes each way with codec={shown.codec}{before_zstd}: "
        f"{100 * shown.bytes_ratio:.2f} % of full-model averaging in float32; compute: "
        f"{100 * shown.flops_ratio:.1f} % of the stock full-model step, {100 * shown.flops_ratio_same:.1f} % of "
        "full-model training with the same optimisations; memory is an estimate, the mean row's the largest"
        f"{_about_cache(shown)}"
    )


def _trained(plan: RoundPlan) -> str:
    text = _ranges(plan.trained_blocks)
    if plan.embeddings:
        text += " + embeddings"
    if plan.adapters:
        text += " (adapters)"
    return f"{text} + head"


def _about_cache(shown: Preview) -> str:
    if not shown.frozen_blocks or not shown.cache_bytes:
        return ""
    blocks = _ranges(tuple(range(shown.frozen_blocks)))
    size = f"{shown.cache_bytes / 1e9:.2f} GB"
    if shown.cached:
        return f"; a client keeps the output of the frozen blocks {blocks} on disk, {size}"
    return f"; the frozen blocks {blocks} run anew each time: to keep their output, let prefix-cache-gb be above {size}"


def _ranges(blocks: tuple[int, ...]) -> str:
    """Write ascending numbers as `3, 7-11`."""
    groups: list[list[int]] = []
    for block in blocks:
        if groups and block == groups[-1][-1] + 1:
            groups[-1].append(block)
        else:
            groups.append([block])
    texts = []
    for group in groups:
        text = str(group[0])
        if len(group) > 1:
            text += f"-{group[-1]}"
        texts.append(text)
    return ", ".join(texts) or "none"
