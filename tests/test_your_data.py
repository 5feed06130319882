"""examples/: what docs/your-data.md tells a newcomer to run is valid, and trains."""

import csv
import re
import runpy
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client_app
import server_app
from fedbt_app.cli.doctor import examine
from fedbt_app.cli.main import main
from fedbt_app.config import APP_DIR, RunConfig, defaults
from fedbt_app.wire.local_grid import LocalGrid, simulated

EXAMPLES = APP_DIR / "examples"
CONFIG = EXAMPLES / "my-data.toml"
PAGE = (APP_DIR / "docs" / "your-data.md").read_text(encoding="utf-8")


def rows() -> list[dict[str, str]]:
    with (EXAMPLES / "medical_terms.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_shows_the_file_and_the_settings_as_they_are() -> None:
    assert tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0]) == tomllib.loads(
        CONFIG.read_text()
    )
    lines = (EXAMPLES / "medical_terms.csv").read_text(encoding="utf-8").splitlines()
    shown = re.findall(r"```\n(text,label\n.*?)```", PAGE, re.DOTALL)[0].splitlines()
    assert [line for line in shown if line not in lines] == []


def test_the_file_has_as_many_rows_of_each_kind_as_is_said() -> None:
    kinds = Counter(row["label"] for row in rows())
    assert set(kinds.values()) == {70}
    assert f"has {sum(kinds.values())} rows" in PAGE
    assert ", ".join(sorted(kinds)) in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len({row["text"] for row in rows()}) == len(rows())


def test_the_script_takes_terms_of_one_kind_and_leaves_out_examples_of_use() -> None:
    made = runpy.run_path(str(EXAMPLES / "make_terms.py"))
    roots = {label: numbers[0] for label, numbers in made["KINDS"].items()}
    line = '{number} 26 n 02 word 0 other 1 002 @ {parent} n 0000 + 00000009 v 0101 | {text}; "as in a sentence"  '
    nouns = [
        made["read"](
            line.format(number="1", parent=roots["disease"], text="a fever that comes and goes")
        ),
        made["read"](
            line.format(number="2", parent="1", text="such a fever, in tropical countries")
        ),
        made["read"](line.format(number="3", parent=roots["medicine"], text="too short")),
        made["read"](
            line.format(number="4", parent="00000009", text="a thing that has no place in medicine")
        ),
    ]
    assert sorted(made["chosen"](nouns)) == [
        ("a fever that comes and goes", "disease"),
        ("such a fever, in tropical countries", "disease"),
    ]


def test_doctor_and_plan_take_the_settings(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(APP_DIR)
    own = {"model": str(tiny_bert), "cache-dir": str(tmp_path)}
    config = RunConfig.load(defaults() | tomllib.loads(CONFIG.read_text()) | own)
    findings = [finding for finding in examine(config) if finding.subject == "data"]
    assert [str(finding) for finding in findings if not finding.ok] == []
    shown = re.findall(r"^(?:ok  |warn) data: .*", PAGE, re.MULTILINE)
    assert str(findings[0]) == shown[0]
    assert str(findings[2]) in shown  # the labels; lengths are those of another tokenizer
    settings = [f"{key}={value}" for key, value in own.items()]
    assert (
        main(["plan", "--config", str(CONFIG), "--num-labels", "5", "--examples", "93", *settings])
        == 0
    )
    assert "2-3 + head" in capsys.readouterr().out


def test_the_example_trains_a_round_on_three_sites(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(APP_DIR)
    small = settings(num_rounds=1)
    kept = {
        name: small[name] for name in ("model", "output-dir", "cache-dir", "pool-dir", "max-length")
    }
    values = defaults() | tomllib.loads(CONFIG.read_text()) | kept | {"num-rounds": 1}
    report = server_app.run(LocalGrid(client_app.app, values, simulated(3)), RunConfig.load(values))
    assert sorted(report["labels"]) == sorted({row["label"] for row in rows()})
    assert [client["examples"] for client in report["clients"]] == [
        85,
        84,
        84,
    ]  # 350, less 70 to test and 27 held out
    assert report["refused"] == []
    assert (Path(report["model_dir"]) / "model.safetensors").is_file()
