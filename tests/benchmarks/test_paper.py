"""The paper's tables read, resume and run as they should."""

import json
import multiprocessing
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
from paper_lines import line

from benchmarks.paper import ablations, cells, runner, students
from benchmarks.paper.tables import read_table
from benchmarks.results import Key, add_lines, key_of, read_lines
from fedbt_app.config import APP_DIR, RunConfig, defaults
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.plan import METHODS, PAPER, RoundPlan, RunPlan
from fedbt_app.tasks import TASKS
from fedbt_app.training import train
from fedbt_app.training.optimizer import TrainSettings

TABLES = sorted((APP_DIR / "benchmarks" / "paper").glob("*.toml"))


@pytest.fixture(scope="module")
def tuned() -> dict[Key, dict[str, Any]]:
    """Return lines as the tables of settings to tune would give."""
    jobs = [job for path in TABLES if path.stem.endswith("-tuning") for job in read_table(path, {})]
    names = ("table", "dataset", "method", "variant", "seed")
    lines = [line(**dict(zip(names, key, strict=True))) for job in jobs for key in job.keys]  # type: ignore[arg-type]
    return {key_of(one): one for one in lines}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_gives_runs_that_the_product_accepts(
    path: Path, tuned: dict[Key, dict[str, Any]]
) -> None:
    for job in read_table(path, tuned):
        assert not job.ablation or job.ablation in ablations.NAMES
        for stage in job.own_stages:
            RunConfig.load(
                defaults() | stage.settings | {"dataset": "x", "min-clients": stage.clients}
            )


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_stored_line_was_run_with_the_settings_that_its_table_gives(path: Path) -> None:
    done = read_lines()
    own = {key for key in done if key[0] == path.stem}
    jobs = read_table(path, done, {"method": {key[2] for key in own}})
    there = [job for job in jobs if own.issuperset(job.keys)]
    assert {key for job in there for key in job.keys} == own
    assert [job.keys[0] for job in there if not job.is_done(done)] == []


def test_a_cell_is_run_again_when_its_table_or_its_tuning_changes() -> None:
    stages = tuple(cells.Stage(name, {"learning-rate": 0.1}, 6) for name in ("text", "notes"))
    job = cells.Job("finetune", "FedBT", "", 1, stages)
    lines = [
        line(dataset=name, settings=values)
        for name, values in zip(("text", "notes"), job.runs(), strict=True)
    ]
    done = {key_of(one): one for one in lines}
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
        line("head", value, table="tuning", variant=f"v{value}", tried={"learning-rate": value})
        for value in (0.1, 0.3)
    ]
    jobs = read_table(path, {key_of(one): one for one in tried})
    assert [job.seed for job in jobs] == [1, 2]
    assert jobs[0].stages[0].settings["learning-rate"] == 0.3
    with pytest.raises(FedBTError, match=r"run `python -m benchmarks\.paper tuning` first"):
        read_table(path, {})


def test_a_cell_runs_on_the_data_sets_that_it_names_or_on_all(tmp_path: Path) -> None:
    path = tmp_path / "final.toml"
    path.write_text(
        'clients = 3\nseeds = [1]\n[settings]\nnum-rounds = 2\n[datasets.notes.settings]\ntask = "ner"\n'
        '[datasets.letters.settings]\ntask = "mlm"\n[[cells]]\nmethod = "FedBT"\n'
        '[[cells]]\nmethod = "FedBT"\nvariant = "wide"\ndatasets = ["notes"]\n'
    )
    about = [(job.variant, job.stages[0].dataset) for job in read_table(path, {})]
    assert about == [("", "notes"), ("", "letters"), ("wide", "notes")]


def test_a_finished_cell_replaces_an_older_one_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    add_lines(path, [line(seed=1), line(seed=2)])
    add_lines(path, [line(seed=1, value=0.9)])
    assert [json.loads(text)["value"] for text in path.read_text().splitlines()] == [0.9, 0.5]
    assert [one.name for one in tmp_path.iterdir()] == ["lines.jsonl"]


def test_cells_added_by_several_processes_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"

    def add(start: int) -> None:
        for seed in range(start, start + 20):
            add_lines(path, [line(seed=seed)])

    context = multiprocessing.get_context("fork")
    adding = [context.Process(target=add, args=(start,)) for start in (0, 20, 40)]
    for process in adding:
        process.start()
    for process in adding:
        process.join()
    assert sorted(key[-1] for key in read_lines(path)) == list(range(60))


