"""The paper's tables from the lines of benchmarks/results/paper.jsonl."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.publish.marks import table
from benchmarks.publish.paper_statistics import (
    BASE,
    COSTS,
    MARGIN,
    NO_SHARES,
    REFERENCE,
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
from benchmarks.results import Line

DATASETS = ("raw_biomed", "chemprot", "ncbi_disease", "bc5cdr")  # in this order, and methods in that of METHODS
METHODS = ("base", "BERT-C", "BERT-FL", "FedBT", "FedBT-LoRA", "LoRA", "shallow student", "head")
NONE_YET = "Not run yet."


def blocks(lines: list[Line]) -> dict[str, str]:
    """Return the blocks of docs/results.md."""

    def of(name: str, make: Callable[[list[Line]], str], beside: str = "") -> str:
        own = [line for line in lines if line["table"] == name]
        datasets = {line["dataset"] for line in own}
        others = [line for line in lines if line["table"] == beside and line["dataset"] in datasets]
        known = [line for line in others if line["method"] in (BASE[0], REFERENCE[0], "FedBT")]
        return make([*known, *own]) if own else NONE_YET

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


# Tables -------------------------------------------------------------------------------------------------------


def ordered(lines: list[Line]) -> list[Line]:
    """Return the lines in the order of the tables; cells finish in any."""

    def place(line: Line) -> tuple[int, int]:
        return _index(DATASETS, line["dataset"]), _index(METHODS, line["method"])

    return sorted(lines, key=place)


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def tuning(lines: list[Line]) -> str:
    """Return one row a method: what was tried, its score on validation text, the best in bold."""
    datasets = list(dict.fromkeys(line["dataset"] for line in lines))
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        row = [method]
        for dataset in datasets:
            of_both = (line for line in lines if (line["method"], line["dataset"]) == (method, dataset))
            own = sorted(of_both, key=lambda line: tuple(line["tried"].values()))
            chosen = _best(own)["variant"] if own else ""
            tried = [f"{_tried(line)}: {score_text(line['metric'], line['value'])}" for line in own]
            bold = ["**{}**" if line["variant"] == chosen else "{}" for line in own]
            row.append("; ".join(form.format(text) for form, text in zip(bold, tried, strict=True)))
        rows.append(row)
    return table(f"| method | {' | '.join(title_of(lines, dataset) for dataset in datasets)} |", rows)


def comparison(lines: list[Line]) -> str:
    """Return a table for each data set: score, paired tests against BERT-FL, costs as shares of its costs."""
    made = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        cells = cells_of(line for line in lines if line["dataset"] == dataset)
        rows = [
            [name_of(cell), *tests_against_reference(own, cells), *costs_of(own, cells)] for cell, own in cells.items()
        ]
        tests = "points to BERT-FL (seeds) | p, t-test | p, TOST 1 point"
        head = f"| {title_of(lines, dataset)} | mean ± sd (seeds) | {tests} | {COSTS} |"
        made.append(table(head, rows))
    return "\n\n".join(made)


def main_table(lines: list[Line]) -> str:
    """Return the README's table: every method's score on each data set, and its costs over all of them.

    What was run on a single data set, of several, stays in docs/results.md.
    """
    own = [line for line in lines if line["table"] == "finetune"]
    if not own:
        return NONE_YET
    datasets = list(dict.fromkeys(line["dataset"] for line in own))
    rows = []
    for cell, lines_of_cell in cells_of(own).items():
        if len({line["dataset"] for line in lines_of_cell}) < min(2, len(datasets)):
            continue
        row, shares = [name_of(cell)], []
        for dataset in datasets:
            cells = cells_of(line for line in own if line["dataset"] == dataset)
            row.append(spread_text(cells.get(cell, [])))
            if known := shares_of(cells.get(cell, []), cells.get(REFERENCE, [])):
                shares.append(known)
        means = [mean_share(column) for column in zip(*shares, strict=True)]
        costs = shares_text(means, lines_of_cell) if means else NO_SHARES
        rows.append([*row, *costs[1:]])  # padding is not a method's: the stock step's share is in docs/results.md
    titles = " | ".join(title_of(own, dataset) for dataset in datasets)
    return table(f"| method | {titles} | FLOPs, of BERT-FL | uplink | downlink | client seconds |", rows)


def pretraining(lines: list[Line]) -> str:
    """Return one row a method: held-out MLM loss, and the score of the same fine-tuning of each result.

    The latter with its distance to that of the base, which was not pre-trained further.
    """
    own = [line for line in lines if line["metric"] == "loss"]
    after = [line for line in lines if line["metric"] != "loss"]
    losses, datasets = cells_of(own), list(dict.fromkeys(line["dataset"] for line in after))
    scores = {dataset: cells_of(line for line in after if line["dataset"] == dataset) for dataset in datasets}
    rows = []
    for cell in sorted(cells_of(lines), key=lambda cell: cell != BASE):
        loss = spread_text(losses.get(cell, []))
        if cell == BASE:
            loss = f"{statistics.mean(line['initial'] for line in losses[REFERENCE]):.4f}"
        of_cell = losses.get(cell, [])
        row = [name_of(cell), loss, loss_ratio_text(of_cell, losses), *equal_cost_texts(of_cell, losses)]
        for cells in scores.values():
            differences = [] if cell == BASE else paired_differences(cells.get(cell, []), cells.get(BASE, []))
            row += [spread_text(cells.get(cell, [])), points_text(differences)]
        rows.append([*row, *costs_of(of_cell, losses)])
    titles = "".join(f"{title_of(after, dataset)} | points to base (seeds) | " for dataset in datasets)
    loss_titles = (
        f"{title_of(own, own[0]['dataset'])} | of BERT-FL's (seeds) | BERT-FL's at these FLOPs | at these bytes"
    )
    return table(f"| method | {loss_titles} | {titles}{COSTS} |", rows)


def plans(lines: list[Line]) -> str:
    """Return a table for each data set: each plan's score and costs, BERT-FL's first, then from few FLOPs to many.

    The last columns are what BERT-FL had reached at a plan's FLOPs and at its bytes.
    """
    made = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        cells = cells_of(line for line in lines if line["dataset"] == dataset)
        rows = []
        spent = {
            cell: [statistics.mean(cost(*spent_of(line)) for line in own) for cost in (tflop, megabytes)]
            for cell, own in cells.items()
        }
        for cell, own in sorted(cells.items(), key=lambda item: (item[0][0], spent[item[0]])):
            flops, traffic = spent[cell]
            at_equal_cost = equal_cost_texts(own, cells)
            rows.append([name_of(cell), spread_text(own), f"{flops:.1f}", f"{traffic:,.0f}", *at_equal_cost])
        costs = "TFLOP of all clients | MB both ways | BERT-FL at these FLOPs | at these bytes"
        head = f"| plan | {title_of(lines, dataset)} | {costs} |"
        made.append(table(head, rows))
    return "\n\n".join(made)


def skew(lines: list[Line]) -> str:
    """Return a row for each split of the rows over clients and each plan: BERT-FL's score, FedBT's, the difference."""
    rows = []
    fedbt = [line for line in lines if line["method"] == "FedBT"]
    for dataset, variant in dict.fromkeys((line["dataset"], line["variant"]) for line in fedbt):
        own = cells_of(line for line in lines if line["dataset"] == dataset)
        plan, split = variant.split(", ", 1)
        full, ours = own.get((REFERENCE[0], split), []), own["FedBT", variant]
        named = split.replace("partitioner=", "").replace("partition-weights=", "").replace("dirichlet-", "")
        points = points_text(paired_differences(ours, full))
        rows.append([title_of(lines, dataset), named, spread_text(full), plan, spread_text(ours), points])
    return table("| data | split | BERT-FL | FedBT trains | FedBT | points to BERT-FL (seeds) |", rows)


def cost_to_target(lines: list[Line]) -> str:
    """Return, from the seed with a curve, what each method spent to come within 2 points of BERT-FL's final score."""
    rows = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        curves = {cell_of(line): line for line in lines if line["dataset"] == dataset and len(line["curve"]) > 1}
        if REFERENCE not in curves:
            continue
        goal = curves[REFERENCE]["value"] - 2 * MARGIN
        for cell, line in curves.items():
            reached = next((point for point in line["curve"] if point[-1] >= goal), None)
            spent = ["not reached"] * 3
            if reached:
                spent = [str(reached[0]), f"{tflop(*reached[1:4]):.1f}", f"{megabytes(*reached[1:4]):,.1f}"]
            rows.append([f"{title_of(lines, dataset)} ≥ {score_text(line['metric'], goal)}", name_of(cell), *spent])
    return table("| goal | method | rounds | TFLOP of all clients | MB both ways |", rows)


def _tried(line: Line) -> str:
    return ", ".join(
        f"{value:g}" if name == "learning-rate" else f"rank {value}" for name, value in line["tried"].items()
    )


def _best(lines: list[Line]) -> Line:
    return (min if lines[0]["metric"] == "loss" else max)(lines, key=lambda line: line["value"])
