"""What a site keeps on disk goes bad: pools damaged or without room, data replaced, runs one after the other."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deployment.federation import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Observe = Callable[..., None]


def test_a_damaged_pool_is_sent_again(
    federation: Federation, observe: Observe, many_rows: Path
) -> None:
    federation.node("alice", data=many_rows)
    bob = federation.node("bob")
    run = federation.submit(num_rounds=3)
    run.wait_for("round 2/3: bob: loss")  # alice still trains
    parts = list(bob.pools.rglob("*.safetensors"))
    assert parts
    for part in parts:
        part.write_bytes(part.read_bytes()[:-100] + bytes(100))
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [2, 2, 2]
    assert done.refused == []
    observe(
        "corrupt pool",
        "sent again in the same round; nothing is lost",
        done.line("round 3:", "bob"),
    )


def test_a_full_disk_under_the_pool_costs_rounds_until_there_is_room(
    federation: Federation,
    observe: Observe,
    many_rows: Path,
    small_disk: Callable[[Path, str], None],
) -> None:
    pools = federation.folder / "bob" / "pools"
    small_disk(pools, "16k")  # no part of the model fits
    federation.node("alice", data=many_rows)
    bob = federation.node("bob")
    run = federation.submit(num_rounds=3, prefix_cache_gb=0.0)
    run.wait_for("round 2: bob is left out")
    assert not list(pools.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=16m", pools], check=True)
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [2, 1, 2]
    assert done.refused == [(2, "bob")]
    line = done.line("round 2:", "bob")
    assert "No space left on device" in line
    assert bob.process.is_running()
    observe(
        "disk full while writing the pool",
        "left out until there is room; no half-written file",
        line,
    )


def test_replaced_data_is_read_anew_and_broken_data_costs_its_round(
    federation: Federation, observe: Observe, many_rows: Path, site_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    rows = (site_data / "train.jsonl").read_text().splitlines(keepends=True)
    (own / "train.jsonl").write_text("".join(rows))
    federation.node("alice", data=many_rows)
    federation.node("bob", data=own)
    run = federation.submit(num_rounds=3)
    run.wait_for("round 1/3: bob: loss")  # alice still trains
    (own / "train.jsonl").write_text("".join(rows)[:-20])
    run.wait_for("round 2: bob is left out")
    (own / "train.jsonl").write_text("".join(rows[:60]))
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [2, 1, 2]
    assert done.refused == [(2, "bob")]
    assert "108 examples" in done.line("round 1/3: bob")
    assert "54 examples" in done.line("round 3/3: bob")
    line = done.line("round 2:", "bob")
    observe(
        "data file replaced between rounds",
        "new rows count from the next message; broken ones are refused",
        line,
    )


def test_two_runs_on_the_same_nodes_do_not_mix(federation: Federation, observe: Observe) -> None:
    nodes = [federation.node("alice"), federation.node("bob")]
    first, second = (federation.submit(num_rounds=2).finish() for _ in range(2))
    for done in (first, second):
        assert done.status == 0, done.log
        assert done.clients == [2, 2]
    for node in nodes:
        assert len(list(node.pools.iterdir())) == 2
    assert first.report is not None
    assert second.report is not None
    for name in ("uplink_payload_bytes", "downlink_payload_bytes", "catch_up_bytes", "train_flops"):
        assert first.report["cost"][name] == second.report["cost"][name]
    models = first.model(), second.model()
    assert all(models[0][name].equal(models[1][name]) for name in models[0])
    outcome = "a pool each; the same seeds give the same model, bit for bit"
    observe("two runs one after the other on the same nodes", outcome)
