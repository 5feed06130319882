"""Config keys: defaults, types, bounds, contradictions, and what a node may say for itself."""

import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.config import APP_DIR, RunConfig, defaults, parse_assignment
from fedbt_app.errors import FedBTError

SHIPPED = sorted((APP_DIR / "conf").glob("*.toml"))


def refused(**changes: Any) -> str:
    """Return the one line with which these settings are refused."""
    with pytest.raises(FedBTError) as raised:
        RunConfig.load(
            defaults() | {name.replace("_", "-"): value for name, value in changes.items()}
        )
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_table_of_pyproject_is_what_the_fields_say() -> None:
    project = tomllib.loads((APP_DIR / "pyproject.toml").read_text(encoding="utf-8"))
    table = project["tool"]["flwr"]["app"]["config"]
    assert [(name, type(value), value) for name, value in table.items()] == [
        (name, type(value), value) for name, value in defaults().items()
    ]


def test_defaults_are_those_of_a_run_without_settings() -> None:
    assert RunConfig() == RunConfig.load(defaults())
    assert RunConfig().values() == defaults()


def test_defaults_load_with_their_own_values() -> None:
    config = RunConfig.load(defaults())
    for name, value in defaults().items():
        loaded = getattr(config, name.replace("-", "_"))
        assert (type(loaded), loaded) == (type(value), value), name


def test_every_key_has_a_text() -> None:
    assert [spec.name for spec in fields(RunConfig) if len(spec.metadata["doc"]) < 10] == []


def test_configurations_are_shipped() -> None:
    assert len(SHIPPED) > 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_loads_and_changes_something(path: Path) -> None:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    RunConfig.load(defaults() | values)
    assert any(defaults()[name] != value for name, value in values.items())


def test_shipped_configurations_write_to_folders_of_their_own() -> None:
    folders = [tomllib.loads(path.read_text(encoding="utf-8"))["output-dir"] for path in SHIPPED]
    assert len(set(folders)) == len(folders)


def test_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    message = refused(num_round=3)
    assert "'num-round'" in message
    assert "did you mean 'num-rounds'?" in message


def test_unknown_key_like_no_other_is_refused_without_a_suggestion() -> None:
    message = refused(zzz=1)
    assert "'zzz'" in message
    assert "did you mean" not in message


def test_field_name_instead_of_key_is_refused() -> None:
    with pytest.raises(FedBTError, match=r"'num_rounds' \(did you mean 'num-rounds'\?\)"):
        RunConfig.load(defaults() | {"num_rounds": 3})


@pytest.mark.parametrize("name", list(defaults()))
def test_missing_key_is_named(name: str) -> None:
    values = defaults()
    del values[name]
    with pytest.raises(FedBTError, match=f"'{name}' is missing"):
        RunConfig.load(values)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num-rounds", "ten", "a whole number"),
        ("num-rounds", 2.0, "a whole number"),
        ("num-rounds", True, "a whole number"),
        ("learning-rate", "1e-4", "a number"),
        ("learning-rate", False, "a number"),
        ("task", True, "text"),
        ("labels", ["a", "b"], "text"),
        ("labels", None, "text"),
    ],
)
def test_badly_typed_value_is_named_with_what_it_must_be(name: str, value: Any, words: str) -> None:
    assert refused(**{name: value}).startswith(f"{name} must be {words}, not {value!r}")


@pytest.mark.parametrize(
    ("decay", "rates"), [("none", [0.2, 0.2, 0.2, 0.2]), ("linear", [0.2, 0.15, 0.1, 0.05])]
)
def test_the_step_size_of_each_round(decay: str, rates: list[float]) -> None:
    config = RunConfig.load(
        defaults() | {"learning-rate": 0.2, "learning-rate-decay": decay, "num-rounds": 4}
    )
    assert [config.learning_rate_in(round_) for round_ in range(4)] == pytest.approx(rates)


def test_whole_numbers_serve_as_numbers_and_as_text() -> None:
    config = RunConfig.load(defaults() | {"learning-rate": 1, "labels": 7})
    assert (config.learning_rate, type(config.learning_rate)) == (1.0, float)
    assert config.labels == "7"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("num-rounds", 0),
            ("local-epochs", 0),
            ("batch-size", -1),
            ("local-depth", -1),
            ("seed", -1),
        ),
        *(("max-length", 7), ("max-length", 513), ("heldout-fraction", 0.95), ("dropout", 1.0)),
        *(
            ("participation", 0.0),
            ("participation", 1.01),
            ("mask-probability", 0.0),
            ("learning-rate", -1e-9),
        ),
        *(("dirichlet-alpha", 0.0), ("min-clients", 0), ("lora-rank", 0), ("round-timeout", 0.0)),
    ],
)
def test_value_out_of_bounds_is_refused_by_key_and_bound(name: str, value: Any) -> None:
    assert refused(**{name: value}).startswith(f"{name}={value} is too ")


@pytest.mark.parametrize(
    "name", [name for name, value in defaults().items() if type(value) is float]
)
def test_not_a_number_is_refused(name: str) -> None:
    assert refused(**{name: math.nan}).startswith(f"{name}=nan")


