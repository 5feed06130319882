"""Scores and costs of the paper's cells as text, set against full-model averaging by seed."""

import math
import statistics
from collections.abc import Callable, Iterable
from itertools import pairwise

from scipy import stats

from benchmarks.results import Line

Cell = tuple[str, str]  # method, variant
Cost = Callable[[float, float, float], float]  # of FLOPs, bytes up and bytes down

REFERENCE: Cell = ("BERT-FL", "")
BASE: Cell = ("base", "")  # not pre-trained further
MARGIN = 0.01  # of the equivalence test: one point
METRICS = {"accuracy": "accuracy", "f1": "entity F1", "loss": "MLM loss"}


# Cells --------------------------------------------------------------------------------------------


def cells_of(lines: Iterable[Line]) -> dict[Cell, list[Line]]:
    """Return the lines by cell, by seed within each."""
    cells: dict[Cell, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        cells.setdefault(cell_of(line), []).append(line)
    return cells


def cell_of(line: Line) -> Cell:
    """Return what the line is one seed of."""
    return line["method"], line["variant"]


def name_of(cell: Cell) -> str:
    """Name the cell in tables and plots."""
    return ", ".join(filter(None, cell))


def title_of(lines: Iterable[Line], dataset: str) -> str:
    """Name a data set and its metric."""
    metric = next(line["metric"] for line in lines if line["dataset"] == dataset)
    return f"{dataset}, {METRICS[metric]}"


def score_text(metric: str, value: float) -> str:
    """Return a loss as it is, a share in per cent."""
    if metric == "loss":
        return f"{value:.4f}"
    return f"{100 * value:.2f} %"


def points_text(differences: list[float]) -> str:
    """Return the mean difference in points and, of several, each seed's."""
    if not differences:
        return ""
    mean = _signed(statistics.mean(differences), 2)
    seeds = [_signed(difference, 1) for difference in differences]
    return _with_seeds(mean, seeds)


def _signed(difference: float, digits: int) -> str:
    points = round(100 * difference, digits) or 0.0  # no minus before a zero
    return f"{points:+.{digits}f}"


def _with_seeds(mean: str, seeds: list[str]) -> str:
    if len(set(seeds)) == 1:
        return mean
    return f"{mean} ({', '.join(seeds)})"


def spread_text(lines: list[Line]) -> str:
    """Return mean, standard deviation and number of seeds."""
    if not lines:
        return ""
    metric = lines[0]["metric"]
    values = [line["value"] for line in lines]
    text = score_text(metric, statistics.mean(values))
    if len(values) > 1:
        deviation = score_text(metric, statistics.stdev(values)).removesuffix(" %")
        text += f" ± {deviation}"
    return f"{text} ({len(values)})"


def _known_percent(share: float) -> str:
    if math.isnan(share):
        return ""
    return _percent(share)


def _percent(share: float) -> str:
    if share >= 0.1:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.2f} %"


# Statistics ---------------------------------------------------------------------------------------


def tests_against_reference(own: list[Line], cells: dict[Cell, list[Line]]) -> list[str]:
    """Return score, paired difference, p of a paired t-test, p of two one-sided tests at MARGIN."""
    differences = paired_differences(own, cells.get(REFERENCE, []))
    if own is cells.get(REFERENCE) or not differences:
        return [spread_text(own), "", "", ""]
    mean = points_text(differences)
    if len(differences) < 3 or len(set(differences)) == 1:
        return [spread_text(own), mean, "", ""]
    differs = stats.ttest_1samp(differences, 0)
    above = stats.ttest_1samp(differences, -MARGIN, alternative="greater")
    below = stats.ttest_1samp(differences, MARGIN, alternative="less")
    equivalent = max(above.pvalue, below.pvalue)
    return [
        spread_text(own),
        mean,
        f"{differs.pvalue:.2f}",
        f"{equivalent:.2f}",
    ]


def paired_differences(own: Iterable[Line], reference: Iterable[Line]) -> list[float]:
    """Return own minus reference, seed by seed."""
    return [line["value"] - full["value"] for line, full in _pairs(own, reference)]


def _pairs(own: Iterable[Line], reference: Iterable[Line]) -> list[tuple[Line, Line]]:
    """Return each own line with that of the same seed, where there is one."""
    by_seed = {line["seed"]: line for line in reference}
    pairs = []
    for line in own:
        seed = line["seed"]
        if seed in by_seed:
            pairs.append((line, by_seed[seed]))
    return pairs


