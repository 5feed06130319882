"""Write docs/config.md from RunConfig and pyproject.toml; `--check` only says whether it is up to date."""

import sys
from dataclasses import fields

from benchmarks.results import ROOT
from fedbt_app.config import NODE_KEYS, RunConfig, defaults

TARGET = ROOT / "docs" / "config.md"
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
        meaning = spec.metadata["doc"]
        choices = spec.metadata["choices"]
        if choices:
            meaning += f" One of {', '.join(map(_code, choices))}."
        default = str(values[name])
        if isinstance(values[name], bool):
            default = default.lower()  # as TOML has it
        rows.append(f"| {_code(name)} | {_code(default)} | {meaning} |\n")
    return HEAD + "".join(rows) + TAIL


def _code(text: str) -> str:
    return text and f"`{text}`"


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text():
            sys.exit("docs/config.md is out of date: run `make docs`")
    else:
        TARGET.write_text(text(), encoding="utf-8")
