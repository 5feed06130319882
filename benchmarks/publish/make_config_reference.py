"""Write docs/config.md and pyproject.toml's settings from RunConfig; `--check` only says if so."""

import json
import re
import sys
from dataclasses import fields

from benchmarks.results import ROOT
from fedbt_app.config import NODE_KEYS, RunConfig, defaults

TARGET = ROOT / "docs" / "config.md"
PROJECT = ROOT / "pyproject.toml"
TABLE = re.compile(r"^(\[tool\.flwr\.app\.config\]\n).*?(?=^$|\Z)", re.MULTILINE | re.DOTALL)
HEAD = """# Configuration

Every key of a run, with its default. Give them as `KEY=VALUE` or `--KEY VALUE` to `fedbt run`, in a TOML file
(`--config`), or to `flwr run . --run-config`. A mistyped key is refused before anything runs.

| key | default | meaning |
|---|---|---|
"""
TAIL = f"""
A node (SuperNode) may set, in its `--node-config`: `data-path`, `model-path`, `name`,
{", ".join(f"`{name}`" for name in NODE_KEYS)}. They win over the run's settings.
"""


def text() -> str:
    """Return the page."""
    values = defaults()
    rows = []
    for spec in fields(RunConfig):
        name = spec.name.replace("_", "-")
        choices = spec.metadata["choices"]
        meaning = spec.metadata["doc"]
        if choices:
            meaning += f" One of {', '.join(map(_code, choices))}."
        default = str(values[name])
        if isinstance(values[name], bool):
            default = default.lower()  # as TOML has it
        rows.append(f"| {_code(name)} | {_code(default)} | {meaning} |\n")
    return HEAD + "".join(rows) + TAIL


def _code(text: str) -> str:
    return text and f"`{text}`"


def project(current: str) -> str:
    """Return pyproject.toml with its table of settings as RunConfig has it."""
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in defaults().items())
    written, tables = TABLE.subn(lambda found: found[1] + lines, current)
    if tables != 1:
        sys.exit("pyproject.toml has no table [tool.flwr.app.config] to write to")
    return written


def main(check: bool) -> None:
    """Write what is out of date; or say so, and fail."""
    wanted = {TARGET: text(), PROJECT: project(PROJECT.read_text(encoding="utf-8"))}
    for path, content in wanted.items():
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        if check:
            sys.exit(f"{path.name} is out of date: run `make docs`")
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv)
