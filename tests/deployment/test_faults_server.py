"""The server's side dies in a run, or has no room: what it had stored is gone on with, to the same model."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployment.federation import Federation, Finished

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Observe = Callable[..., None]
ROUNDS = 3


def in_one_go(federation: Federation) -> Finished:
    """Do the same run without any fault."""
    done = federation.submit(num_rounds=ROUNDS).finish()
    assert done.status == 0, done.log
    return done


def assert_same(resumed: Finished, whole: Finished) -> None:
    assert resumed.status == 0, resumed.log
    assert resumed.clients == [2] * ROUNDS
    one, other = resumed.model(), whole.model()
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def gone_on_with(federation: Federation, fault: Callable[[], None]) -> tuple[str, float]:
    """Let `fault` befall a run of two nodes after its first round, resume it, and hold it to an undisturbed one.

    Returns what the run said last, and the seconds from the fault to the next round.
    """
    federation.node("alice")
    federation.node("bob")
    whole = in_one_go(federation)
    run = federation.submit(num_rounds=ROUNDS)
    run.wait_for(f"round 1/{ROUNDS} done")
    begin = time.monotonic()
    fault()
    assert run.finish().status == 1
    resumed = federation.resume(run)
    resumed.wait_for(f"round 2/{ROUNDS}: 2 clients")
    seconds = time.monotonic() - begin
    assert_same(resumed.finish(), whole)
    return run.text().splitlines()[-1], seconds


def test_a_server_app_killed_between_rounds_is_gone_on_with(
    federation: Federation, observe: Observe
) -> None:
    def kill_the_app() -> None:
        [app] = federation.link.descendants("flwr-serverapp")
        app.kill()

    said, seconds = gone_on_with(federation, kill_the_app)
    outcome = "goes on after the last finished round, to the same model bit for bit"
    observe("server app killed between rounds, run resumed", outcome, said, seconds)


def test_a_run_stopped_on_purpose_is_gone_on_with(federation: Federation, observe: Observe) -> None:
    federation.node("alice")
    run = federation.submit(num_rounds=ROUNDS, min_clients=1)
    run.wait_for(f"round 1/{ROUNDS} done")
    assert "online" in federation.administer("nodes")
    [known] = json.loads(federation.administer("runs", "--format", "json"))["runs"]
    federation.administer("stop", known["run-id"])
    assert run.finish().status == 1
    done = federation.resume(run).finish()
    assert done.status == 0, done.log
    assert done.clients == [1] * ROUNDS
    assert f"round 1/{ROUNDS} done" not in "".join(done.log)
    observe(
        "run stopped by the administrator, then resumed",
        "goes on after the last finished round",
        run.text().splitlines()[-1],
    )


def test_a_superlink_killed_in_a_run_and_restarted_with_its_database_goes_on(
    federation: Federation, observe: Observe
) -> None:
    def restart_the_link() -> None:
        federation.link.kill()
        federation.link = federation.start_link()

    said, seconds = gone_on_with(federation, restart_the_link)
    outcome = "nodes reconnect by themselves; the run goes on to the same model bit for bit"
    observe(
        "SuperLink killed in a run, restarted with its database, run resumed",
        outcome,
        said,
        seconds,
    )


def test_a_full_disk_under_a_snapshot_stops_the_run_and_leaves_the_one_before(
    federation: Federation,
    observe: Observe,
    small_disk: Callable[[Path, str], None],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, "8m")
    federation.node("alice")
    federation.node("bob")
    whole = in_one_go(federation)
    run = federation.submit(num_rounds=ROUNDS, output_dir=str(disk / "run"))
    run.wait_for(f"round 1/{ROUNDS} done")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    done = run.finish()
    assert done.status == 1
    assert "No space left on device" in done.log[-1]
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    assert_same(federation.resume(run).finish(), whole)
    observe(
        "disk full while writing the server's snapshot",
        "the run stops; the snapshot before is whole, and the run goes on from it once there is room",
        done.log[-1],
    )
