"""Write the pages' tables and plots from benchmarks/results/; `--check` only says what is stale."""

import argparse
import sys
from pathlib import Path

from benchmarks.publish import cost_tables, paper_plots, paper_tables
from benchmarks.publish.marks import filled
from benchmarks.results import ROOT, Line, read_lines, rows_of

SCRIPT = "benchmarks/publish/make_results.py"


def pages() -> dict[Path, dict[str, str]]:
    """Return the blocks of each page."""
    lines = _lines()
    return {
        ROOT / "docs" / "costs.md": {
            "demo": cost_tables.demo(rows_of("demo")),
            "steps": cost_tables.steps(rows_of("client_step")),
            "rounds": cost_tables.rounds(rows_of("client_round")),
        },
        ROOT / "docs" / "methods.md": {
            "codecs": cost_tables.codecs(rows_of("codec")),
            "codec runs": cost_tables.codec_runs(rows_of("codec")),
            "codec ideas": cost_tables.codec_ideas(rows_of("codec_ideas")),
        },
        ROOT / "docs" / "results.md": {
            "main table": paper_tables.main_table(lines),
            **paper_tables.blocks(lines),
        },
    }


def _lines() -> list[Line]:
    return paper_tables.ordered(list(read_lines().values()))


def stale() -> list[Path]:
    """Return the pages that do not show what the results say."""
    old = []
    for page, blocks in pages().items():
        if filled(page, blocks, SCRIPT) != page.read_text(encoding="utf-8"):
            old.append(page)
    return old


def main() -> None:
    """Fill the pages and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        old = [str(page.relative_to(ROOT)) for page in stale()]
        if old:
            sys.exit(f"out of date, run `make results`: {', '.join(old)}")
        return
    for page, blocks in pages().items():
        page.write_text(filled(page, blocks, SCRIPT), encoding="utf-8")
    paper_plots.draw(_lines(), ROOT / "docs")


if __name__ == "__main__":
    main()
