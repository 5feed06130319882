"""The paper's tables from the lines of benchmarks/results/paper.jsonl, with paired statistics over seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from marks import table
from scipy import stats

Line = dict[str, Any]
Cell = tuple[str, str]  # method, variant

REFERENCE: Cell = ("BERT-FL", "")
MARGIN = 0.01  # of the equivalence test: one point
DATASETS = ("raw_biomed", "chemprot", "ncbi_disease", "bc5cdr")  # in this order, and methods in that of METHODS
METHODS = ("base", "BERT-C", "BERT-FL", "FedBT", "FedBT-LoRA", "LoRA", "shallow student", "head")
METRICS = {"accuracy": "accuracy", "f1": "entity F1", "loss": "MLM loss"}
NONE_YET = "Not run yet."


def blocks(lines: list[Line]) -> dict[str, str]:
    """Return the blocks of docs/results.md."""

    def of(name: str, make: Callable[[list[Line]], str], beside: str = "") -> str:
        own = [line for line in lines if line["table"] == name]
        datasets = {line["dataset"] for line in own}
        others = [line for line in lines if line["table"] == beside and line["dataset"] in datasets]
        known = [line for line in others if line["method"] in (REFERENCE[0], "FedBT")]
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
            own = [line for line in lines if (line["method"], line["dataset"]) == (method, dataset)]
            chosen = _best(own)["variant"] if own else ""
            tried = [f"{_tried(line)}: {_score(line['metric'], line['value'])}" for line in own]
            bold = ["**{}**" if line["variant"] == chosen else "{}" for line in own]
            row.append("; ".join(form.format(text) for form, text in zip(bold, tried, strict=True)))
        rows.append(row)
    return table(f"| method | {' | '.join(_title(lines, dataset) for dataset in datasets)} |", rows)


def comparison(lines: list[Line]) -> str:
    """Return a table for each data set: score, paired tests against BERT-FL, costs as shares of its costs."""
    made = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        cells = _cells(line for line in lines if line["dataset"] == dataset)
        rows = [[_name(cell), *_against_reference(own, cells), *_costs(own, cells)] for cell, own in cells.items()]
        tests = "points to BERT-FL | p, t-test | p, TOST 1 point"
        head = f"| {_title(lines, dataset)} | mean ± sd (seeds) | {tests} | {COSTS} |"
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
    for cell, lines_of_cell in _cells(own).items():
        if len({line["dataset"] for line in lines_of_cell}) < min(2, len(datasets)):
            continue
        row, shares = [_name(cell)], []
        for dataset in datasets:
            cells = _cells(line for line in own if line["dataset"] == dataset)
            row.append(_spread(cells[cell]) if cell in cells else "")
            if cell in cells and REFERENCE in cells:
                shares.append(_shares(cells[cell], cells[REFERENCE]))
        means = [statistics.mean(column) for column in zip(*shares, strict=True)]
        rows.append([*row, *(_percents(means, lines_of_cell) if means else [""] * 5)])
    return table(f"| method | {' | '.join(_title(own, dataset) for dataset in datasets)} | {COSTS} |", rows)


def pretraining(lines: list[Line]) -> str:
    """Return one row a method: held-out MLM loss, and the score of the same fine-tuning of each result."""
    datasets = list(dict.fromkeys(line["dataset"] for line in sorted(lines, key=lambda line: line["metric"] != "loss")))
    by_dataset = {dataset: _cells(line for line in lines if line["dataset"] == dataset) for dataset in datasets}
    losses = by_dataset[datasets[0]]
    rows = []
    for cell in _cells(lines):
        own = losses.get(cell, [])
        scores = [_spread(by_dataset[dataset].get(cell, [])) for dataset in datasets]
        if cell == ("base", ""):
            scores[0] = f"{statistics.mean(line['initial'] for line in losses[REFERENCE]):.4f}"
        rows.append([_name(cell), *scores, _loss_ratio(own, losses), _equal_flops(own, losses), *_costs(own, losses)])
    titles = " | ".join(_title(lines, dataset) for dataset in datasets)
    return table(f"| method | {titles} | loss, of BERT-FL's | BERT-FL's loss at these FLOPs | {COSTS} |", rows)


def plans(lines: list[Line]) -> str:
    """Return a table for each data set: each plan's score and costs, BERT-FL's first, then from few FLOPs to many.

    The last column is what BERT-FL had reached at a plan's FLOPs.
    """
    made = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        cells = _cells(line for line in lines if line["dataset"] == dataset)
        rows = []
        spent = {cell: statistics.mean(line["train_flops"] for line in own) for cell, own in cells.items()}
        for cell, own in sorted(cells.items(), key=lambda item: (item[0][0], spent[item[0]])):
            flops = spent[cell] / 1e12
            sent = statistics.mean(line["uplink_bytes"] + line["downlink_bytes"] for line in own) / 1e6
            rows.append([_name(cell), _spread(own), f"{flops:.1f}", f"{sent:,.0f}", _equal_flops(own, cells)])
        head = f"| plan | {_title(lines, dataset)} | TFLOP of all clients | MB both ways | BERT-FL at these FLOPs |"
        made.append(table(head, rows))
    return "\n\n".join(made)


def skew(lines: list[Line]) -> str:
    """Return a row for each split of the rows over clients: BERT-FL's score, FedBT's, and the difference."""
    rows = []
    for dataset, variant in dict.fromkeys((line["dataset"], line["variant"]) for line in lines):
        own = [line for line in lines if (line["dataset"], line["variant"]) == (dataset, variant)]
        full, ours = ([line for line in own if line["method"] == method] for method in ("BERT-FL", "FedBT"))
        differences = _differences(ours, full)
        rows.append([_title(lines, dataset), variant, _spread(full), _spread(ours), _points(differences)])
    return table("| data | split | BERT-FL | FedBT | points to BERT-FL |", rows)


def cost_to_target(lines: list[Line]) -> str:
    """Return, from the seed with a curve, what each method spent to come within 2 points of BERT-FL's final score."""
    rows = []
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        curves = {_cell(line): line for line in lines if line["dataset"] == dataset and len(line["curve"]) > 1}
        if REFERENCE not in curves:
            continue
        goal = curves[REFERENCE]["value"] - 2 * MARGIN
        for cell, line in curves.items():
            reached = next((point for point in line["curve"] if point[-1] >= goal), None)
            spent = ["not reached"] * 3
            if reached:
                spent = [str(reached[0]), f"{reached[1] / 1e12:.1f}", f"{(reached[2] + reached[3]) / 1e6:,.1f}"]
            rows.append([f"{_title(lines, dataset)} ≥ {_score(line['metric'], goal)}", _name(cell), *spent])
    return table("| goal | method | rounds | TFLOP of all clients | MB both ways |", rows)


