"""The `fedbt` command: settings, predictions, checks, and what it makes of Flower's answers."""

import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedbt_app.cli import doctor, launch, superlink
from fedbt_app.cli.doctor import examine
from fedbt_app.cli.main import _options, _parser, main, settings_of
from fedbt_app.config import APP_DIR, RunConfig, defaults
from fedbt_app.costs.ledger import Outcome
from fedbt_app.errors import FedBTError
from fedbt_app.model import checkpoint
from fedbt_app.server.snapshot import Progress, Snapshot

PLAN = ("plan", "--arch", "bert-base")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test a home of its own: no SuperLink runs there, and nothing is left in the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails and return its one line."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("fedbt: error: ")
    return line


# plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "share"),
    [
        (["--task", "mlm"], "7.04 %"),
        (["--task", "ner", "--num-labels", "13"], "20.19 %"),
        (["--task", "classification", "--num-labels", "13"], "20.62 %"),
    ],
)
def test_plan_gives_the_published_share_of_bytes(
    capsys: pytest.CaptureFixture[str], task: list[str], share: str
) -> None:
    assert main([*PLAN, *task, "--num-rounds", "10", "codec=float32"]) == 0
    assert (
        f"bytes each way with codec=float32: {share} of full-model averaging"
        in capsys.readouterr().out
    )


def test_plan_counts_the_bytes_of_the_codec(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--task", "mlm", "--num-rounds", "10", "codec=int4+zstd"]) == 0
    assert (
        "bytes each way with codec=int4+zstd before zstd: 1.00 % of full-model"
        in capsys.readouterr().out
    )


def test_plan_of_full_training_is_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "method=full", "task=mlm", "codec=float32"]) == 0
    assert "bytes each way with codec=float32: 100.00 %" in capsys.readouterr().out


