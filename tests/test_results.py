"""Docs show what benchmarks/results/ says; the paper's tables read, resume and test as they should."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbt_app.config import APP_DIR, RunConfig, defaults
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.plan import RoundPlan, plan_round
from fedbt_app.training import train

sys.path[:0] = [str(APP_DIR / "docs"), str(APP_DIR / "benchmarks")]
import ablations  # noqa: E402
import cells  # noqa: E402
import make_results  # noqa: E402
import marks  # noqa: E402
import paper  # noqa: E402
import paper_plots  # noqa: E402
import paper_tables  # noqa: E402
import students  # noqa: E402

TABLES = sorted((APP_DIR / "benchmarks" / "paper").glob("*.toml"))


def line(method: str = "FedBT", value: float = 0.5, **changes: Any) -> dict[str, Any]:
    """Return a finished cell."""
    about = {"table": "finetune", "dataset": "notes", "method": method, "variant": "", "seed": 1}
    costs = {"train_flops": 10, "stock_flops": 40, "uplink_bytes": 4, "downlink_bytes": 2, "client_seconds": 1.0}
    rest = {
        "metric": "accuracy",
        "value": value,
        "initial": 0.1,
        "curve": [],
        "tried": {},
        "wall_seconds": 1.0,
        "clients": 6,
        "cpu": "new",
    }
    return about | costs | rest | changes


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
    return [figure.replace(",", "") for figure in FIGURE.findall(re.sub(r"```.*?```|`.*?`", "", text, flags=re.DOTALL))]


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
    (section,) = [text for text in re.split(r"\n(?=## )", readme) if text.startswith("## What it is worth")]
    costs = (APP_DIR / "docs" / "costs.md").read_text(encoding="utf-8")
    assert not_in_the_tables(section, marks.parted(results + costs)[0]) == []


def test_a_figure_of_the_prose_that_no_table_has_is_noticed() -> None:
    table = "| BERT-FL | 1,066.46 % | -0.65 (-2.2, +0.9) | 98.1 % |"
    assert not_in_the_tables("66.5, -0.6, +0.8, -2.2 and 1.9 % below, `0.1`", table) == ["66.5", "+0.8"]


@pytest.mark.parametrize("tables", paper_plots.CURVES, ids=lambda tables: tables[0])
def test_every_curve_of_a_picture_has_a_colour_of_its_own(tables: tuple[str, ...]) -> None:
    lines = [json.loads(text) for text in (make_results.RESULTS / "paper.jsonl").read_text().splitlines()]
    cells = paper_plots.shown([line for line in lines if line["table"] in tables and len(line["curve"]) > 1])
    assert 5 < len(cells) <= min(len(paper_plots.COLOURS), len(paper_plots.MARKERS))


# Statistics ---------------------------------------------------------------------------------------------------


def row(made: str, name: str) -> list[str]:
    """Return the cells of the table's row that starts with `name`."""
    found = [text for text in made.splitlines() if text.startswith(f"| {name} |")]
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_a_method_is_paired_with_full_training_of_the_same_seed() -> None:
    full = [line("BERT-FL", 0.5 + seed / 10, seed=seed, train_flops=40, uplink_bytes=8) for seed in (1, 2, 3)]
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
    full = [line("BERT-FL", seed=seed, train_flops=40, client_seconds=4.0, cpu="old") for seed in (1, 2)]
    ours = [line(seed=1, cpu="old"), line(seed=2, cpu="new"), line(seed=3, cpu="new", train_flops=1000)]
    *_, flops, up, down, seconds = row(paper_tables.comparison([*full, *ours]), "FedBT")
    assert (flops, up, down, seconds) == ("25.0 %", "100.0 %", "100.0 %", "25.0 %")
    assert row(paper_tables.comparison([*full, *ours[1:]]), "FedBT")[-4:] == ["25.0 %", "100.0 %", "100.0 %", ""]
    assert row(paper_tables.comparison([*full, ours[2]]), "FedBT")[-5:] == [""] * 5
    nameless = [{name: value for name, value in one.items() if name != "cpu"} for one in (*full, *ours)]
    assert row(paper_tables.comparison(nameless), "FedBT")[-1] == ""
    everywhere = [{**one, "dataset": name} for one in (*full, *ours[1:]) for name in ("notes", "letters")]
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
    splits = ("partitioner=dirichlet, dirichlet-alpha=0.1", "partitioner=size-skewed, partition-weights=1,3")
    full = [line("BERT-FL", value, variant=split) for split, value in zip(splits, (0.5, 0.6), strict=True)]
    ours = [line("FedBT", 0.7, variant=f"{plan}, {split}") for plan in ("paper", "own") for split in splits]
    made = paper_tables.skew([*full, *ours])
    rows = [[cell.strip() for cell in text.strip("|").split("|")][1:] for text in made.splitlines()[2:]]
    assert rows[:2] == [
        ["dirichlet, alpha=0.1", "50.00 % (1)", "paper", "70.00 % (1)", "+20.00"],
        ["size-skewed, 1,3", "60.00 % (1)", "paper", "70.00 % (1)", "+10.00"],
    ]
    assert [cells[2] for cells in rows] == ["paper", "paper", "own", "own"]