# Statistics ---------------------------------------------------------------------------------------------------


def _against_reference(own: list[Line], cells: dict[Cell, list[Line]]) -> list[str]:
    """Return score, paired difference, p of a paired t-test and p of two one-sided tests at MARGIN."""
    differences = _differences(own, cells.get(REFERENCE, []))
    if own is cells.get(REFERENCE) or not differences:
        return [_spread(own), "", "", ""]
    mean = _points(differences)
    if len(differences) < 3 or len(set(differences)) == 1:
        return [_spread(own), mean, "", ""]
    t = stats.ttest_1samp(differences, 0).pvalue
    above = stats.ttest_1samp(differences, -MARGIN, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, MARGIN, alternative="less").pvalue
    return [_spread(own), mean, f"{t:.2f}", f"{max(above, below):.2f}"]


def _differences(own: Iterable[Line], reference: Iterable[Line]) -> list[float]:
    """Return own minus reference, seed by seed."""
    by_seed = {line["seed"]: line["value"] for line in reference}
    return [line["value"] - by_seed[line["seed"]] for line in own if line["seed"] in by_seed]


def _loss_ratio(own: list[Line], losses: dict[Cell, list[Line]]) -> str:
    by_seed = {line["seed"]: line["value"] for line in losses.get(REFERENCE, [])}
    ratios = [line["value"] / by_seed[line["seed"]] for line in own if line["seed"] in by_seed]
    return f"{100 * statistics.mean(ratios):.1f} %" if ratios else ""


