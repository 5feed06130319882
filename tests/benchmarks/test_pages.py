"""Pages show what benchmarks/results/ says, and the paper's statistics are what their names say."""

import re
from pathlib import Path

import pytest
from paper_lines import line

from benchmarks.publish import make_results, marks, paper_plots, paper_tables
from benchmarks.results import read_lines
from fedbt_app.config import APP_DIR

# Pages --------------------------------------------------------------------------------------------------------


def test_every_table_of_the_pages_is_what_the_results_say() -> None:
    assert make_results.stale() == []


def test_every_place_in_the_pages_is_filled_by_the_script() -> None:
    for page, blocks in make_results.pages().items():
        assert marks.names(page) == set(blocks), page


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one, by x -->\n| 3 |\n<!-- /one -->\nafter\n", encoding="utf-8")
    assert marks.filled(page, {"one": "| 3 |"}, "x") == page.read_text(encoding="utf-8")
    assert "| 4 |\n<!-- /one -->\nafter" in marks.filled(page, {"one": "| 4 |"}, "x")
    with pytest.raises(ValueError, match="0 places for two"):
        marks.filled(page, {"two": ""}, "x")


FIGURE = re.compile(r"(?<![\w.,-])[-+]?\d[\d,]*\.\d+(?![\w.])")


def figures(text: str) -> list[str]:
    """Return the decimal numbers of a text, without what is code."""
    return [
        figure.replace(",", "")
        for figure in FIGURE.findall(re.sub(r"```.*?```|`.*?`", "", text, flags=re.DOTALL))
    ]


def not_in_the_tables(prose: str, tables: str) -> list[str]:
    """Return the figures that are no rounded ones of the tables; without a sign, a share's distance to 100 % is one."""

    def stands(figure: str) -> bool:
        half = 0.5 * 10 ** -len(figure.split(".")[1]) + 1e-9
        meant = [(one,) if figure[0] in "+-" else (abs(one), 100 - one, one - 100) for one in known]
        return any(abs(value - float(figure)) <= half for values in meant for value in values)

    known = [float(figure) for figure in figures(tables)]
    return [figure for figure in figures(prose) if not stands(figure)]


def test_figures_of_the_prose_stand_in_the_tables() -> None:
    results = (APP_DIR / "docs" / "results.md").read_text(encoding="utf-8")
    for section in re.split(r"\n(?=## )", results):
        tables, prose = marks.parted(section)
        assert not tables or not_in_the_tables(prose, tables) == [], section[:40]
    readme = (APP_DIR / "README.md").read_text(encoding="utf-8")
    (section,) = [
        text for text in re.split(r"\n(?=## )", readme) if text.startswith("## What it is worth")
    ]
    costs = (APP_DIR / "docs" / "costs.md").read_text(encoding="utf-8")
    assert not_in_the_tables(section, marks.parted(results + costs)[0]) == []


def test_a_figure_of_the_prose_that_no_table_has_is_noticed() -> None:
    table = "| BERT-FL | 1,066.46 % | -0.65 (-2.2, +0.9) | 98.1 % |"
    assert not_in_the_tables("66.5, -0.6, +0.8, -2.2 and 1.9 % below, `0.1`", table) == [
        "66.5",
        "+0.8",
    ]


@pytest.mark.parametrize("tables", paper_plots.CURVES, ids=lambda tables: tables[0])
def test_every_curve_of_a_picture_has_a_colour_of_its_own(tables: tuple[str, ...]) -> None:
    stored = [
        one for one in read_lines().values() if one["table"] in tables and len(one["curve"]) > 1
    ]
    cells = paper_plots.shown(stored)
    assert 5 < len(cells) <= min(len(paper_plots.COLOURS), len(paper_plots.MARKERS))


# Statistics ---------------------------------------------------------------------------------------------------


def row(made: str, name: str) -> list[str]:
    """Return the cells of the table's row that starts with `name`."""
    found = [text for text in made.splitlines() if text.startswith(f"| {name} |")]
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_a_method_is_paired_with_full_training_of_the_same_seed() -> None:
    full = [
        line("BERT-FL", 0.5 + seed / 10, seed=seed, train_flops=40, uplink_bytes=8)
        for seed in (1, 2, 3)
    ]
    close = [
        line("FedBT", one["value"] + change, seed=one["seed"])
        for one, change in zip(full, (1e-3, 0, -1e-3), strict=True)
    ]
    worse = [
        line("head", one["value"] - 0.2 + change, seed=one["seed"])
        for one, change in zip(full, (0, 0.01, 0.02), strict=True)
    ]
    made = paper_tables.comparison([*full, *close, *worse])
    _, score, points, t, tost, *costs = row(made, "FedBT")
    assert (score, points) == ("70.00 % ± 9.90 (3)", "+0.00 (+0.1, +0.0, -0.1)")
    assert (float(t), float(tost)) == (1.0, 0.0)  # no difference seen, and equal within a point
    assert costs == ["25.0 %", "25.0 %", "50.0 %", "100.0 %", "100.0 %"]
    _, _, points, t, tost, *_ = row(made, "head")
    assert (points, tost) == ("-19.00 (-20.0, -19.0, -18.0)", "1.00")
    assert float(t) < 0.01


