"""The pages name what exists: links, files, make targets, and commands that the command line takes."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.cli.main import _parser, settings_of
from fedbt_app.config import APP_DIR

PAGES = sorted([*APP_DIR.glob("*.md"), *APP_DIR.glob("docs/*.md"), *APP_DIR.glob("examples/*.md")])
SHIPPED = (
    "benchmarks",
    "conf",
    "deploy",
    "docker",
    "docs",
    "examples",
    "fedbt_app",
    "tests",
    ".ci",
    ".github",
)
YOURS = ("docker/pip/",)  # folders that the reader fills
PATH = re.compile(r"(?<![\w./~-])((?:[\w.@*-]+/)*[\w.@*-]*)")


def code(page: str) -> list[str]:
    """Return a page's pieces of code: fenced blocks, and what stands in backquotes."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [*fenced.findall(page), *re.findall(r"`([^`]+)`", fenced.sub("", page))]


def named_files(page: str) -> Iterator[str]:
    """Yield what looks like a file or folder of this repository, or a script by its bare name."""
    for piece in code(page):
        for name in PATH.findall(piece):
            inside = name.split("/")[0] in SHIPPED and "/" in name and not name.startswith(YOURS)
            bare = "/" not in name and re.fullmatch(r"\w+\.(py|sh)", name)
            if inside or bare:
                yield name.rstrip(".")


def exists(name: str) -> bool:
    """Say whether a path, or a pattern of paths, or a script of that bare name is there."""
    if "/" in name:
        return any(APP_DIR.glob(name.rstrip("/")))
    return (APP_DIR / name).is_file() or any(
        any((APP_DIR / folder).rglob(name)) for folder in SHIPPED
    )


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as a link gives them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: str) -> Iterator[list[str]]:
    """Yield the words of each `fedbt ..` line of the fenced blocks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if found := re.match(r"(?:\S*/)?fedbt (.*)", line):
                yield shlex.split(found[1], comments=True)


def targets() -> set[str]:
    makefile = (APP_DIR / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def subcommands() -> set[str]:
    (action,) = [action for action in _parser()._actions if action.choices]
    return set(action.choices or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    missing = {name for name in named_files(page.read_text(encoding="utf-8")) if not exists(name)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_targets_and_subcommands_exist(page: Path) -> None:
    pieces = code(page.read_text(encoding="utf-8"))
    made = {
        name
        for piece in pieces
        for name in re.findall(r"(?:^|&& )make ([a-z-]+)", piece, re.MULTILINE)
    }
    run = {name for piece in pieces for name in re.findall(r"(?:^|\s|bin/)fedbt ([a-z]+)", piece)}
    assert made - targets() == set()
    assert run - subcommands() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken_by_the_command_line(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(APP_DIR)
    for words in command_lines(page.read_text(encoding="utf-8")):
        options = _parser().parse_args(words)
        if hasattr(options, "settings"):
            settings_of(options)


def test_what_does_not_exist_is_noticed() -> None:
    page = "See `docs/nowhere.md`, `nothing.py`.\n```\nmake nothing\nfedbt run method=fedbt  # go\n```\n"
    assert [name for name in named_files(page) if not exists(name)] == [
        "docs/nowhere.md",
        "nothing.py",
    ]
    assert list(command_lines(page)) == [["run", "method=fedbt"]]
    assert {"test", "help"} <= targets()
    assert "nothing" not in targets()
    assert subcommands() >= {"run", "plan", "report", "doctor"}


def test_make_lists_every_target_with_a_line() -> None:
    listed = subprocess.run(
        ["make"], cwd=APP_DIR, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^make ([a-z-]+) +\S", listed, re.MULTILINE)) == targets()


def test_the_hooks_run_what_the_gate_runs() -> None:
    # Read by lines: no YAML reader is among the declared packages.
    hooks = re.findall(
        r"entry: (.+)", (APP_DIR / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    )
    makefile = (APP_DIR / "Makefile").read_text(encoding="utf-8")
    lint = re.search(r"^lint:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    assert lint is not None
    commands = [
        line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .")
        for line in lint[1].splitlines()
    ]
    assert hooks == commands


def test_the_version_and_the_licence_are_the_same_everywhere() -> None:
    project: dict[str, Any] = tomllib.loads(
        (APP_DIR / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    citation = (APP_DIR / "CITATION.cff").read_text(encoding="utf-8")
    assert f"license: {project['license']}" in citation
    assert f"version: {project['version']}" in citation
    assert f"## {project['version']}" in (APP_DIR / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License\n" in (APP_DIR / "LICENSE").read_text(encoding="utf-8")
