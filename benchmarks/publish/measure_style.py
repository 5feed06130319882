"""How airy the code is: a few measures of the product and the benchmarks, beside their goals.

    python -m benchmarks.publish.measure_style

A code line is one that carries code; blank lines, comments and docstrings do not count. They do
among a file's lines, which are all that it has. A name is counted where it is bound: as a variable,
a parameter or a loop's target.
"""

import ast
import statistics
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import ROOT

PROJECTS = {
    "fedbt_app and the apps": ("fedbt_app", "server_app.py", "client_app.py"),
    "benchmarks": ("benchmarks",),
}
MOST_TOKENS = 7.5  # a code line
MOST_CONDITIONALS = 10  # per 1,000 code lines, and fewer
MOST_PARAMETERS = 6
LONGEST_SHOWN = 5

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Style:
    """What was counted in some files."""

    tokens: int = 0
    comments: int = 0
    conditionals: int = 0
    all_lines: int = 0  # blank ones, comments and docstrings too
    lines: dict[str, int] = field(default_factory=dict)  # of code, by file
    names: list[str] = field(default_factory=list)
    star_splats: list[str] = field(default_factory=list)  # where they stand
    wide_functions: list[str] = field(default_factory=list)

    @property
    def code_lines(self) -> int:
        """Code lines of all files."""
        return sum(self.lines.values())

    def read(self, path: Path) -> None:
        """Count one file too."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        shown = path.name
        if path.is_relative_to(ROOT):
            shown = str(path.relative_to(ROOT))
        self.all_lines += len(text.splitlines())
        self._read_tokens(path, shown, _docstring_lines(tree))
        for node in ast.walk(tree):
            self._read_node(node, shown)

    def _read_tokens(self, path: Path, shown: str, docstring_lines: set[int]) -> None:
        code_lines: set[int] = set()
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT:
                    self.comments += 1
                if token.type in NO_CODE or token.start[0] in docstring_lines:
                    continue
                self.tokens += 1
                code_lines.update(range(token.start[0], token.end[0] + 1))
        self.lines[shown] = len(code_lines)

    def _read_node(self, node: ast.AST, shown: str) -> None:
        if isinstance(node, ast.IfExp):
            self.conditionals += 1
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.names.append(node.id)
        elif isinstance(node, ast.arg):
            self.names.append(node.arg)
        elif isinstance(node, ast.Call) and any(map(_is_star_splat, node.args)):
            self.star_splats.append(f"{shown}:{node.lineno}")
        elif isinstance(node, FUNCTIONS) and _parameter_count(node.args) > MOST_PARAMETERS:
            self.wide_functions.append(f"{shown}:{node.lineno} {node.name}")


def style_of(paths: Iterable[Path]) -> Style:
    """Return what is counted in these files."""
    style = Style()
    for path in paths:
        style.read(path)
    return style


def _docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        last = docstring.end_lineno or docstring.lineno
        found.update(range(docstring.lineno, last + 1))
    return found


def _is_star_splat(argument: ast.expr) -> bool:
    """Say whether a literal tuple or list is unpacked into the call."""
    return isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List)


def _parameter_count(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def _files(places: Iterable[str]) -> Iterator[Path]:
    for place in places:
        path = ROOT / place
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        else:
            yield path


def _show(title: str, style: Style) -> None:
    code_lines = style.code_lines
    print(
        f"{title}: {len(style.lines)} files, {style.all_lines:,} lines, {code_lines:,} of them code"
    )
    tokens = style.tokens / code_lines
    _show_measure("tokens a code line", tokens, f"{MOST_TOKENS} or fewer")
    _show_measure("comments per 100 code lines", 100 * style.comments / code_lines)
    conditionals = 1000 * style.conditionals
    goal = f"under {MOST_CONDITIONALS}"
    _show_measure("conditionals per 1,000 code lines", conditionals / code_lines, goal)
    _show_measure("conditionals per 1,000 of all lines", conditionals / style.all_lines)
    letters = [len(name) for name in style.names if name not in ("self", "cls", "_")]
    _show_measure("letters of a variable's name, mean", statistics.mean(letters))
    _show_places("calls with star-splats of literal tuples", style.star_splats)
    _show_places(f"functions of more than {MOST_PARAMETERS} parameters", style.wide_functions)
    longest = sorted(style.lines.items(), key=lambda item: item[1], reverse=True)[:LONGEST_SHOWN]
    print("  longest modules: " + ", ".join(f"{name} {count}" for name, count in longest))


def _show_measure(what: str, value: float, goal: str = "") -> None:
    text = f"  {what:43} {value:6.2f}"
    if goal:
        text += f"  (goal: {goal})"
    print(text)


def _show_places(what: str, places: list[str]) -> None:
    print(f"  {what:43} {len(places):6}")
    for place in places:
        print(f"    {place}")


def main() -> None:
    """Print the measures of each project."""
    for title, places in PROJECTS.items():
        _show(title, style_of(_files(places)))


if __name__ == "__main__":
    main()
