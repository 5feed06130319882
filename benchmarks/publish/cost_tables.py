"""The tables of what a step, a round and a codec cost, from the JSON files of the results."""

import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.publish.marks import table
from benchmarks.results import Row
from fedbt_app.report.tables import format_bytes, format_flops, format_ratio

STEPS = {
    "full-stock": "full, stock code",
    "full-optimised": "full, our step",
    "fedbt-plain": "fedbt by stock code",
    "fedbt": "fedbt",
    "lora": "lora (peft)",
    "full": "full, our step",
}
SCENARIOS = {"classification": "chemprot, accuracy", "mlm": "biomedical text, MLM loss"}
BITS = "bits_per_parameter"
ERROR = "relative_error"


def steps(rows: list[Row]) -> str:
    """Return one row a training step."""
    shares = "of stock full | of same-opt. full"
    head = f"| task, method | L_k | GFLOP | {shares} | seconds | {shares} | memory of stock full |"
    return table(head, [_step_line(row) for row in rows])


def _step_line(row: Row) -> list[str]:
    name = f"{row['task']}, {STEPS[row['method']]}"
    flops_of_stock = _percent(row["ratio_flops_stock"])
    seconds_of_stock = _percent(row["ratio_seconds_stock"])
    if row["method"] == "fedbt":
        name = _bold(name)
        flops_of_stock = _bold(flops_of_stock)
        seconds_of_stock = _bold(seconds_of_stock)
    return [
        name,
        str(row["local_depth"]),
        f"{row['train_flops'] / 1e9:.0f}",
        flops_of_stock,
        _percent(row["ratio_flops_same"]),
        f"{row['seconds']:.2f}",
        seconds_of_stock,
        _percent(row["ratio_seconds_same"]),
        _percent(row["ratio_memory_stock"]),
    ]


def rounds(rows: list[Row]) -> str:
    """Return one row a client's round."""
    full_seconds = {row["task"]: row["seconds"]["total"] for row in rows if row["method"] == "full"}
    lines = []
    for row in rows:
        task = row["task"]
        method = row["method"]
        seconds = row["seconds"]
        name = f"{task}, {STEPS[method]}"
        if (task, method) == ("mlm", "fedbt"):
            name += f", L_k = {row['local_depth']}"
        phases = [f"{seconds[phase]:.1f}" for phase in ("import", "sync", "load", "train")]
        encoded = f"{seconds['encode_float32']:.1f} ({seconds['encode_int4']:.1f})"
        total = seconds["total"]
        of_full = _percent(total / full_seconds[task])
        lines.append([name, *phases, encoded, f"{total:.1f}", of_full])
    phase_heads = "import | sync | load | train | encode float32 (int4)"
    return table(f"| task, method | {phase_heads} | total | of full |", lines)


# The demo -----------------------------------------------------------------------------------------


def demo(rows: list[Row]) -> str:
    """Return what `make demo` did and cost, a column a run."""
    compute = partial(_demo_share, cost="train_flops", show=format_flops)
    uplink = partial(_demo_share, cost="uplink_bytes", show=format_bytes)
    downlink = partial(_demo_share, cost="downlink_bytes", show=format_bytes)
    shown: dict[str, Callable[[Row], str]] = {
        "rounds, clients, training rows": _demo_size,
        "score on the central test set, before -> after": _demo_score,
        "always answering the majority class": _demo_majority,
        "compute, of the stock full-model step": compute,
        ".. of full-model training with the same optimisations": _demo_share_of_same,
        "uplink, of full-model averaging in float32": uplink,
        "downlink, likewise": downlink,
        "peak memory of a client": _demo_memory,
    }
    lines = [[name, *map(show, rows)] for name, show in shown.items()]
    return table("| | further pre-training | fine-tuning of the result |", lines)


def _demo_size(row: Row) -> str:
    return f"{row['rounds']}, {row['clients']}, {row['train_examples']:,}"


def _demo_score(row: Row) -> str:
    before = row["initial"]
    after = row["final"]
    if row["task"] == "mlm":
        return f"MLM loss {before['loss']:.2f} -> {after['loss']:.2f} (the head is new)"
    accuracy = f"accuracy {100 * before['accuracy']:.1f} % -> **{100 * after['accuracy']:.1f} %**"
    macro_f1 = f"macro F1 {100 * before['macro_f1']:.1f} % -> {100 * after['macro_f1']:.1f} %"
    return f"{accuracy}, {macro_f1}"


def _demo_majority(row: Row) -> str:
    if not row["majority"]:
        return "-"
    return f"accuracy {100 * row['majority']:.1f} %"