def test_a_killed_run_of_tables_leaves_no_cell_running(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, sys, time\nsys.path[:0] = [{str(APP_DIR)!r}]\n"
        "from benchmarks.federation import run_all\n"
        "def work(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(run_all([sys.argv[1]], 1, work))\n"
    )
    noted = tmp_path / "pid"
    with subprocess.Popen([sys.executable, str(script), str(noted)]) as running:
        eventually(lambda: noted.exists() and noted.read_text() != "")
        running.kill()
    command = Path(
        f"/proc/{noted.read_text()}/cmdline"
    )  # empty when it has ended and nobody has asked how
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
        costs = dict.fromkeys(
            ("train_flops", "uplink_bytes", "downlink_bytes", "client_seconds"), 1
        )
        costs |= dict.fromkeys(("stock_flops", "same_flops", "peak_memory_bytes"), 1)
        scores = {"accuracy": 0.5}
        return {
            "task": "classification",
            "cost": costs,
            "rounds": [],
            "initial": scores,
            "final": scores,
        } | {"reference": {"uplink_bytes": 1}}

    monkeypatch.setattr(runner, "do", do)
    stages = tuple(cells.Stage(name, {}, 2) for name in ("first", "second", "third"))
    for stage in stages:
        (tmp_path / "data" / stage.dataset).mkdir(parents=True)
    job = cells.Job("finetune", "FedBT", "", 1, stages, bare=bare)
    lines = runner.run_job(job, tmp_path / "data", None, tmp_path / "work", {})
    assert [Path(values["dataset"]).name for values in ran] == [one["dataset"] for one in lines]
    assert [one["dataset"] for one in lines] == (
        ["second", "third"] if bare else ["first", "second", "third"]
    )
    made = tmp_path / "work" / "finetune" / "first-FedBT--1" / "0" / "model"
    assert [values["model"] for values in ran] == (
        ["embedded"] * 2 if bare else ["embedded", str(made), str(made)]
    )


@given(
    st.sampled_from(sorted(ablations.ABLATIONS)), st.integers(2, 12), st.integers(0, 9), st.data()
)
def test_ablations_plan_what_a_client_can_build(
    name: str, depth: int, round_: int, data: st.DataObject
) -> None:
    local_depth = data.draw(st.integers(1, depth))
    plan = RunPlan(METHODS["fedbt"], TASKS["mlm"], depth, 10, PAPER, seed=1)
    made = ablations.Changed(plan, ablations.ABLATIONS[name]).round(round_, "a", local_depth)
    assert len(made.local_blocks) == local_depth
    assert all(0 <= block < depth for block in made.local_blocks)
    assert all(made.local_blocks.count(block) == 1 for block in made.trained_blocks)
    assert made.round == round_


@pytest.mark.parametrize(
    ("name", "rates"),
    [("", (1, 1, 1)), (ablations.HEAD_RATE, (1, 1, 10)), (ablations.BLOCK_RATES, (0.5, 1, 1))],
)
def test_rates_are_those_of_each_tensor(
    name: str, rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "bert.encoder.layer.2.output.dense.weight",
        "bert.encoder.layer.3.output.dense.weight",
        "classifier.bias",
    )
    trained = {tensor: torch.nn.Parameter(torch.zeros(1)) for tensor in names}
    local = SimpleNamespace(trained=trained, plan=RoundPlan(0, (0, 1, 2, 3), (2, 3)))

    def run(local: Any, rows: Any, collator: Any, settings: TrainSettings) -> None:
        optimizer = train.Optimizer(local.trained.values(), settings)
        sum(value.sum() for value in local.trained.values()).backward()
        optimizer.detach()

    monkeypatch.setattr(train, "run", run)
    with ablations.ablated(name):
        train.run(local, [], None, TrainSettings(1, 1, 0.01, 0.0))  # type: ignore[arg-type]
    steps = [
        -float(value) / 0.01 for value in trained.values()
    ]  # AdamW's first step is its learning rate
    assert steps == pytest.approx(rates, rel=1e-4)
    assert train.run is run


def test_a_shallow_student_is_the_first_blocks_of_its_base(tiny_bert: Path, tmp_path: Path) -> None:
    base, student = (
        Checkpoint(tiny_bert),
        Checkpoint(students.shallow_student(str(tiny_bert), 2, tmp_path / "student")),
    )
    assert (base.architecture.depth, student.architecture.depth) == (4, 2)
    shapes = (
        student.architecture.embeddings()
        | student.architecture.block(0)
        | student.architecture.block(1)
    )
    assert all(student.tensor(name).equal(base.tensor(name)) for name in shapes)
    assert "bert.encoder.layer.2.output.dense.weight" not in student
    assert student.tokenizer()("a word")["input_ids"] == base.tokenizer()("a word")["input_ids"]