@pytest.mark.parametrize("name", ["learning-rate", "weight-decay", "lora-alpha"])
def test_infinity_is_refused_where_it_would_destroy_the_model(name: str) -> None:
    assert refused(**{name: math.inf}).startswith(f"{name}=inf")


@pytest.mark.parametrize("name", ["task", "method", "partitioner", "client-evaluation"])
def test_value_outside_the_choices_is_refused_with_the_choices(name: str) -> None:
    message = refused(**{name: "fedbert"})
    assert message.startswith(f"{name}=fedbert is not one of ")
    assert defaults()[name] in message


def test_unknown_codec_is_refused_before_anything_starts() -> None:
    assert "codec" in refused(codec="int3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"partitioner": "natural"}, "partition-column"),
        ({"partitioner": "iid", "partition_column": "site"}, "partition-column"),
        ({"partitioner": "size-skewed"}, "partition-weights"),
        ({"partitioner": "iid", "partition_weights": "1,2"}, "partition-weights"),
        ({"task": "mlm", "labels": "a,b"}, "labels"),
        ({"method": "full", "local_depth": 3}, "local-depth"),
        ({"method": "head", "local_depth": 3}, "local-depth"),
        ({"method": "lora", "local_depth": 3}, "local-depth"),
        ({"model": " "}, "model"),
        ({"dataset": ""}, "dataset"),
        ({"output_dir": ""}, "output-dir"),
        ({"min_replies": 3, "min_clients": 2}, "min-clients"),
    ],
)
def test_contradictory_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    assert named in refused(**changes)


@pytest.mark.parametrize("labels", ["a,a", "a, b,a"])
def test_label_given_twice_is_refused(labels: str) -> None:
    assert "labels" in refused(labels=labels)


def test_label_names_are_split_at_commas_in_order() -> None:
    assert RunConfig.load(defaults() | {"labels": " b, a ,,c"}).label_names == ("b", "a", "c")
    assert RunConfig.load(defaults()).label_names == ()


def test_own_settings_of_a_node_win() -> None:
    config = RunConfig.load(defaults() | {"method": "fedbt"})
    own = config.with_node(
        {
            **{
                "data-path": "/data/site",
                "model-path": "/models/bert",
                "local-depth": 3,
                "device": "cpu",
            },
            **{
                "cache-dir": "/var/cache",
                "pool-dir": "/var/pools",
                "text-column": "note",
                "tags-column": "bio",
            },
        }
    )
    assert (own.dataset, own.model, own.local_depth, own.device) == (
        "/data/site",
        "/models/bert",
        3,
        "cpu",
    )
    assert (own.cache_folder, own.pool_folder) == (Path("/var/cache"), Path("/var/pools"))
    assert (own.text_column, own.tags_column, own.label_column) == (
        "note",
        "bio",
        config.label_column,
    )
    assert own.num_rounds == config.num_rounds


def test_node_without_settings_of_its_own_has_the_runs() -> None:
    config = RunConfig.load(defaults())
    assert config.with_node({"partition-id": 0, "num-partitions": 2, "name": "clinic"}) == config


@pytest.mark.parametrize("value", ["three", -1, 2.5, True])
def test_bad_setting_of_a_node_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(FedBTError, match="local-depth"):
        RunConfig.load(defaults()).with_node({"local-depth": value})


def test_a_resumed_run_stays_in_its_folder() -> None:
    assert RunConfig.load(defaults() | {"output-dir": "a"}).output_folder == Path("a")
    assert (
        RunConfig.load(defaults() | {"output-dir": "a", "resume": "~/b"}).output_folder
        == Path.home() / "b"
    )


def test_pools_lie_in_the_cache_folder_by_default() -> None:
    config = RunConfig.load(defaults() | {"cache-dir": "~/elsewhere"})
    assert config.cache_folder == Path.home() / "elsewhere"
    assert config.pool_folder == Path.home() / "elsewhere" / "pools"


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("num-rounds=10", ("num-rounds", 10)),
        ("learning-rate=5e-5", ("learning-rate", 5e-5)),
        ("task=mlm", ("task", "mlm")),
        ('task="mlm"', ("task", "mlm")),
        (" seed =3", ("seed", 3)),
        ("labels=a,b", ("labels", "a,b")),
        ("labels=", ("labels", "")),
        ("labels=[1, 2]", ("labels", "[1, 2]")),
        ("dataset=a=b", ("dataset", "a=b")),
        ("dataset=2020-01-01", ("dataset", "2020-01-01")),
    ],
)
def test_assignment_is_read_as_toml_or_else_as_text(text: str, pair: tuple[str, Any]) -> None:
    assert parse_assignment(text) == pair


@pytest.mark.parametrize("text", ["num-rounds", "=3", " =3", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(FedBTError, match="not KEY=VALUE"):
        parse_assignment(text)


def test_a_schedule_for_a_method_without_one_is_refused() -> None:
    for method in ("full", "head", "lora"):
        assert "schedule is set" in refused(method=method, schedule="-1", local_depth=0)
        assert "schedule is set" in refused(method=method, schedule="paper", local_depth=0)
    RunConfig.load(defaults() | {"method": "fedbt-lora", "schedule": "-1"})
