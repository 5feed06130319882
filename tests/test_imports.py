"""The map of imports: what may import what, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fedbt_app.config import APP_DIR

PACKAGE = APP_DIR / "fedbt_app"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# Lowest first: a room imports from the layers below its own and, inside one layer, from rooms to the left of it where
# the layer is a list. A room is a package or a module right below fedbt_app.
LAYERS: list[list[str] | set[str]] = [
    ["errors", "choices", "files", "parts", "tensors"],  # the ground floor
    {
        "codec",
        "encoders",
        "aggregation",
        "privacy",
    },  # what is done to tensors; what a family of models is
    {"tasks"},  # what is trained
    ["plan", "config"],  # what a run does
    {"model", "data"},  # what a client has
    {"costs"},  # what it costs
    {"training"},  # what a client does
    {"wire", "progress", "report"},  # what is said, shown and left
    {"client", "server"},  # the two sides
    {"cli"},  # the command, and the two apps
]
ROOMS = [room for layer in LAYERS for room in layer]

# Where a library may be imported: a room, or one module of it.
ALLOWED = {
    "flwr": {"wire", "server"},
    "transformers": {
        "encoders",
        "model",
        "data",
        "tasks",  # for types: a new task touches no list here
    },
    "peft": {"model"},
    "datasets": {"data"},
    "openpyxl": {"data.readers.excel"},
    "huggingface_hub": {"model.checkpoint"},
    "matplotlib": {"report.plots"},
    "rich": {"report.comparison", "cli", "progress.live"},
    "psutil": {"cli.superlink"},
    "seqeval": {"tasks"},
    "zstandard": {"codec.codec"},
    "subprocess": {"cli.launch", "cli.superlink"},
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


def module_of(path: Path) -> str:
    """Return a file's dotted name below fedbt_app; a package's own for its __init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[0]


def inner(path: Path) -> set[str]:
    """Return the rooms of the package that a file imports from, other than its own."""
    names = (
        name.removeprefix("fedbt_app.") for name in imports(path) if name.startswith("fedbt_app.")
    )
    return {room_of(name) for name in names} - {room_of(module_of(path))}


def reachable(room: str) -> set[str]:
    """Return the rooms that `room` may import from."""
    below: set[str] = set()
    for layer in LAYERS:
        if room in layer:
            return below | (set(layer[: layer.index(room)]) if isinstance(layer, list) else set())
        below |= set(layer)
    raise AssertionError(room)


def test_every_room_has_one_layer() -> None:
    assert sorted(ROOMS) == sorted({room_of(module_of(path)) for path in FILES})
    assert len(LAYERS) == 10


def test_imports_point_downwards() -> None:
    upward = {
        module_of(path): sorted(inner(path) - reachable(room_of(module_of(path)))) for path in FILES
    }
    assert {module: rooms for module, rooms in upward.items() if rooms} == {}


def test_no_circle_among_the_modules_of_a_room() -> None:
    """A circle shows only in some orders of import: the graph must have none."""
    modules = {module_of(path): path for path in FILES}
    edges = {
        module: {
            known
            for name in imports(path)
            if name.startswith("fedbt_app.")
            for known in (
                name.removeprefix("fedbt_app."),
                name.removeprefix("fedbt_app.").rpartition(".")[0],
            )
            if known in modules and known != module
        }
        for module, path in modules.items()
    }
    seen: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in seen:
            for other in sorted(edges[module]):
                walk(other, (*path, module))
            seen.add(module)

    for module in modules:
        walk(module, ())


def test_libraries_are_imported_only_where_they_belong() -> None:
    for path in FILES:
        module = module_of(path)
        for library in {name.split(".")[0] for name in imports(path)} & ALLOWED.keys():
            assert {module, room_of(module)} & ALLOWED[library], f"{module} imports {library}"


def test_neither_package_nor_apps_import_an_app() -> None:
    apps = {"server_app", "client_app"}
    for path in [*FILES, *(APP_DIR / f"{app}.py" for app in apps)]:
        assert {name.split(".")[0] for name in imports(path)} & apps == set(), path.name


def test_there_is_no_module_for_odds_and_ends() -> None:
    names = {part for path in FILES for part in module_of(path).split(".")}
    assert {"utils", "util", "helpers", "common", "misc"} & names == set()


def test_command_line_starts_without_the_heavy_libraries() -> None:
    for module in (
        "fedbt_app.config",
        "fedbt_app.plan",
        "fedbt_app.cli.main",
        "fedbt_app.cli.launch",
    ):
        heavy = "{'torch', 'transformers', 'flwr', 'datasets', 'peft'}"
        script = f"import sys, {module}; print(*{heavy} & set(sys.modules))"
        answer = subprocess.run(
            [sys.executable, "-c", script], cwd=APP_DIR, capture_output=True, text=True, check=True
        )
        assert answer.stdout.split() == [], module