def _demo_share(row: Row, cost: str, show: Callable[[float], str]) -> str:
    own = show(row["cost"][cost])
    reference = show(row["reference"][cost])
    return f"{format_ratio(row['ratio'][cost])} ({own} of {reference})"


def _demo_share_of_same(row: Row) -> str:
    return format_ratio(row["cost"]["train_flops"] / row["reference_same_flops"])


def _demo_memory(row: Row) -> str:
    return f"{row['cost']['peak_memory_bytes'] / 2**30:.2f} GiB"


# Codecs -------------------------------------------------------------------------------------------


def codecs(rows: list[Row]) -> str:
    """Return one row a codec: bits, error, and the lowest throughput of any run."""
    lines = []
    for codec in sorted({row["codec"] for row in rows}, key=_order):
        own = [row for row in rows if row["codec"] == codec and BITS in row]
        bits = ", ".join(f"{_mean(own, scenario, BITS):.2f}" for scenario in SCENARIOS)
        error = statistics.mean(row[ERROR] for row in own)
        encoded = min(row["encode_mb_per_s"] for row in own)
        decoded = min(row["decode_mb_per_s"] for row in own)
        lines.append([codec, bits, f"{error:.2g}", f"{encoded:,.0f}", f"{decoded:,.0f}"])
    bits_head = "bits a parameter, all in: fine-tuning, pre-training"
    return table(f"| codec | {bits_head} | relative error | encode MB/s | decode MB/s |", lines)


def codec_runs(rows: list[Row]) -> str:
    """Return what the codecs did to whole runs."""
    measured = {row["codec"] for row in rows}
    codecs = [codec for codec in ("float32", "int4", "int2") if codec in measured]
    lines = []
    for scenario, title in SCENARIOS.items():
        cells = [_finished(rows, scenario, codec) for codec in codecs]
        seeds = ", ".join(str(row["seed"]) for row in cells[-1])
        traffic_title = ".. bytes up, down, of full-model averaging in float32"
        lines.append([f"{title}: mean (seeds {seeds})", *map(_scores, cells)])
        lines.append([traffic_title, *map(_traffic, cells)])
    return table(f"| whole run, 10 rounds | {' | '.join(codecs)} |", lines)


def _finished(rows: list[Row], scenario: str, codec: str) -> list[Row]:
    """Return the rows of whole runs, by seed."""
    own = []
    for row in rows:
        if row["scenario"] == scenario and row["codec"] == codec and row.get("final"):
            own.append(row)
    return sorted(own, key=lambda row: row["seed"])


def _scores(rows: list[Row]) -> str:
    """Return the mean score of some runs, and each one's."""
    finals = [row["final"] for row in rows]
    form = "{:.4f}"
    if rows[0]["scenario"] == "classification":
        finals = [100 * final for final in finals]
        form = "{:.2f} %"
    each = ", ".join(form.format(final) for final in finals)
    return f"{form.format(statistics.mean(finals))} ({each})"


def _traffic(rows: list[Row]) -> str:
    """Return the mean bytes of some runs, up and down, as shares of full-model averaging's."""
    up = statistics.mean(row["ratio_uplink"] for row in rows)
    down = statistics.mean(row["ratio_downlink"] for row in rows)
    return f"{100 * up:.2f} %, {100 * down:.2f} %"


def codec_ideas(rows: list[Row]) -> str:
    """Return one row an idea."""
    lines = []
    for idea in dict.fromkeys(row["idea"] for row in rows):
        own = [row for row in rows if row["idea"] == idea]
        bits = ", ".join(f"{_mean(own, scenario, BITS):.2f}" for scenario in SCENARIOS)
        error = ", ".join(f"{_mean(own, scenario, ERROR):.3f}" for scenario in SCENARIOS)
        lines.append([idea, bits, error])
    head = "| idea, without error feedback | bits a parameter: fine-tuning, pre-training | relative error |"
    return table(head, lines)


def _mean(rows: list[Row], scenario: str, name: str) -> float:
    return float(statistics.mean(row[name] for row in rows if row["scenario"] == scenario))


def _order(codec: str) -> tuple[int, bool]:
    number_format, separator, _ = codec.partition("+")
    formats = ("float32", "bf16", "int8", "int4", "int2")
    return formats.index(number_format), separator == "+"


def _percent(share: float) -> str:
    if round(share, 4) == 1:
        return "100 %"
    return f"{100 * share:.1f} %"


def _bold(text: str) -> str:
    return f"**{text}**"