def test_seconds_are_compared_on_one_processor_and_costs_over_the_same_seeds() -> None:
    full = [
        line("BERT-FL", seed=seed, train_flops=40, client_seconds=4.0, cpu="old") for seed in (1, 2)
    ]
    ours = [
        line(seed=1, cpu="old"),
        line(seed=2, cpu="new"),
        line(seed=3, cpu="new", train_flops=1000),
    ]
    *_, flops, up, down, seconds = row(paper_tables.comparison([*full, *ours]), "FedBT")
    assert (flops, up, down, seconds) == ("25.0 %", "100.0 %", "100.0 %", "25.0 %")
    assert row(paper_tables.comparison([*full, *ours[1:]]), "FedBT")[-4:] == [
        "25.0 %",
        "100.0 %",
        "100.0 %",
        "",
    ]
    assert row(paper_tables.comparison([*full, ours[2]]), "FedBT")[-5:] == [""] * 5
    nameless = [
        {name: value for name, value in one.items() if name != "cpu"} for one in (*full, *ours)
    ]
    assert row(paper_tables.comparison(nameless), "FedBT")[-1] == ""
    everywhere = [
        {**one, "dataset": name} for one in (*full, *ours[1:]) for name in ("notes", "letters")
    ]
    assert row(paper_tables.main_table([*everywhere, *full, ours[0]]), "FedBT")[-1] == "25.0 %"


def test_the_main_table_leaves_out_what_was_tried_on_one_of_its_data_sets() -> None:
    everywhere = [line(dataset=dataset) for dataset in ("notes", "letters")]
    made = paper_tables.main_table([*everywhere, line(variant="tried")])
    assert row(made, "FedBT")[1:3] == ["50.00 % (1)", "50.00 % (1)"]
    assert "tried" not in made
    assert "tried" in paper_tables.main_table([line(variant="tried")])


def test_the_loss_of_full_training_at_equal_cost_lies_on_its_curve() -> None:
    curve = [[1, 100, 30, 10, 4.0], [2, 200, 60, 20, 3.0]]
    full = line("BERT-FL", 3.0, metric="loss", initial=5.0, curve=curve, train_flops=200)
    ours = line("FedBT", 3.3, metric="loss", train_flops=150, uplink_bytes=15, downlink_bytes=5)
    assert row(paper_tables.pretraining([full, ours]), "FedBT")[3:5] == ["3.5000", "4.5000"]
    much = {**ours, "train_flops": 50, "uplink_bytes": 900}
    assert row(paper_tables.pretraining([full, much]), "FedBT")[3:5] == ["4.5000", "3.0000"]
    assert row(paper_tables.plans([full, ours]), "FedBT")[-2:] == ["3.5000", "4.5000"]


def test_what_further_pre_training_is_worth_is_told_against_the_base_seed_by_seed() -> None:
    loss = line("BERT-FL", 3.0, metric="loss", dataset="text", initial=5.0, curve=[])
    base = [line("base", 0.5, seed=1), line("base", 0.9, seed=2)]
    made = paper_tables.pretraining([loss, *base, line("FedBT", 0.92, seed=2)])
    assert row(made, "base")[1:7] == ["5.0000", "", "", "", "70.00 % ± 28.28 (2)", ""]
    assert row(made, "FedBT")[1:7] == ["", "", "", "", "92.00 % (1)", "+2.00"]


def test_each_plan_on_a_split_is_told_against_full_training_on_the_same_split() -> None:
    splits = (
        "partitioner=dirichlet, dirichlet-alpha=0.1",
        "partitioner=size-skewed, partition-weights=1,3",
    )
    full = [
        line("BERT-FL", value, variant=split)
        for split, value in zip(splits, (0.5, 0.6), strict=True)
    ]
    ours = [
        line("FedBT", 0.7, variant=f"{plan}, {split}")
        for plan in ("paper", "own")
        for split in splits
    ]
    made = paper_tables.skew([*full, *ours])
    rows = [
        [cell.strip() for cell in text.strip("|").split("|")][1:] for text in made.splitlines()[2:]
    ]
    assert rows[:2] == [
        ["dirichlet, alpha=0.1", "50.00 % (1)", "paper", "70.00 % (1)", "+20.00"],
        ["size-skewed, 1,3", "60.00 % (1)", "paper", "70.00 % (1)", "+10.00"],
    ]
    assert [cells[2] for cells in rows] == ["paper", "paper", "own", "own"]