# Cells --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned() -> dict[cells.Key, dict[str, Any]]:
    """Return lines as the tables of settings to tune would give."""
    jobs = [job for path in TABLES if path.stem.endswith("-tuning") for job in cells.read_table(path, {})]
    names = ("table", "dataset", "method", "variant", "seed")
    lines = [line(**dict(zip(names, key, strict=True))) for job in jobs for key in job.keys]  # type: ignore[arg-type]
    return {cells.key_of(one): one for one in lines}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_gives_runs_that_the_product_accepts(path: Path, tuned: dict[cells.Key, dict[str, Any]]) -> None:
    for job in cells.read_table(path, tuned):
        assert not job.ablation or job.ablation in ablations.NAMES
        for stage in job.own_stages:
            RunConfig.load(defaults() | stage.settings | {"dataset": "x", "min-clients": stage.clients})


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_stored_line_was_run_with_the_settings_that_its_table_gives(path: Path) -> None:
    done = cells.read_lines(paper.RESULTS)
    own = {key for key in done if key[0] == path.stem}
    jobs = cells.read_table(path, done, {"method": {key[2] for key in own}})
    there = [job for job in jobs if own.issuperset(job.keys)]
    assert {key for job in there for key in job.keys} == own
    assert [job.keys[0] for job in there if not job.is_done(done)] == []


def test_a_cell_is_run_again_when_its_table_or_its_tuning_changes() -> None:
    stages = tuple(cells.Stage(name, {"learning-rate": 0.1}, 6) for name in ("text", "notes"))
    job = cells.Job("finetune", "FedBT", "", 1, stages)
    lines = [line(dataset=name, settings=values) for name, values in zip(("text", "notes"), job.runs(), strict=True)]
    done = {cells.key_of(one): one for one in lines}
    assert job.is_done(done)
    assert not job.is_done({})
    assert not job.is_done(done, {"model": "other"})
    assert [values.get("model") for values in job.runs()] == [None, cells.MADE]
    lines[1]["settings"]["learning-rate"] = 0.2
    assert not job.is_done(done)


def test_a_cell_takes_the_settings_that_were_best_on_validation(tmp_path: Path) -> None:
    path = tmp_path / "final.toml"
    path.write_text(
        'clients = 3\nseeds = [1, 2]\ntuned-by = "tuning"\n[settings]\nnum-rounds = 2\n'
        '[datasets.notes.settings]\ntask = "ner"\n[[cells]]\nmethod = "head"\nsettings = { method = "head" }\n'
    )
    tried = [
        line("head", value, table="tuning", variant=f"v{value}", tried={"learning-rate": value}) for value in (0.1, 0.3)
    ]
    jobs = cells.read_table(path, {cells.key_of(one): one for one in tried})
    assert [job.seed for job in jobs] == [1, 2]
    assert jobs[0].stages[0].settings["learning-rate"] == 0.3
    with pytest.raises(FedBTError, match=r"run `paper\.py tuning` first"):
        cells.read_table(path, {})


def test_a_cell_runs_on_the_data_sets_that_it_names_or_on_all(tmp_path: Path) -> None:
    path = tmp_path / "final.toml"
    path.write_text(
        'clients = 3\nseeds = [1]\n[settings]\nnum-rounds = 2\n[datasets.notes.settings]\ntask = "ner"\n'
        '[datasets.letters.settings]\ntask = "mlm"\n[[cells]]\nmethod = "FedBT"\n'
        '[[cells]]\nmethod = "FedBT"\nvariant = "wide"\ndatasets = ["notes"]\n'
    )
    about = [(job.variant, job.stages[0].dataset) for job in cells.read_table(path, {})]
    assert about == [("", "notes"), ("", "letters"), ("wide", "notes")]


def test_a_finished_cell_replaces_an_older_one_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    cells.add_lines(path, [line(seed=1), line(seed=2)])
    cells.add_lines(path, [line(seed=1, value=0.9)])
    assert [json.loads(text)["value"] for text in path.read_text().splitlines()] == [0.9, 0.5]
    assert [one.name for one in tmp_path.iterdir()] == ["lines.jsonl"]


def test_cells_added_by_several_processes_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"

    def add(start: int) -> None:
        for seed in range(start, start + 20):
            cells.add_lines(path, [line(seed=seed)])

    context = multiprocessing.get_context("fork")
    adding = [context.Process(target=add, args=(start,)) for start in (0, 20, 40)]
    for process in adding:
        process.start()
    for process in adding:
        process.join()
    assert sorted(key[-1] for key in cells.read_lines(path)) == list(range(60))


