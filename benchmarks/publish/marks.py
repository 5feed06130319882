"""Blocks of a page that are made from results.

They stand between `<!-- NAME, by SCRIPT -->` and `<!-- /NAME -->`.
"""

import re
from collections.abc import Mapping
from pathlib import Path


def filled(page: Path, blocks: Mapping[str, str], script: str) -> str:
    """Return the page's text with each of the blocks in its place; it must have exactly one."""
    text = page.read_text(encoding="utf-8")
    for name, made in blocks.items():
        marks = rf"<!-- {re.escape(name)}, .*?<!-- /{re.escape(name)} -->"
        before, *after = re.split(marks, text, flags=re.DOTALL)
        if len(after) != 1:
            raise ValueError(f"{page} has {len(after)} places for {name}, not 1")
        block = f"<!-- {name}, by {script} -->\n{made}\n<!-- /{name} -->"
        text = before + block + after[0]
    return text


def parted(text: str) -> tuple[str, str]:
    """Return what stands in blocks, and the rest."""
    blocks = re.compile(r"<!-- ([^/]*?), by .*?<!-- /\1 -->", re.DOTALL)
    inside = [match[0] for match in blocks.finditer(text)]
    outside = blocks.sub("", text)
    return "\n".join(inside), outside


def names(page: Path) -> set[str]:
    """Return the blocks that a page has places for."""
    return set(re.findall(r"<!-- /(.*?) -->", page.read_text(encoding="utf-8")))


def table(head: str, rows: list[list[str]]) -> str:
    """Return a Markdown table; `head` is its first line."""
    columns = head.count("|") - 1
    rule = "|" + "---|" * columns
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, rule, *lines])
