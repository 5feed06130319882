"""The paper's tables from the lines of benchmarks/results/paper.jsonl."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.publish.marks import table
from benchmarks.publish.paper_statistics import (
    BASE,
    COSTS,
    MARGIN,
    NO_SHARES,
    REFERENCE,
    Cell,
    cell_of,
    cells_of,
    costs_of,
    equal_cost_texts,
    loss_ratio_text,
    mean_share,
    megabytes,
    name_of,
    paired_differences,
    points_text,
    score_text,
    shares_of,
    shares_text,
    spent_of,
    spread_text,
    tests_against_reference,
    tflop,
    title_of,
)
from benchmarks.results import Line, best

# in this order, and methods in that of METHODS
DATASETS = ("raw_biomed", "chemprot", "ncbi_disease", "bc5cdr")
METHODS = ("base", "BERT-C", "BERT-FL", "FedBT", "FedBT-LoRA", "LoRA", "shallow student", "head")
NONE_YET = "Not run yet."


def blocks(lines: list[Line]) -> dict[str, str]:
    """Return the blocks of docs/results.md."""

    def of(name: str, make: Callable[[list[Line]], str], beside: str = "") -> str:
        own = [line for line in lines if line["table"] == name]
        if not own:
            return NONE_YET
        datasets = _datasets(own)
        known = []
        for line in lines:
            if line["table"] != beside or line["dataset"] not in datasets:
                continue
            if line["method"] in (BASE[0], REFERENCE[0], "FedBT"):
                known.append(line)
        return make([*known, *own])

    return {
        "finetune-tuning": of("finetune-tuning", tuning),
        "finetune": of("finetune", comparison),
        "cost to target": of("finetune", cost_to_target),
        "finetune-16": of("finetune-16", comparison),
        "pretrain-tuning": of("pretrain-tuning", tuning),
        "pretrain": of("pretrain", pretraining),
        "skew": of("skew", skew),
        "plan-tuning": of("plan-tuning", tuning),
        "plan-finetune": of("plan-finetune", plans),
        "plan-pretrain": of("plan-pretrain", pretraining, beside="pretrain"),
    }


# Tables -------------------------------------------------------------------------------------------


def ordered(lines: list[Line]) -> list[Line]:
    """Return the lines in the order of the tables; cells finish in any."""

    def place(line: Line) -> tuple[int, int]:
        dataset = _index(DATASETS, line["dataset"])
        method = _index(METHODS, line["method"])
        return dataset, method

    return sorted(lines, key=place)


def _index(names: Sequence[str], name: str) -> int:
    if name not in names:
        return len(names)
    return names.index(name)


def tuning(lines: list[Line]) -> str:
    """Return one row a method: what was tried, its score on validation text, the best in bold."""
    datasets = _datasets(lines)
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        of_method = [line for line in lines if line["method"] == method]
        row = [method]
        for dataset in datasets:
            own = [line for line in of_method if line["dataset"] == dataset]
            row.append(_all_tried(own))
        rows.append(row)
    titles = " | ".join(title_of(lines, dataset) for dataset in datasets)
    return table(f"| method | {titles} |", rows)


def _datasets(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(line["dataset"] for line in lines))


def _of_dataset(lines: list[Line], dataset: str) -> dict[Cell, list[Line]]:
    return cells_of(line for line in lines if line["dataset"] == dataset)


def _all_tried(lines: list[Line]) -> str:
    """Return what was tried for one method on one data set, with scores, the best in bold."""
    if not lines:
        return ""
    chosen = best(lines)["variant"]
    texts = []
    for line in sorted(lines, key=_tried_values):
        text = f"{_tried(line)}: {score_text(line['metric'], line['value'])}"
        if line["variant"] == chosen:
            text = f"**{text}**"
        texts.append(text)
    return "; ".join(texts)


def _tried_values(line: Line) -> tuple[Any, ...]:
    return tuple(line["tried"].values())


def _tried(line: Line) -> str:
    texts = []
    for name, value in line["tried"].items():
        text = f"rank {value}"
        if name == "learning-rate":
            text = f"{value:g}"
        texts.append(text)
    return ", ".join(texts)


def comparison(lines: list[Line]) -> str:
    """Return a table for each data set: score, tests against BERT-FL, costs as shares of its own."""
    made = []
    for dataset in _datasets(lines):
        cells = _of_dataset(lines, dataset)
        rows = []
        for cell, own in cells.items():
            tests_of_cell = tests_against_reference(own, cells)
            rows.append([name_of(cell), *tests_of_cell, *costs_of(own, cells)])
        tests = "points to BERT-FL (seeds) | p, t-test | p, TOST 1 point"
        head = f"| {title_of(lines, dataset)} | mean ± sd (seeds) | {tests} | {COSTS} |"
        made.append(table(head, rows))
    return "\n\n".join(made)


def main_table(lines: list[Line]) -> str:
    """Return the README's table: a method's score on each data set, its costs over all of them.

    What was run on a single data set, of several, stays in docs/results.md.
    """
    own = [line for line in lines if line["table"] == "finetune"]
    if not own:
        return NONE_YET
    datasets = _datasets(own)
    rows = []
    for cell, lines_of_cell in cells_of(own).items():
        if len(_datasets(lines_of_cell)) < min(2, len(datasets)):
            continue
        row = [name_of(cell)]
        shares = []
        for dataset in datasets:
            cells = _of_dataset(own, dataset)
            lines_here = cells.get(cell, [])
            row.append(spread_text(lines_here))
            known = shares_of(lines_here, cells.get(REFERENCE, []))
            if known:
                shares.append(known)
        costs = NO_SHARES
        if shares:
            means = [mean_share(column) for column in zip(*shares, strict=True)]
            costs = shares_text(means, lines_of_cell)
        # padding is not a method's: the stock step's share is in docs/results.md
        rows.append([*row, *costs[1:]])
    titles = " | ".join(title_of(own, dataset) for dataset in datasets)
    cost_heads = "FLOPs, of BERT-FL | uplink | downlink | client seconds"
    return table(f"| method | {titles} | {cost_heads} |", rows)


def pretraining(lines: list[Line]) -> str:
    """Return one row a method: held-out MLM loss, and the score of a fine-tuning of its result.

    The latter with its distance to that of the base, which was not pre-trained further.
    """
    own = [line for line in lines if line["metric"] == "loss"]
    after = [line for line in lines if line["metric"] != "loss"]
    losses = cells_of(own)
    datasets = _datasets(after)
    rows = []
    for cell in sorted(cells_of(lines), key=lambda cell: cell != BASE):
        of_cell = losses.get(cell, [])
        loss = spread_text(of_cell)
        if cell == BASE:  # what all of them started from
            loss = f"{statistics.mean(line['initial'] for line in losses[REFERENCE]):.4f}"
        row = [
            name_of(cell),
            loss,
            loss_ratio_text(of_cell, losses),
            *equal_cost_texts(of_cell, losses),
        ]
        for dataset in datasets:
            row += _against_base(cell, _of_dataset(after, dataset))
        rows.append([*row, *costs_of(of_cell, losses)])
    titles = "".join(
        f"{title_of(after, dataset)} | points to base (seeds) | " for dataset in datasets
    )
    loss_title = title_of(own, own[0]["dataset"])
    loss_titles = f"{loss_title} | of BERT-FL's (seeds) | BERT-FL's at these FLOPs | at these bytes"
    return table(f"| method | {loss_titles} | {titles}{COSTS} |", rows)


def _against_base(cell: Cell, cells: dict[Cell, list[Line]]) -> list[str]:
    """Return the cell's score on one data set, and its distance to the base's."""
    own = cells.get(cell, [])
    if cell == BASE:
        return [spread_text(own), ""]
    return [spread_text(own), points_text(paired_differences(own, cells.get(BASE, [])))]


def plans(lines: list[Line]) -> str:
    """Return a table for each data set: score and costs of plans, BERT-FL's first, then by FLOPs.

    The last columns are what BERT-FL had reached at a plan's FLOPs and at its bytes.
    """
    made = []
    for dataset in _datasets(lines):
        cells = _of_dataset(lines, dataset)
        ranked = []
        for cell, own in cells.items():
            flops = statistics.mean(tflop(*spent_of(line)) for line in own)
            traffic = statistics.mean(megabytes(*spent_of(line)) for line in own)
            at_equal_cost = equal_cost_texts(own, cells)
            row = [
                name_of(cell),
                spread_text(own),
                f"{flops:.1f}",
                f"{traffic:,.0f}",
                *at_equal_cost,
            ]
            method = cell[0]
            ranked.append(((method, flops, traffic), row))
        ranked.sort(key=lambda pair: pair[0])
        rows = [row for _, row in ranked]
        costs = "TFLOP of all clients | MB both ways | BERT-FL at these FLOPs | at these bytes"
        head = f"| plan | {title_of(lines, dataset)} | {costs} |"
        made.append(table(head, rows))
    return "\n\n".join(made)


def skew(lines: list[Line]) -> str:
    """Return a row for each split and plan: BERT-FL's score, FedBT's, the difference."""
    rows = []
    fedbt = [line for line in lines if line["method"] == "FedBT"]
    for dataset, variant in dict.fromkeys((line["dataset"], line["variant"]) for line in fedbt):
        cells = _of_dataset(lines, dataset)
        plan, split = variant.split(", ", 1)
        full = cells.get((REFERENCE[0], split), [])
        ours = cells["FedBT", variant]
        for prefix in ("partitioner=", "partition-weights=", "dirichlet-"):
            split = split.replace(prefix, "")
        row = [
            title_of(lines, dataset),
            split,
            spread_text(full),
            plan,
            spread_text(ours),
            points_text(paired_differences(ours, full)),
        ]
        rows.append(row)
    head = "| data | split | BERT-FL | FedBT trains | FedBT | points to BERT-FL (seeds) |"
    return table(head, rows)


def cost_to_target(lines: list[Line]) -> str:
    """Return what each method spent to come within 2 points of BERT-FL's final score.

    That is told from the seed with a curve.
    """
    rows = []
    for dataset in _datasets(lines):
        curves = {}
        for line in lines:
            if line["dataset"] == dataset and len(line["curve"]) > 1:
                curves[cell_of(line)] = line
        if REFERENCE not in curves:
            continue
        goal = curves[REFERENCE]["value"] - 2 * MARGIN
        metric = curves[REFERENCE]["metric"]
        goal_text = f"{title_of(lines, dataset)} ≥ {score_text(metric, goal)}"
        for cell, line in curves.items():
            rows.append([goal_text, name_of(cell), *_spent_until(goal, line)])
    return table("| goal | method | rounds | TFLOP of all clients | MB both ways |", rows)


def _spent_until(goal: float, line: Line) -> list[str]:
    """Return the first round whose score reached the goal, and what was spent until then."""
    for number, flops, up, down, score in line["curve"]:
        if score >= goal:
            compute = tflop(flops, up, down)
            traffic = megabytes(flops, up, down)
            return [str(number), f"{compute:.1f}", f"{traffic:,.1f}"]
    return ["not reached"] * 3