def test_a_killed_run_of_tables_leaves_no_cell_running(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, sys, time\nsys.path[:0] = {[str(APP_DIR / 'benchmarks'), str(APP_DIR)]}\n"
        "from federation import run_all\n"
        "def work(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(run_all([sys.argv[1]], 1, work))\n"
    )
    noted = tmp_path / "pid"
    with subprocess.Popen([sys.executable, str(script), str(noted)]) as running:
        eventually(lambda: noted.exists() and noted.read_text() != "")
        running.kill()
    command = Path(f"/proc/{noted.read_text()}/cmdline")  # empty when it has ended and nobody has asked how
    eventually(lambda: not command.exists() or not command.read_bytes())


def eventually(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("bare", [False, True])
def test_later_stages_start_from_what_the_first_made_and_bare_ones_from_the_base(
    bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[dict[str, Any]] = []

    def do(run: Any) -> dict[str, Any]:
        ran.append(run.values)
        costs = dict.fromkeys(("train_flops", "uplink_bytes", "downlink_bytes", "client_seconds"), 1)
        costs |= dict.fromkeys(("stock_flops", "same_flops", "peak_memory_bytes"), 1)
        scores = {"accuracy": 0.5}
        return {"task": "classification", "cost": costs, "rounds": [], "initial": scores, "final": scores} | {
            "reference": {"uplink_bytes": 1}
        }

    monkeypatch.setattr(paper, "do", do)
    stages = tuple(cells.Stage(name, {}, 2) for name in ("first", "second", "third"))
    for stage in stages:
        (tmp_path / "data" / stage.dataset).mkdir(parents=True)
    job = cells.Job("finetune", "FedBT", "", 1, stages, bare=bare)
    lines = paper.run_job(job, tmp_path / "data", None, tmp_path / "work", {})
    assert [Path(values["dataset"]).name for values in ran] == [one["dataset"] for one in lines]
    assert [one["dataset"] for one in lines] == (["second", "third"] if bare else ["first", "second", "third"])
    made = tmp_path / "work" / "finetune" / "first-FedBT--1" / "0" / "model"
    assert [values["model"] for values in ran] == (["embedded"] * 2 if bare else ["embedded", str(made), str(made)])


@given(st.sampled_from(sorted(ablations.ABLATIONS)), st.integers(2, 12), st.integers(0, 9), st.data())
def test_ablations_plan_what_a_client_can_build(name: str, depth: int, round_: int, data: st.DataObject) -> None:
    local_depth = data.draw(st.integers(1, depth))
    arguments = ("fedbt", "mlm", depth, local_depth, 10, round_, 1, "a", "paper")
    with ablations.ablated(name):
        from fedbt_app.server import strategy

        made = strategy.plan_round(*arguments)  # type: ignore[attr-defined]
    assert len(made.local_blocks) == local_depth
    assert all(0 <= block < depth for block in made.local_blocks)
    assert all(made.local_blocks.count(block) == 1 for block in made.trained_blocks)
    assert plan_round(*arguments).round == made.round


@pytest.mark.parametrize(
    ("name", "rates"), [("", (1, 1, 1)), (ablations.HEAD_RATE, (1, 1, 10)), (ablations.BLOCK_RATES, (0.5, 1, 1))]
)
def test_rates_are_those_of_each_tensor(name: str, rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bert.encoder.layer.2.output.dense.weight", "bert.encoder.layer.3.output.dense.weight", "classifier.bias")
    trained = {tensor: torch.nn.Parameter(torch.zeros(1)) for tensor in names}
    local = SimpleNamespace(trained=trained, plan=RoundPlan(0, (0, 1, 2, 3), (2, 3)))

    def run(local: Any, rows: Any, collator: Any, settings: train.TrainSettings) -> None:
        optimizer = train.Optimizer(local.trained.values(), settings)
        sum(value.sum() for value in local.trained.values()).backward()
        optimizer.detach()

    monkeypatch.setattr(train, "run", run)
    with ablations.ablated(name):
        train.run(local, [], None, train.TrainSettings(1, 1, 0.01, 0.0))  # type: ignore[arg-type]
    steps = [-float(value) / 0.01 for value in trained.values()]  # AdamW's first step is its learning rate
    assert steps == pytest.approx(rates, rel=1e-4)
    assert train.run is run


def test_a_shallow_student_is_the_first_blocks_of_its_base(tiny_bert: Path, tmp_path: Path) -> None:
    base, student = Checkpoint(tiny_bert), Checkpoint(students.shallow_student(str(tiny_bert), 2, tmp_path / "student"))
    assert (base.architecture.depth, student.architecture.depth) == (4, 2)
    shapes = student.architecture.embeddings() | student.architecture.block(0) | student.architecture.block(1)
    assert all(student.tensor(name).equal(base.tensor(name)) for name in shapes)
    assert "bert.encoder.layer.2.output.dense.weight" not in student
    assert student.tokenizer()("a word")["input_ids"] == base.tokenizer()("a word")["input_ids"]
