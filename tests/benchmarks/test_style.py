"""The measures of style count what they say."""

from pathlib import Path

from benchmarks.publish.measure_style import style_of

SOURCE = '''"""A docstring
of two lines."""

# why
def wide(first, second, third, fourth, fifth, sixth, seventh):
    """A docstring."""
    return first if second else third


class Holder:
    def six(self, first, second, third, fourth, fifth, sixth):
        text = """two
lines"""  # what
        return wide(*(first, second), *[third, fourth], *fifth, text)
'''


def test_the_measures_count_code_and_not_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    style = style_of([path])
    assert style.lines == {"module.py": 7}
    assert (style.comments, style.conditionals) == (2, 1)
    assert style.wide_functions == ["module.py:5 wide"]
    assert style.star_splats == ["module.py:14"]
    assert style.names.count("text") == 1
    tokens_of_wide = 18 + 6
    tokens_of_holder = 3 + 18 + 3 + 22
    assert style.tokens == tokens_of_wide + tokens_of_holder
