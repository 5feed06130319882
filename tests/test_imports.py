"""The map of imports: what may import what, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbt_app.config import APP_DIR

PACKAGE = APP_DIR / "fedbt_app"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Lowest first; a module imports from lines above its own only.
LAYERS = [
    {"errors", "packing", "events"},
    {"config", "blocks", "codec", "costs", "embedded", "pool", "tasks", "device", "live"},
    {"checkpoint", "partition", "plan", "plots", "records", "sources", "launch", "formats", "scalars"},
    {"tokenised", "predict", "state", "local_model", "page"},
    {"data", "forward", "messages", "preview", "export", "report"},
    {"prefix", "exchange", "comparison"},
    {"train", "roster"},
    {"snapshot", "dialogue", "client"},
    {"strategy"},
    {"doctor"},
    {"cli"},
]
ALLOWED = {
    "flwr": {"messages", "records", "strategy", "roster", "exchange", "dialogue"},
    "transformers": {"local_model", "checkpoint", "export", "tasks", "data", "sources", "tokenised"},
    "peft": {"local_model"},
    "datasets": {"data", "sources", "tokenised"},
    "huggingface_hub": {"checkpoint"},
    "matplotlib": {"plots"},
    "rich": {"comparison", "preview", "cli", "live"},
    "psutil": {"launch"},
    "seqeval": {"tasks"},
    "zstandard": {"codec"},
    "subprocess": {"launch"},
    "pickle": set(),
}


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of all that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(module: str) -> set[str]:
    """Return the modules of the package that `module` imports."""
    names = (name.split(".") for name in imports(PACKAGE / f"{module}.py") if name.startswith("fedbt_app."))
    return {parts[1] for parts in names}


def test_package_has_modules() -> None:
    assert len(MODULES) > 20


def test_every_module_has_one_layer() -> None:
    assert sorted(module for layer in LAYERS for module in layer) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    depth = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    assert sorted(name for name in inner(module) if depth[name] >= depth[module]) == []


@pytest.mark.parametrize("library", ALLOWED)
def test_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {
        module for module in MODULES for name in imports(PACKAGE / f"{module}.py") if name.split(".")[0] == library
    }
    assert users - ALLOWED[library] == set()


@pytest.mark.parametrize("module", MODULES)
def test_package_imports_no_app(module: str) -> None:
    found = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")}
    assert found & {"server_app", "client_app"} == set()


def test_apps_do_not_import_each_other() -> None:
    for app, other in (("server_app", "client_app"), ("client_app", "server_app")):
        assert other not in {name.split(".")[0] for name in imports(APP_DIR / f"{app}.py")}


def test_there_is_no_module_for_odds_and_ends() -> None:
    assert {"utils", "util", "helpers", "common", "misc"} & set(MODULES) == set()


@pytest.mark.parametrize("module", ["fedbt_app.config", "fedbt_app.cli", "fedbt_app.launch", "fedbt_app.predict"])
def test_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    script = f"import sys, {module}; print(*{{'torch', 'transformers', 'flwr', 'datasets', 'peft'}} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], cwd=APP_DIR, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_imported_first(module: str) -> None:
    """A cycle shows only in some orders of import: the graph must have none."""
    seen: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in seen:
            for other in sorted(inner(name)):
                walk(other, (*path, name))
            seen.add(name)

    walk(module, ())