def loss_ratio_text(own: list[Line], losses: dict[Cell, list[Line]]) -> str:
    """Return the loss as a share of BERT-FL's: the mean and, of several, each seed's."""
    pairs = _pairs(own, losses.get(REFERENCE, []))
    ratios = [line["value"] / full["value"] for line, full in pairs]
    if not ratios:
        return ""
    mean = f"{100 * statistics.mean(ratios):.1f} %"
    seeds = [f"{100 * ratio:.1f}" for ratio in ratios]
    return _with_seeds(mean, seeds)


def equal_cost_texts(own: list[Line], cells: dict[Cell, list[Line]]) -> list[str]:
    """Return BERT-FL's mean score when it had spent as many FLOPs, and sent as many bytes, as these.

    Between rounds by a straight line.
    """
    pairs = _pairs(own, cells.get(REFERENCE, []))
    if not pairs:
        return ["", ""]
    texts = []
    for cost in (tflop, megabytes):
        scores = []
        for line, full in pairs:
            spent = cost(*spent_of(line))
            scores.append(_score_at(full, cost, spent))
        mean = statistics.mean(scores)
        texts.append(score_text(own[0]["metric"], mean))
    return texts


def _score_at(line: Line, cost: Cost, spent: float) -> float:
    """Return the score when the run had spent this much, the last one if it never did."""
    points: list[tuple[float, float]] = [(0.0, line["initial"])]
    for point in line["curve"]:
        points.append((cost(*point[1:4]), point[-1]))
    for (cost_before, score_before), (cost_after, score_after) in pairwise(points):
        if spent <= cost_after:
            gain = score_after - score_before
            way = cost_after - cost_before
            return score_before + gain * (spent - cost_before) / way
    _, last_score = points[-1]
    return last_score


# Costs --------------------------------------------------------------------------------------------

COSTS = "FLOPs, of stock full | of BERT-FL | uplink | downlink | client seconds"
_SHARES = (  # a cost, and what of BERT-FL's it is a share of
    ("train_flops", "stock_flops"),
    ("train_flops", "train_flops"),
    ("uplink_bytes", "uplink_bytes"),
    ("downlink_bytes", "downlink_bytes"),
    ("client_seconds", "client_seconds"),
)
NO_SHARES = [""] * len(_SHARES)


def spent_of(line: Line) -> tuple[float, float, float]:
    """Return what the whole run spent: FLOPs, bytes up, bytes down."""
    return line["train_flops"], line["uplink_bytes"], line["downlink_bytes"]


def tflop(flops: float, up: float, down: float) -> float:
    """Return the compute in TFLOP."""
    return flops / 1e12


def megabytes(flops: float, up: float, down: float) -> float:
    """Return the bytes both ways in MB."""
    return (up + down) / 1e6


def costs_of(own: list[Line], cells: dict[Cell, list[Line]]) -> list[str]:
    """Return the columns of COSTS for a cell, empty where BERT-FL has none of its seeds."""
    shares = shares_of(own, cells.get(REFERENCE, []))
    if not shares:
        return NO_SHARES
    return shares_text(shares, own)


def shares_text(shares: list[float], own: list[Line]) -> list[str]:
    """Return the columns of COSTS."""
    flops, of_reference, up, down, seconds = map(_known_percent, shares)
    if own[0]["clients"] == 1:  # centralised: nothing has to travel
        up = "-"
        down = "-"
    return [flops, of_reference, up, down, seconds]


def shares_of(own: list[Line], reference: list[Line]) -> list[float]:
    """Return costs as shares of BERT-FL's, over the seeds that both have; nothing without any.

    FLOPs of the stock step (by formula) and of its own run, bytes, seconds. The latter are told
    from the seeds that both are known to have run on one kind of processor, and are not a number
    where there is none.
    """
    pairs = _pairs(own, reference)
    if not pairs:
        return []
    alike = []
    for line, full in pairs:
        if "cpu" in line and line["cpu"] == full.get("cpu"):
            alike.append((line, full))
    shares = []
    for name, other in _SHARES:
        chosen = pairs
        if name == "client_seconds":
            chosen = alike
        shares.append(_share(chosen, name, other))
    return shares


def _share(pairs: list[tuple[Line, Line]], name: str, other: str) -> float:
    """Return the sum of one cost over the sum of BERT-FL's other."""
    own = sum(line[name] for line, _ in pairs)
    total = sum(full[other] for _, full in pairs)
    if not total:
        return math.nan
    return float(own / total)


def mean_share(shares: Iterable[float]) -> float:
    """Return the mean of the shares that are known."""
    known = [share for share in shares if not math.isnan(share)]
    if not known:
        return math.nan
    return statistics.mean(known)
