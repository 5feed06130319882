import datetime
import math
from decimal import Decimal
from typing import Any

import pytest

from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.classification import Classification
from fedbt_app.tasks.labels import clean, fractions_in, lists_in, names_of
from fedbt_app.tasks.notes import Notes

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_whole_numbers_are_one_label_however_they_are_written() -> None:
    cells = [1, 1.0, "1", "1.0", " 1.00 ", Decimal("1.0")]
    assert set(names_of(cells)) == {"1"}
    assert names_of([-0.0, "0", "-1.0", "10.0"]) == ["0", "0", "-1", "10"]
    assert names_of(["1.0", "unknown", None]) == ["1", "unknown", ""]


def test_a_column_of_codes_with_fractions_keeps_its_ends() -> None:
    codes = ["250.0", "401.9", "401.0", "401"]
    assert names_of(codes) == codes
    assert names_of(["1.50", "2.0"]) == ["1.50", "2.0"]
    assert names_of(["I10", "E11.9", "007"]) == ["I10", "E11.9", "007"]


def renamed(cells: list[Any], label_map: str) -> tuple[list[str], int]:
    """Return what a label-map makes of a column, and how many labels the site is told of."""
    notes = Notes()
    config = RunConfig(label_map=label_map)
    made = Classification().prepared(config, {"text": [], "label": cells}, notes)
    told = [int(line.split()[1]) for line in notes if line.startswith("label-map: ")]
    return made["label"], sum(told)


def test_names_that_are_given_stay_as_they_are() -> None:
    assert names_of(["2.0", "3.0"], known={"2.0"}) == ["2.0", "3"]
    assert renamed(["0.5", "1.0"], "0.5=half") == (["half", "1"], 1)


def test_unicode_is_composed_and_blanks_go() -> None:
    assert COMPOSED != DECOMPOSED
    assert clean(f"\ufeff {DECOMPOSED}\u00a0\n") == COMPOSED
    assert clean("heart\u00a0fail\u00adure\nacute") == "heart failure acute"
    assert [clean(cell) for cell in (None, math.nan, True, datetime.date(2024, 1, 2))] == [
        *("", "", "True", "2024-01-02")
    ]


def test_renames_take_place_before_and_after_numbers_are_made_alike() -> None:
    assert renamed(["1.0", 1, "Heart"], "1=yes;Heart=heart") == (["yes", "yes", "heart"], 3)
    assert renamed(["1.0", "Heart"], "Haert=heart") == (["1", "Heart"], 0)


@pytest.mark.parametrize("cell", [["a"], [], {"a": 1}, "['a', 'b']", ' ["a"]', "{'a': 1}"])
def test_lists_are_seen_also_as_text(cell: Any) -> None:
    assert lists_in(["heart", cell, None, 3, "[x", "y]"]) == 1


def test_fractions_are_seen_in_a_column_of_numbers() -> None:
    assert fractions_in(["0.03", "0,13", ".5", "1e-05", "1", ""]) == 4
    assert fractions_in(["0.5", "n/a", "1"]) == 1
    assert not fractions_in(["V45.1", "401.9", "E11.9"])
    assert not fractions_in(["1", "2", "3.0", ""])


def prepared(config: Any, cells: list[Any], **settings: Any) -> list[str]:
    columns = {"text": ["x"] * len(cells), "label": cells}
    made = TASKS["classification"].prepared(config(**settings), columns, Notes())
    return list(made["label"])


def test_classification_refuses_lists_and_scores_by_name(config: Any) -> None:
    for cells, problem in (
        ([["a", "b"], "secret"], "holds lists of labels in 1 of 2 rows"),
        ([0.25, 1.0, 0.75], "holds fractions in 2 of 3 rows"),
        (["0.25", "1"], "holds fractions in 1 of 2 rows"),
    ):
        with pytest.raises(FedBTError) as caught:
            prepared(config, cells)
        message = str(caught.value)
        assert problem in message
        assert "'label'" in message
        assert "secret" not in message
        assert "0.25" not in message


def test_codes_that_look_like_fractions_pass_when_listed(config: Any) -> None:
    for setting in ("labels", "labels_allowed"):
        assert prepared(config, [401.9, "250.0"], **{setting: "250.0,401.9"}) == ["401.9", "250.0"]
    assert prepared(config, [1.0, "2"], labels="1.0,2.0,3") == ["1", "2"]
    assert TASKS["classification"].given_labels(("1.0", "2", "2.0")) == ("1", "2")


def test_entity_types_are_renamed_in_whatever_scheme(config: Any) -> None:
    ner = TASKS["ner"]
    rows = {
        "tokens": [["a", "b", "c"]] * 2,
        "ner_tags": [["B-Drug", "E-Drug", " O"], ["S-Neg", "O", f"S-{DECOMPOSED}"]],
    }
    settings = config(task="ner", label_map="Drug=Chemical; Neg = O")
    notes = Notes()
    assert ner.prepared(settings, rows, notes)["ner_tags"] == [
        ["B-Chemical", "I-Chemical", "O"],
        ["O", "O", f"B-{COMPOSED}"],
    ]
    assert "label-map: 3 labels are written otherwise" in notes.lines


def test_entity_types_may_be_listed_as_types_or_as_tags() -> None:
    ner = TASKS["ner"]
    assert {"Drug", "B-cell"} <= ner.allowed(("Drug", "B-cell"))
    assert "Drug" in ner.allowed(("O", "B-Drug", "I-Drug"))
    assert [ner.plain_name(tag) for tag in ("O", "B-Drug", "I-x-y")] == ["", "Drug", "x-y"]