def test_plan_lists_every_round_with_its_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--task", "mlm", "--num-rounds", "10", "--local-depth", "6"]) == 0
    rows = re.findall(r"^ *(\d+) +(\S.*?) \+ head +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    assert [row[1] for row in rows] == ["0", "0", "0", "0", "0", "1", "1", "1", "2", "3"]
    assert {row[2] for row in rows} == {"6"}


def test_plan_of_a_known_architecture_needs_no_model_on_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED_PACKAGE", "no_such_package_here")
    assert main(["plan", "--arch", "bert-large"]) == 0
    capsys.readouterr()
    assert "embedded model is not installed" in refusal(capsys, "plan")


def test_plan_reads_the_dimensions_of_a_model_folder(
    capsys: pytest.CaptureFixture[str], tiny_bert: Path
) -> None:
    assert main(["plan", f"model={tiny_bert}", "task=classification", "num-rounds=2"]) == 0
    output = capsys.readouterr().out
    assert "3 + head" in output
    assert "2-3 + head" in output


@pytest.mark.parametrize("option", ["--num-labels", "--examples"])
def test_plan_refuses_counts_below_one(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert option in refusal(capsys, "plan", "--arch", "bert-base", option, "0")


# Settings -----------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> dict[str, Any]:
    return settings_of(_parser().parse_args(["plan", *arguments]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('task = "mlm"\nnum-rounds = 9\nseed = 1\n')
    return path


def test_assignments_win_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    values = parsed("--config", str(file), "num-rounds=4", "--seed", "3")
    assert values == defaults() | {"task": "mlm", "num-rounds": 4, "seed": 3}


def test_no_settings_are_the_defaults() -> None:
    assert parsed() == defaults()


@pytest.mark.parametrize("name", list(defaults()))
def test_every_key_is_an_option(name: str) -> None:
    options = _parser().parse_args(["plan", f"--{name}", "x"])
    assert getattr(options, f"key:{name}") == "x"


def test_unknown_key_is_one_line_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "plan", "--arch", "bert-base", "learning_rate=1")
    assert "unknown config key 'learning_rate' (did you mean 'learning-rate'?)" in line


def test_unknown_key_in_the_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text("rounds = 3\n")
    assert "'rounds'" in refusal(capsys, "plan", "--config", str(tmp_path / "bad.toml"))


def test_word_that_is_no_assignment_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'mlm' is not KEY=VALUE" in refusal(capsys, "plan", "mlm")


def test_badly_typed_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "num-rounds must be a whole number, not 'ten'" in refusal(
        capsys, "plan", "--num-rounds", "ten"
    )


def test_missing_config_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refusal(capsys, "plan", "--config", str(tmp_path / "none.toml"))
    assert "none.toml: No such file" in line


def test_folder_as_config_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "is a directory" in refusal(capsys, "plan", "--config", str(tmp_path)).lower()


@pytest.mark.parametrize(
    "content", [b"task = mlm", b"\xff\xfe\x00", b"[[["], ids=["unquoted", "binary", "brackets"]
)
def test_config_file_that_is_no_toml_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    assert "bad.toml is not TOML" in refusal(capsys, "plan", "--config", str(tmp_path / "bad.toml"))


def test_no_clients_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--clients 0" in refusal(capsys, "run", "--clients", "0")


def test_report_of_a_folder_without_one_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "report.json does not exist" in refusal(capsys, "report", str(tmp_path))


# version, stop -----------------------------------------------------------------------------------------------


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fedbt {version('fedbt-app')}\n"


def test_stop_where_nothing_runs_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["stop"], ["stop", "--all"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == "no local SuperLink runs\n"


# doctor -------------------------------------------------------------------------------------------------------


def findings(**changes: Any) -> dict[str, tuple[bool, str]]:
    """Return by subject whether all is well, and all that is said of it."""
    values = defaults() | {name.replace("_", "-"): value for name, value in changes.items()}
    found: dict[str, tuple[bool, str]] = {}
    for one in examine(RunConfig.load(values)):
        ok, said = found.get(one.subject, (True, ""))
        found[one.subject] = (ok and one.ok, f"{said}{one.detail}\n")
    return found


def test_doctor_finds_nothing_wrong_with_a_good_set_up(
    tiny_bert: Path, site_data: Path, tmp_path: Path
) -> None:
    found = findings(
        model=str(tiny_bert),
        dataset=str(site_data),
        cache_dir=str(tmp_path / "cache"),
        device="cpu",
    )
    assert {subject: detail for subject, (ok, detail) in found.items() if not ok} == {}
    assert "4 blocks, hidden 32" in found["model"][1]
    assert "train.jsonl" in found["data"][1]


def test_doctor_names_a_broken_model_and_a_missing_data_path_each_on_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    missing = str(tmp_path / "none" / "train.jsonl")
    found = findings(
        model=str(tmp_path), dataset=missing, cache_dir=str(tmp_path / "cache"), device="cuda:77"
    )
    assert not found["model"][0]
    assert "model type" in found["model"][1]
    assert not found["data"][0]
    assert missing in found["data"][1]
    assert not found["device"][0]
    assert found["Python"][0]
    assert found["cache folder"][0]


def test_doctor_names_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = findings(cache_dir=str(tmp_path / "file" / "cache"))
    assert not found["cache folder"][0]
    assert "cache-dir" in found["cache folder"][1]


def test_doctor_exits_with_1_and_marks_what_failed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bert: Path
) -> None:
    code = main(
        [
            "doctor",
            f"model={tiny_bert}",
            f"dataset={tmp_path / 'none.csv'}",
            f"cache-dir={tmp_path / 'cache'}",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert any(line.startswith("FAIL data: no such file") for line in lines)
    assert any(line.startswith("ok   model: ") for line in lines)


def test_doctor_reads_the_requirements_of_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Installed:
        requires: ClassVar = ["psutil>=6", "pandas>=99; extra == 'dev'", "torch>=99"]

    monkeypatch.setattr(doctor, "installed", Installed)
    ok, detail = findings()["packages"]
    assert not ok
    assert detail.startswith("torch ")
    assert "pip install 'torch>=99'" in detail


# run ----------------------------------------------------------------------------------------------------------

Fake = Callable[..., Path]


@pytest.fixture
def fake_flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Return a function that puts a script in Flower's place; it notes its arguments and its run's settings."""

    def make(output: str, status: str = "finished:completed", listing: str | None = None) -> Path:
        (tmp_path / "output").write_text(output)
        answer = (
            json.dumps({"runs": [{"run-id": "77", "status": status}]})
            if listing is None
            else listing
        )
        (tmp_path / "listing").write_text(answer)
        script = tmp_path / "flwr"
        script.write_text(
            f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nenv > {tmp_path}/environment-$1\n'
            f'if [ "$1" = ls ]; then cat {tmp_path}/listing; else\n'
            'while [ $# -gt 0 ]; do if [ "$1" = --run-config ]; then cat "$2" > '
            f"{tmp_path}/run.toml; fi; shift; done\ncat {tmp_path}/output; fi\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(launch, "_flwr", lambda: str(script))
        monkeypatch.setattr(launch.local, "start", lambda: tmp_path / "flower")
        return tmp_path

    return make


STARTED = "Successfully started run 77\n"


def launched(
    tmp_path: Path,
    shown: list[str] | None = None,
    verbose: bool = False,
    superlink: str | None = None,
) -> Any:
    values = defaults() | {"output-dir": str(tmp_path / "out"), "labels": 'a "b",c\U0001f600'}
    return launch.run(values, 3, superlink, verbose, (shown if shown is not None else []).append)


def test_completed_run_gives_its_folder_and_shows_only_our_lines(fake_flwr: Fake) -> None:
    tmp_path = fake_flwr(
        STARTED + "INFO : starting\nINFO :      fedbt: round 1/2: 3 clients\nray noise\n"
    )
    shown: list[str] = []
    assert launched(tmp_path, shown) == tmp_path / "out"
    assert shown == ["round 1/2: 3 clients"]


def test_verbose_run_shows_all_lines(fake_flwr: Fake) -> None:
    tmp_path = fake_flwr(STARTED + "noise\nINFO : fedbt: round 1\n")
    shown: list[str] = []
    launched(tmp_path, shown, verbose=True)
    assert shown == [STARTED.strip(), "noise", "round 1"]


def test_run_hands_over_every_setting_and_the_number_of_clients(fake_flwr: Fake) -> None:
    import tomllib

    tmp_path = fake_flwr(STARTED)
    launched(tmp_path)
    written = tomllib.loads((tmp_path / "run.toml").read_text())
    assert written == defaults() | {
        "output-dir": str(tmp_path / "out"),
        "labels": 'a "b",c\U0001f600',
    }
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("run ")
    assert "num-supernodes=3" in first
    assert "--stream" in first
    assert second == "ls --run-id 77 --format json"
    for command in ("run", "ls"):
        seen = (tmp_path / f"environment-{command}").read_text().splitlines()
        assert f"FLWR_HOME={tmp_path / 'flower'}" in seen
        assert f"{superlink.KEEP_ENVIRONMENT}=1" in seen


@pytest.mark.parametrize(("gpus", "share"), [(0, None), (1, 0.3333), (2, 0.6666), (8, 1.0)])
def test_simulated_clients_get_their_share_of_the_gpus(
    gpus: int, share: float | None, fake_flwr: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    tmp_path = fake_flwr(STARTED)
    launched(tmp_path)
    first, _ = (tmp_path / "calls").read_text().splitlines()
    assert first.endswith(
        "num-supernodes=3 client-resources-num-cpus=1"
        + (f" client-resources-num-gpus={share}" if share is not None else "")
    )


def test_remote_run_names_the_superlink_and_gives_no_folder(
    fake_flwr: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = fake_flwr(STARTED)
    monkeypatch.setenv("FLWR_HOME", "/home/me/flower")  # where the name is looked up
    assert launched(tmp_path, superlink="clinic") is None
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert " clinic --stream" in first
    assert "num-supernodes" not in first
    assert second.startswith("ls clinic ")
    for command in ("run", "ls"):
        assert (
            "FLWR_HOME=/home/me/flower"
            in (tmp_path / f"environment-{command}").read_text().splitlines()
        )


def test_failed_run_raises_the_reason_that_the_server_gave(fake_flwr: Fake) -> None:
    output = (
        STARTED
        + "ERROR :   fedbt: error: no client can take part: disk full\nERROR : SystemExit: 1\n"
    )
    tmp_path = fake_flwr(output, status="finished:failed")
    with pytest.raises(FedBTError, match=r"^no client can take part: disk full$"):
        launched(tmp_path)


def test_failed_run_without_a_reason_names_its_status_and_how_to_go_on(fake_flwr: Fake) -> None:
    tmp_path = fake_flwr(STARTED, status="finished:failed")
    with pytest.raises(FedBTError, match="run 77 ended as finished:failed") as caught:
        launched(tmp_path)
    assert f"go on with `fedbt run --resume {tmp_path / 'out'}`" in str(caught.value)


def test_error_of_one_client_does_not_fail_a_run_that_completed(fake_flwr: Fake) -> None:
    tmp_path = fake_flwr(
        STARTED + "ERROR : fedbt: error: no space on client-2\nINFO : fedbt: done\n"
    )
    assert launched(tmp_path) == tmp_path / "out"


@pytest.mark.parametrize(
    "listing", ["", "no json", "{}", '{"runs": []}', "[]", '{"runs": [3]}', "null"]
)
def test_unreadable_status_is_a_failure(fake_flwr: Fake, listing: str) -> None:
    tmp_path = fake_flwr(STARTED, listing=listing)
    with pytest.raises(FedBTError, match="run 77 ended as unknown"):
        launched(tmp_path)


def test_run_that_did_not_start_says_why(fake_flwr: Fake) -> None:
    tmp_path = fake_flwr("╭ Error ─╮\n│ The SuperLink refused it │\n╰────────╯\n")
    with pytest.raises(FedBTError, match="Flower did not start the run: The SuperLink refused it"):
        launched(tmp_path)


def test_command_of_a_failed_run_exits_with_1_and_one_line(
    fake_flwr: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = fake_flwr(STARTED + "fedbt: error: disk full\n", status="finished:failed")
    assert "disk full" in refusal(capsys, "run", f"output-dir={tmp_path / 'out'}", "--clients", "1")


def test_run_of_one_client_does_not_wait_for_two(
    fake_flwr: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = fake_flwr(STARTED, status="finished:failed")
    main(["run", "--clients", "1", f"output-dir={tmp_path / 'out'}"])
    assert "min-clients = 1\n" in (tmp_path / "run.toml").read_text()


@pytest.fixture
def stopped(tmp_path: Path, settings: Callable[..., dict[str, Any]]) -> Path:
    """Write the snapshot of a run of 3 clients that did no round; returns its output folder."""
    config = RunConfig.load(
        settings(output_dir=str(tmp_path / "stopped"), min_clients=3, learning_rate=1.0)
    )
    progress = Progress("0" * 32, ("a", "b"), 3, "f" * 64, {}, Outcome(), [], {}, [])
    Snapshot(config.output_folder).store(config, progress)
    return config.output_folder


def test_resumed_run_has_the_settings_and_the_clients_of_the_stopped_one(
    fake_flwr: Fake, stopped: Path
) -> None:
    import tomllib

    tmp_path = fake_flwr(STARTED, status="finished:failed")
    main(
        [
            "run",
            "--resume",
            str(stopped),
            "learning-rate=1",
            "round-timeout=9",
            "--min-clients",
            "2",
        ]
    )
    expected = Snapshot(stopped).settings | {
        "resume": str(stopped),
        "round-timeout": 9.0,
        "min-clients": 2,
    }
    assert tomllib.loads((tmp_path / "run.toml").read_text()) == expected
    assert "num-supernodes=3" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["num-rounds=9"],
            "num-rounds=9 but the run in .*stopped has num-rounds=2: drop num-rounds",
        ),
        (["output-dir=elsewhere"], "output-dir=/.*/elsewhere but"),
        (["--clients", "4"], "--clients 4 but the run in .*stopped has 3: drop --clients"),
        (["num_rounds=2"], "unknown config key 'num_rounds'"),
    ],
)
def test_setting_that_contradicts_the_stopped_run_is_one_line(
    capsys: pytest.CaptureFixture[str], stopped: Path, arguments: list[str], named: str
) -> None:
    assert re.search(named, refusal(capsys, "run", "--resume", str(stopped), *arguments))


def test_resuming_where_no_run_was_stopped_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "holds no stopped run" in refusal(capsys, "run", f"resume={tmp_path}")


def test_remote_run_is_resumed_by_the_settings_given(
    fake_flwr: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = fake_flwr(STARTED)
    assert main(["run", "--superlink", "clinic", "--resume", "/srv/run1", "num-rounds=9"]) == 0
    assert 'resume = "/srv/run1"\n' in (tmp_path / "run.toml").read_text()
    assert "in /srv/run1 on the SuperLink's machine" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_stops_the_run_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "flwr"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nif [ "$1" = run ]; then echo "{STARTED}"; echo "fedbt: round 1"; '
        "exec sleep 100; fi\n"
    )
    script.chmod(0o755)
    start = (
        "import sys; from pathlib import Path; from fedbt_app.cli import launch, main; "
        f"launch.local.start = lambda: Path('{tmp_path}'); launch._flwr = lambda: '{script}'; "
        f"sys.exit(main.main(['run', 'output-dir={tmp_path}/out']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start],
        cwd=APP_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # tests in the background ignore interrupts
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "round 1\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert f"go on with `fedbt run --resume {tmp_path}/out`" in line
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "stop 77"


def test_missing_flwr_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "_flwr", lambda: str(tmp_path / "no-flwr"))
    monkeypatch.setattr(launch.local, "start", lambda: tmp_path)
    assert "flwr" in refusal(capsys, "run", f"output-dir={tmp_path / 'out'}")


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "train.csv").touch()
    values = defaults() | {
        "model": "mine",
        "dataset": "train.csv",
        "output-dir": "out",
        "cache-dir": "",
        "pool-dir": "~/p",
    }
    resolved = launch.absolute_paths(values, tmp_path)
    assert resolved["model"] == str(tmp_path / "mine")
    assert resolved["dataset"] == str(tmp_path / "train.csv")
    assert resolved["output-dir"] == str(tmp_path / "out")
    assert resolved["cache-dir"] == ""
    assert resolved["pool-dir"] == str(Path.home() / "p")
    assert {name: resolved[name] for name in ("task", "reference")} == {
        "task": "classification",
        "reference": "",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("model", "embedded"),
            ("model", "bert-base-uncased"),
            ("model", "google-bert/bert-base-uncased"),
        ),
        *(("dataset", "embedded"), ("dataset", "none"), ("dataset", "org/data")),
    ],
)
def test_hub_ids_and_special_names_are_no_paths(tmp_path: Path, key: str, value: str) -> None:
    assert launch.absolute_paths(defaults() | {key: value}, tmp_path)[key] == value


def test_missing_relative_path_is_resolved_where_it_can_be_nothing_else(tmp_path: Path) -> None:
    values = defaults() | {"model": "./none", "dataset": "../none"}
    resolved = launch.absolute_paths(values, tmp_path)
    assert resolved["model"] == str(tmp_path / "none")
    assert resolved["dataset"] == str(tmp_path.parent / "none")


def test_settings_and_options_stand_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    options = _options(
        ["run", "num-rounds=1", "--clients", "2", "output-dir=x", "--verbose", "seed=3"]
    )
    assert options.settings == ["num-rounds=1", "output-dir=x", "seed=3"]
    assert (options.clients, options.verbose) == (2, True)
    for wrong in (["run", "--clients", "2", "--nonsense"], ["report", "a", "b=c", "--x"]):
        with pytest.raises(SystemExit):
            _options(wrong)
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
