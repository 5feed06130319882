"""The measurements of steps and rounds as tables on the terminal."""

from collections.abc import Sequence

from benchmarks.results import Row

KEYS = ("arch", "task", "method", "local_depth", "length", "precision")  # what a row is about

STEP_HEADS = (
    "task",
    "length",
    "method",
    "blocks",
    "GFLOP",
    "of stock",
    "of same",
    "seconds",
    "min - max",
    "of stock",
    "of same",
    "peak MB",
    "of stock",
)


def print_steps(rows: list[Row]) -> None:
    """Print the table of training steps."""
    title = f"One training step: {rows[0]['arch']}, {rows[0]['precision']}"
    _print(title, STEP_HEADS, [_step_line(row) for row in rows])


def _step_line(row: Row) -> list[str]:
    return [
        row["task"],
        row["length"],
        row["method"],
        str(row["local_depth"]),
        f"{row['train_flops'] / 1e9:.2f}",
        _percent(row["ratio_flops_stock"]),
        _percent(row["ratio_flops_same"]),
        f"{row['seconds']:.3f}",
        f"{row['seconds_min']:.3f} - {row['seconds_max']:.3f}",
        _percent(row["ratio_seconds_stock"]),
        _percent(row["ratio_seconds_same"]),
        f"{row['peak_memory_bytes'] / 1e6:.0f}",
        _percent(row["ratio_memory_stock"]),
    ]


def print_rounds(rows: list[Row]) -> None:
    """Print the table of whole rounds."""
    phases = list(rows[0]["seconds"])
    lines = []
    for row in rows:
        seconds = [f"{row['seconds'][phase]:.2f}" for phase in phases]
        lines.append([row["task"], row["method"], str(row["local_depth"]), *seconds])
    heads = ["task", "method", "blocks", *(phase.replace("_", " ") for phase in phases)]
    _print(f"A client's round, seconds: {rows[0]['arch']}, {rows[0]['precision']}", heads, lines)


def _print(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
        if head in ("task", "method"):
            table.columns[-1].justify = "left"
    before = lines[0]
    for line in lines:
        if line[0] != before[0]:
            table.add_section()
        table.add_row(*line)
        before = line
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