def _equal_flops(own: list[Line], losses: dict[Cell, list[Line]]) -> str:
    """Return BERT-FL's mean score when its clients had spent what these did, between rounds by a straight line."""
    by_seed = {line["seed"]: line for line in losses.get(REFERENCE, [])}
    found = []
    for line in own:
        if line["seed"] in by_seed:
            full = by_seed[line["seed"]]
            points = [(0, full["initial"]), *((point[1], point[-1]) for point in full["curve"])]
            found.append(_between(points, line["train_flops"]))
    return _score(own[0]["metric"], statistics.mean(found)) if found else ""


def _between(points: list[tuple[float, float]], at: float) -> float:
    for (x, y), (next_x, next_y) in pairwise(points):
        if at <= next_x:
            return y + (next_y - y) * (at - x) / (next_x - x)
    return points[-1][1]


# Costs --------------------------------------------------------------------------------------------------------

COSTS = "FLOPs, of stock full | of BERT-FL | uplink | downlink | client seconds"


def _costs(own: list[Line], cells: dict[Cell, list[Line]]) -> list[str]:
    if not own or REFERENCE not in cells:
        return [""] * 5
    return _percents(_shares(own, cells[REFERENCE]), own)


def _percents(shares: list[float], own: list[Line]) -> list[str]:
    flops, of_reference, up, down, seconds = map(_percent, shares)
    alone = own[0]["clients"] == 1  # centralised: nothing has to travel
    return [flops, of_reference, *("-" if alone else share for share in (up, down)), seconds]


def _shares(own: list[Line], reference: list[Line]) -> list[float]:
    """Return costs as shares of BERT-FL's: FLOPs of the stock step (by formula) and of its own run, bytes, seconds."""

    def mean(lines: list[Line], name: str) -> float:
        return statistics.mean(line[name] for line in lines)

    pairs = [("train_flops", "stock_flops"), *((name, name) for name in ("train_flops", *_MEASURED))]
    return [mean(own, name) / mean(reference, other) for name, other in pairs]


_MEASURED = ("uplink_bytes", "downlink_bytes", "client_seconds")


# Words --------------------------------------------------------------------------------------------------------


def _cells(lines: Iterable[Line]) -> dict[Cell, list[Line]]:
    cells: dict[Cell, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        cells.setdefault(_cell(line), []).append(line)
    return cells


def _cell(line: Line) -> Cell:
    return line["method"], line["variant"]


def _name(cell: Cell) -> str:
    return ", ".join(filter(None, cell))


def _title(lines: Iterable[Line], dataset: str) -> str:
    metric = next(line["metric"] for line in lines if line["dataset"] == dataset)
    return f"{dataset}, {METRICS[metric]}"


def _score(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f} %"


def _points(differences: list[float]) -> str:
    """Return the mean difference in points; no minus before a zero."""
    return f"{round(100 * statistics.mean(differences), 2) or 0.0:+.2f}" if differences else ""


def _spread(lines: list[Line]) -> str:
    """Return mean, standard deviation and number of seeds."""
    if not lines:
        return ""
    values, metric = [line["value"] for line in lines], lines[0]["metric"]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    spread = f"{deviation:.4f}" if metric == "loss" else f"{100 * deviation:.2f}"
    return f"{_score(metric, statistics.mean(values))} ± {spread} ({len(values)})".replace(" ± nan", "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.1 else f"{100 * share:.2f} %"


def _tried(line: Line) -> str:
    return ", ".join(
        f"{value:g}" if name == "learning-rate" else f"rank {value}" for name, value in line["tried"].items()
    )


def _best(lines: list[Line]) -> Line:
    return (min if lines[0]["metric"] == "loss" else max)(lines, key=lambda line: line["value"])
