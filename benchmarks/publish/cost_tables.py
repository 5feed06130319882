"""The tables of what a step, a round and a codec cost, from the other files in benchmarks/results/."""

import statistics
from collections.abc import Callable

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


def steps(rows: list[Row]) -> str:
    """Return one row a training step."""
    lines = []
    for row in rows:
        ours = row["method"] == "fedbt"
        bold = "**{}**" if ours else "{}"
        ratios = [row[f"ratio_{what}_{reference}"] for what in ("flops", "seconds") for reference in ("stock", "same")]
        flops_stock, flops_same, seconds_stock, seconds_same = map(_percent, ratios)
        lines.append(
            [
                bold.format(f"{row['task']}, {STEPS[row['method']]}"),
                str(row["local_depth"]),
                f"{row['train_flops'] / 1e9:.0f}",
                *(
                    bold.format(flops_stock),
                    flops_same,
                    f"{row['seconds']:.2f}",
                    bold.format(seconds_stock),
                    seconds_same,
                ),
                _percent(row["ratio_memory_stock"]),
            ]
        )
    shares = "of stock full | of same-opt. full"
    head = f"| task, method | L_k | GFLOP | {shares} | seconds | {shares} | memory of stock full |"
    return table(head, lines)


def rounds(rows: list[Row]) -> str:
    """Return one row a client's round."""
    lines = []
    for row in rows:
        spent = row["seconds"]
        full = next(one for one in rows if (one["task"], one["method"]) == (row["task"], "full"))["seconds"]
        name = f"{row['task']}, {STEPS[row['method']]}"
        name += f", L_k = {row['local_depth']}" if (row["task"], row["method"]) == ("mlm", "fedbt") else ""
        phases = [f"{spent[phase]:.1f}" for phase in ("import", "sync", "load", "train")]
        encoded = f"{spent['encode_float32']:.1f} ({spent['encode_int4']:.1f})"
        lines.append([name, *phases, encoded, f"{spent['total']:.1f}", _percent(spent["total"] / full["total"])])
    return table("| task, method | import | sync | load | train | encode float32 (int4) | total | of full |", lines)


def demo(rows: list[Row]) -> str:
    """Return what `make demo` did and cost, a column a run."""

    def each(show: Callable[[Row], str]) -> list[str]:
        return [show(row) for row in rows]

    def score(row: Row) -> str:
        before, after = row["initial"], row["final"]
        if row["task"] == "mlm":
            return f"MLM loss {before['loss']:.2f} -> {after['loss']:.2f} (the head is new)"
        accuracy, f1 = ([100 * scores[name] for scores in (before, after)] for name in ("accuracy", "macro_f1"))
        return f"accuracy {accuracy[0]:.1f} % -> **{accuracy[1]:.1f} %**, macro F1 {f1[0]:.1f} % -> {f1[1]:.1f} %"

    def share(row: Row, cost: str, show: Callable[[float], str]) -> str:
        return f"{format_ratio(row['ratio'][cost])} ({show(row['cost'][cost])} of {show(row['reference'][cost])})"

    def same(row: Row) -> str:
        return format_ratio(row["cost"]["train_flops"] / row["reference_same_flops"])

    def majority(row: Row) -> str:
        return f"accuracy {100 * row['majority']:.1f} %" if row["majority"] else "-"

    lines = [
        [
            "rounds, clients, training rows",
            *each(lambda row: f"{row['rounds']}, {row['clients']}, {row['train_examples']:,}"),
        ],
        ["score on the central test set, before -> after", *each(score)],
        ["always answering the majority class", *each(majority)],
        ["compute, of the stock full-model step", *each(lambda row: share(row, "train_flops", format_flops))],
        [".. of full-model training with the same optimisations", *each(same)],
        ["uplink, of full-model averaging in float32", *each(lambda row: share(row, "uplink_bytes", format_bytes))],
        ["downlink, likewise", *each(lambda row: share(row, "downlink_bytes", format_bytes))],
        ["peak memory of a client", *each(lambda row: f"{row['cost']['peak_memory_bytes'] / 2**30:.2f} GiB")],
    ]
    return table("| | further pre-training | fine-tuning of the result |", lines)


def codecs(rows: list[Row]) -> str:
    """Return one row a codec: bits, error, and the lowest throughput of any run."""
    lines = []
    for codec in dict.fromkeys(sorted((row["codec"] for row in rows), key=_order)):
        own = [row for row in rows if row["codec"] == codec and "bits_per_parameter" in row]
        bits = ", ".join(f"{_mean(own, scenario, 'bits_per_parameter'):.2f}" for scenario in ("classification", "mlm"))
        error = statistics.mean(row["relative_error"] for row in own)
        speeds = [min(row[f"{way}_mb_per_s"] for row in own) for way in ("encode", "decode")]
        lines.append([codec, bits, f"{error:.2g}", *(f"{speed:,.0f}" for speed in speeds)])
    head = (
        "| codec | bits a parameter, all in: fine-tuning, pre-training | relative error | encode MB/s | decode MB/s |"
    )
    return table(head, lines)


def codec_runs(rows: list[Row]) -> str:
    """Return what the codecs did to whole runs."""
    names = [codec for codec in ("float32", "int4", "int2") if any(row["codec"] == codec for row in rows)]
    lines = []
    for scenario, title in (("classification", "chemprot, accuracy"), ("mlm", "biomedical text, MLM loss")):
        scores, traffic = [], []
        for codec in names:
            own = [row for row in rows if (row["scenario"], row["codec"]) == (scenario, codec) and row.get("final")]
            own.sort(key=lambda row: row["seed"])
            finals = [row["final"] for row in own]
            show = (
                (lambda value: f"{100 * value:.2f} %")
                if scenario == "classification"
                else (lambda value: f"{value:.4f}")
            )
            scores.append(f"{show(statistics.mean(finals))} ({', '.join(map(show, finals))})")
            ways = [statistics.mean(row[f"ratio_{way}"] for row in own) for way in ("uplink", "downlink")]
            traffic.append(", ".join(f"{100 * way:.2f} %" for way in ways))
        seeds = ", ".join(str(row["seed"]) for row in own)
        lines.append([f"{title}: mean (seeds {seeds})", *scores])
        lines.append([".. bytes up, down, of full-model averaging in float32", *traffic])
    return table(f"| whole run, 10 rounds | {' | '.join(names)} |", lines)


def codec_ideas(rows: list[Row]) -> str:
    """Return one row an idea."""
    lines = []
    for idea in dict.fromkeys(row["idea"] for row in rows):
        own = [row for row in rows if row["idea"] == idea]
        pair = {name: [_mean(own, scenario, name) for scenario in ("classification", "mlm")] for name in (BITS, ERROR)}
        lines.append([idea, *(", ".join(f"{value:.{digits}f}" for value in pair[name]) for name, digits in _DIGITS)])
    head = "| idea, without error feedback | bits a parameter: fine-tuning, pre-training | relative error |"
    return table(head, lines)


BITS, ERROR = "bits_per_parameter", "relative_error"
_DIGITS = ((BITS, 2), (ERROR, 3))


def _mean(rows: list[Row], scenario: str, name: str) -> float:
    return statistics.mean(row[name] for row in rows if row["scenario"] == scenario)


def _order(codec: str) -> tuple[int, bool]:
    formats = ("float32", "bf16", "int8", "int4", "int2")
    return formats.index(codec.partition("+")[0]), "+" in codec


def _percent(share: float) -> str:
    return "100 %" if round(share, 4) == 1 else f"{100 * share:.1f} %"
