"""`fedbt plan`: what a run would train and cost, round by round, from the model's dimensions alone."""

import math
from dataclasses import dataclass, replace

from fedbt_app.codec.formats import CODECS
from fedbt_app.config import RunConfig
from fedbt_app.costs import cost_model
from fedbt_app.costs.cost_model import RoundCosts
from fedbt_app.encoders.bert import Architecture
from fedbt_app.plan import frozen_prefix


@dataclass(frozen=True)
class Preview:
    """One client's predicted run beside full-model training of the same rows.

    FLOPs are sums over a round's steps; `stock` is the stock full-model step padded to max-length,
    `same` full-model training with this app's optimisations. Bytes are one way. The `frozen_blocks` lowest ones stay as
    they are in all rounds: their output takes `cache_bytes` of disk, if it is `cached`.
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
        return sum(one.exchange_bytes for one in self.rounds) / (len(self.rounds) * self.full_bytes)

    @property
    def flops_ratio(self) -> float:
        """FLOPs over all rounds, against the stock full-model step."""
        return self._mean_flops / self.stock_step_flops

    @property
    def flops_ratio_same(self) -> float:
        """FLOPs over all rounds, against full-model training with the same optimisations."""
        return self._mean_flops / self.same_step_flops

    @property
    def _mean_flops(self) -> float:
        return sum(one.step_flops for one in self.rounds) / len(self.rounds)


def preview(config: RunConfig, arch: Architecture, num_labels: int, examples: int) -> Preview:
    """Predict a run of `config` for a client of `examples` full-length rows, the frozen-prefix cache included."""
    shape = cost_model.default_shape(config.task, config.batch_size, config.max_length, config.mask_probability)
    full = cost_model.round_costs(arch, config.task, num_labels, cost_model.full_plan(arch.depth), shape)
    rounds = cost_model.predict_rounds(
        *(arch, config.task, config.method, num_labels, config.num_rounds, config.local_depth),
        *(shape, config.lora_rank, config.codec, config.schedule),
    )
    depth = frozen_prefix(
        config.method, config.task, arch.depth, config.local_depth, config.num_rounds, config.schedule
    )
    size = examples * config.max_length * arch.hidden * cost_model.BYTES * config.fixed_versions
    cached = bool(depth) and 0 < size <= config.prefix_cache_gb * 1e9
    if cached:
        prefix = cost_model.prefix_flops(arch, depth, shape.batch, shape.length)
        for index, one in enumerate(rounds):
            above = cost_model.step_flops(arch, config.task, num_labels, one.plan, shape, config.lora_rank, start=depth)
            fills = prefix // config.local_epochs if index < config.fixed_versions else 0
            rounds[index] = replace(one, step_flops=above + fills)
    return Preview(
        rounds=rounds,
        steps=math.ceil(examples / config.batch_size) * config.local_epochs,
        stock_step_flops=cost_model.stock_step_flops(arch, config.task, num_labels, shape.batch, shape.length),
        same_step_flops=full.step_flops,
        full_bytes=full.exchange_bytes,
        full_memory=full.memory_bytes,
        codec=config.codec,
        frozen_blocks=depth,
        cache_bytes=size,
        cached=cached,
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
    for head in (
        "TFLOP",
        "of stock\nfull",
        "of same-\nopt. full",
        "MB each\nway",
        "of full",
        "memory\nGB (est.)",
    ):
        table.add_column(head, justify="right", no_wrap=True)

    def row(name: str, blocks: str, depth: str, flops: float, size: float, memory: float) -> None:
        table.add_row(
            *(
                name,
                blocks,
                depth,
                f"{shown.steps * flops / 1e12:.2f}",
                f"{100 * flops / shown.stock_step_flops:.1f} %",
            ),
            *(f"{100 * flops / shown.same_step_flops:.1f} %", f"{size / 1e6:.2f}"),
            *(f"{100 * size / shown.full_bytes:.2f} %", f"{memory / 1e9:.2f}"),
        )

    for one in shown.rounds:
        plan = one.plan
        blocks = _ranges(plan.trained_blocks) + (" + embeddings" if plan.embeddings else "")
        blocks += " (adapters)" if plan.adapters else ""
        row(
            *(str(plan.round + 1), f"{blocks} + head", str(len(plan.local_blocks))),
            *(one.step_flops, one.exchange_bytes, one.memory_bytes),
        )
    table.add_section()
    count = len(shown.rounds)
    mean_flops = sum(one.step_flops for one in shown.rounds) / count
    mean_bytes = sum(one.exchange_bytes for one in shown.rounds) / count
    row(
        "mean",
        f"over {count} rounds",
        "",
        mean_flops,
        mean_bytes,
        max(one.memory_bytes for one in shown.rounds),
    )
    row("full", "all (stock step)", "", shown.stock_step_flops, shown.full_bytes, shown.full_memory)
    console = Console()
    console.width = max(console.width, 104)
    console.print(table)
    console.print(
        f"bytes each way with codec={shown.codec}{' before zstd' if CODECS[shown.codec].zstd else ''}: "
        f"{100 * shown.bytes_ratio:.2f} % of full-model averaging in float32; compute: "
        f"{100 * shown.flops_ratio:.1f} % of the stock full-model step, {100 * shown.flops_ratio_same:.1f} % of "
        "full-model training with the same optimisations; memory is an estimate, the mean row's the largest"
        f"{_about_cache(shown)}",
        highlight=False,
        soft_wrap=True,
    )


def _about_cache(shown: Preview) -> str:
    if not shown.frozen_blocks or not shown.cache_bytes:
        return ""
    blocks, size = _ranges(tuple(range(shown.frozen_blocks))), f"{shown.cache_bytes / 1e9:.2f} GB"
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
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups) or "none"
