from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbt_app.config import PARTITIONERS as OFFERED
from fedbt_app.config import RunConfig, defaults
from fedbt_app.data.partition import (
    MIN_ROWS,
    PARTITIONERS,
    dirichlet,
    iid,
    natural,
    partition,
    size_skewed,
)
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.ner import first_entity

BASE = defaults()


def config(**values: Any) -> RunConfig:
    return RunConfig.load(BASE | {name.replace("_", "-"): value for name, value in values.items()})


def test_the_setting_offers_what_there_is() -> None:
    assert tuple(PARTITIONERS) == OFFERED


def assert_every_row_once(parts: list[Any], rows: int) -> None:
    assert sorted(int(row) for part in parts for row in part) == list(range(rows))
    assert all(np.all(np.diff(part) > 0) for part in parts)


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(rows=st.integers(1, 300), clients=st.integers(1, 20), seed=st.integers(0, 9))
def test_iid_parts_differ_by_at_most_one_row(rows: int, clients: int, seed: int) -> None:
    parts = iid(rows, clients, seed)
    assert_every_row_once(parts, rows)
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1
    assert same(parts, iid(rows, clients, seed))


@given(
    rows=st.integers(0, 500),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_sizes_follow_the_weights(rows: int, weights: list[float], seed: int) -> None:
    parts = size_skewed(rows, weights, seed)
    assert_every_row_once(parts, rows)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(len(part) - rows * weight / sum(weights)) < 1 + 1e-6
    assert same(parts, size_skewed(rows, weights, seed))


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=60, max_size=200),
    clients=st.integers(1, 5),
    alpha=st.floats(1, 50),
    seed=st.integers(0, 9),
)
def test_dirichlet_uses_every_row_once(
    labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(labels, clients, alpha, seed)
    assert_every_row_once(parts, len(labels))
    assert min(len(part) for part in parts) >= MIN_ROWS
    assert same(parts, dirichlet(labels, clients, alpha, seed))


def test_smaller_alpha_is_more_skewed() -> None:
    labels = [str(number % 8) for number in range(4000)]

    def largest_share(alpha: float) -> float:
        found = []
        for part in dirichlet(labels, 4, alpha, 3):
            counts = Counter(labels[row] for row in part)
            found.append(max(counts.values()) / counts.total())
        return float(np.mean(found))

    assert largest_share(0.1) > largest_share(1.0) + 0.1 > largest_share(1000.0) + 0.1
    assert largest_share(1000.0) < 0.16


def test_another_seed_is_another_split() -> None:
    labels = [str(number % 8) for number in range(400)]
    assert not same(dirichlet(labels, 4, 1.0, 1), dirichlet(labels, 4, 1.0, 2))
    assert not same(iid(400, 4, 1), iid(400, 4, 2))


def test_dirichlet_draws_again_until_no_client_goes_short(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["a"] * 50 + ["b"] * 50
    assert (
        min(len(part) for seed in range(20) for part in dirichlet(labels, 4, 0.3, seed)) >= MIN_ROWS
    )
    monkeypatch.setattr("fedbt_app.data.partition.DRAWS", 1)
    with pytest.raises(FedBTError, match="fewer than 2 rows"):
        [dirichlet(labels, 4, 0.3, seed) for seed in range(20)]


def test_dirichlet_gives_up_when_clients_must_go_short() -> None:
    with pytest.raises(
        FedBTError, match=r"raise dirichlet-alpha .*fewer clients or partitioner=iid"
    ):
        dirichlet(["a"] * 50 + ["b"] * 50, 5, 0.001, 0)


@given(sites=st.lists(st.integers(0, 12), min_size=1, max_size=120), clients=st.integers(1, 13))
def test_natural_keeps_sites_whole(sites: list[int], clients: int) -> None:
    distinct = len(set(sites))
    if distinct < clients:
        with pytest.raises(
            FedBTError, match=f"{distinct} distinct values, too few for {clients} clients"
        ):
            natural(sites, clients)
        return
    parts = natural(sites, clients)
    assert_every_row_once(parts, len(sites))
    homes = [{sites[row] for row in part} for part in parts]
    assert all(homes)
    assert sum(map(len, homes)) == distinct


def test_natural_gives_each_client_one_site_in_sorted_order() -> None:
    assert [part.tolist() for part in natural(["b", "a", "b", "c"], 3)] == [[1], [0, 2], [3]]


def test_natural_balances_when_sites_outnumber_clients() -> None:
    sites = ["a"] * 10 + ["b"] * 6 + ["c"] * 5 + ["d"] * 1
    assert sorted(len(part) for part in natural(sites, 2)) == [11, 11]


def test_config_chooses_the_partitioner() -> None:
    columns = {"label": ["x", "y"] * 30, "site": ["n", "s", "s"] * 20}

    def sizes(**values: Any) -> list[int]:
        return [len(part) for part in partition(config(**values), 60, columns, 2)]

    assert sizes(partitioner="iid") == [30, 30]
    assert sizes(partitioner="size-skewed", partition_weights="1,5") == [10, 50]
    assert sizes(partitioner="natural", partition_column="site") == [20, 40]
    skewed = partition(config(partitioner="dirichlet", seed=5), 60, columns, 2)
    assert same(skewed, dirichlet(columns["label"], 2, 0.5, 5))


def test_ner_is_skewed_by_entity_type_without_a_label_column() -> None:
    tags = [["O", "B-Gene", "B-Cell"], ["B-Cell", "I-Cell"], ["O"]] * 40
    assert [first_entity(row) for row in tags[:3]] == ["Gene", "Cell", "O"]
    parts = partition(config(task="ner"), 120, {"ner_tags": tags}, 2)
    assert same(parts, dirichlet(["Gene", "Cell", "O"] * 40, 2, 0.5, 7))
    labelled = partition(config(task="ner"), 120, {"ner_tags": tags, "label": ["p", "q"] * 60}, 2)
    assert same(labelled, dirichlet(["p", "q"] * 60, 2, 0.5, 7))


def test_impossible_splits_say_what_to_set() -> None:
    columns = {"gaps": ["north", *[None] * 8, " "]}
    natural_by, skewed = ({"partitioner": name} for name in ("natural", "size-skewed"))
    for values, clients, message in (
        ({}, 2, "needs the column 'label'.*set label-column, or partitioner=iid"),
        ({"partitioner": "iid"}, 11, "10 training rows are too few for 11 clients"),
        ({"partitioner": "iid"}, 0, "use at least one"),
        (
            natural_by | {"partition_column": "ward"},
            2,
            "partition-column 'ward' is not in the data",
        ),
        (natural_by | {"partition_column": "gaps"}, 2, "'gaps' is empty in 9 rows"),
        (skewed | {"partition_weights": "1,2,3"}, 2, "3 weights for 2 clients"),
        (skewed | {"partition_weights": "1,x"}, 2, "must be positive numbers"),
        (skewed | {"partition_weights": "1,0"}, 2, "must be positive numbers"),
        (skewed | {"partition_weights": "1,1e9"}, 2, "leaves client 0 of 2 without rows: use"),
    ):
        with pytest.raises(FedBTError, match=message) as caught:
            partition(config(**values), 10, columns, clients)
        assert "\n" not in str(caught.value)
