"""The stored results in benchmarks/results/: rows in JSON files, the paper's cells as JSON lines."""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedbt_app.files import READABLE, replace_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER = RESULTS / "paper.jsonl"

Row = dict[str, Any]  # a measurement
Line = dict[str, Any]  # a finished cell of the paper
Key = tuple[str, str, str, str, int]  # what a line is about, by the names in KEY
KEY = ("table", "dataset", "method", "variant", "seed")
LOWER_IS_BETTER = {"loss"}  # metrics


# Rows ---------------------------------------------------------------------------------------------


def load(path: Path, keys: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    """Return the stored rows by what each is about; none if there is no file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {about(row, keys): row for row in stored}


def store(path: Path, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Write the rows in place of those about the same; all others in the file stay."""
    merged = load(path, keys)
    for row in rows:
        merged[about(row, keys)] = row
    text = json.dumps(list(merged.values()), indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text, READABLE)


def about(row: Row, keys: Sequence[str]) -> tuple[Any, ...]:
    """Return what the row is about."""
    return tuple(row[name] for name in keys)


def rows_of(name: str) -> list[Row]:
    """Return the rows of benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


# Lines --------------------------------------------------------------------------------------------


def read_lines(path: Path = PAPER) -> dict[Key, Line]:
    """Return the finished cells by table, data set, method, variant and seed."""
    if not path.exists():
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {key_of(line): line for line in lines}


def add_lines(path: Path, new: Iterable[Line]) -> None:
    """Add finished cells, or put them in place of those there; others may add at the same time."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # not the file: that is another one after each replacement
        fcntl.flock(folder, fcntl.LOCK_EX)
        lines = read_lines(path) | {key_of(line): line for line in new}
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        replace_text(path, text, READABLE)
    finally:
        os.close(folder)


def key_of(line: Line) -> Key:
    """Return what the line is about."""
    table, dataset, method, variant, seed = (line[name] for name in KEY)
    return table, dataset, method, variant, seed


def best(lines: Collection[Line]) -> Line:
    """Return the line with the best score."""
    pick = max
    if all(line["metric"] in LOWER_IS_BETTER for line in lines):
        pick = min
    return pick(lines, key=lambda line: line["value"])
