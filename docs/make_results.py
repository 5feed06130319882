"""Write the tables and plots of the pages from benchmarks/results/; `--check` only says what is out of date."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cost_tables
import paper_plots
import paper_tables
from marks import filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = "docs/make_results.py"


def pages() -> dict[Path, dict[str, str]]:
    """Return the blocks of each page."""
    lines = _lines()
    step, round_, codec, ideas, demo = map(_rows, ("client_step", "client_round", "codec", "codec_ideas", "demo"))
    return {
        ROOT / "docs" / "costs.md": {
            "demo": cost_tables.demo(demo),
            "steps": cost_tables.steps(step),
            "rounds": cost_tables.rounds(round_),
        },
        ROOT / "docs" / "methods.md": {
            "codecs": cost_tables.codecs(codec),
            "codec runs": cost_tables.codec_runs(codec),
            "codec ideas": cost_tables.codec_ideas(ideas),
        },
        ROOT / "docs" / "results.md": {"main table": paper_tables.main_table(lines), **paper_tables.blocks(lines)},
    }


def _lines() -> list[dict[str, Any]]:
    text = (RESULTS / "paper.jsonl").read_text(encoding="utf-8")
    return paper_tables.ordered([json.loads(line) for line in text.splitlines()])


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def stale() -> list[Path]:
    """Return the pages that do not show what the results say."""
    return [
        page for page, blocks in pages().items() if filled(page, blocks, SCRIPT) != page.read_text(encoding="utf-8")
    ]


def main() -> None:
    """Fill the pages and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if old := stale():
            sys.exit(f"out of date, run `make results`: {', '.join(str(page.relative_to(ROOT)) for page in old)}")
        return
    for page, blocks in pages().items():
        page.write_text(filled(page, blocks, SCRIPT), encoding="utf-8")
    paper_plots.draw(_lines(), ROOT / "docs")


if __name__ == "__main__":
    main()
