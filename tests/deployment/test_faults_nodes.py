"""Nodes that die, come back, or are too slow, while a run goes on."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployment.federation import Federation, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Observe = Callable[..., None]


def test_a_client_app_killed_in_training_costs_its_round_and_no_more(
    federation: Federation, observe: Observe, many_rows: Path
) -> None:
    federation.node("alice")
    bob = federation.node("bob", data=many_rows)
    run = federation.submit(num_rounds=2)
    bob.training().kill()
    killed = time.monotonic()
    run.wait_for("round 1/2 done")
    seconds = time.monotonic() - killed
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [1, 2]
    assert done.refused == [(1, "bob")]
    line = done.line("round 1:", "bob")
    observe(
        "client app killed in training",
        "the round counts the others; it takes part in the next",
        line,
        seconds,
    )


@pytest.mark.parametrize("keeps_state", [True, False], ids=["with its state", "without its state"])
def test_a_node_killed_in_a_round_comes_back(
    federation: Federation, observe: Observe, many_rows: Path, keeps_state: bool
) -> None:
    federation.node("alice")
    bob = federation.node("bob", data=many_rows)
    run = federation.submit(num_rounds=5)
    run.wait_for("round 2/5: 2 clients")
    bob.app()
    bob.kill()
    killed = time.monotonic()
    if not keeps_state:
        shutil.rmtree(bob.state)
    bob.restart()
    eventually("bob to take part again", lambda: run.text().count("bob: loss") > 1)
    seconds = time.monotonic() - killed
    done = run.finish(600)
    assert done.status == 0, done.log
    assert done.clients[:2] == [2, 1]
    assert done.clients[-1] == 2
    assert done.refused[0] == (2, "bob")
    assert done.report is not None
    caught_up = done.report["cost"]["catch_up_bytes"]
    assert caught_up > 0
    kept = "with" if keeps_state else "without"
    observe(
        f"node killed and restarted {kept} its state folder",
        f"let in again once the SuperLink takes it for dead; {caught_up / 1e3:.0f} kB of the model sent to catch up",
        done.line("round 2:", "bob"),
        seconds,
    )


def test_a_node_too_slow_misses_the_round_and_its_late_reply_is_ignored(
    federation: Federation, observe: Observe, many_rows: Path
) -> None:
    federation.node("alice")
    bob = federation.node("bob", data=many_rows)
    run = federation.submit(num_rounds=2, round_timeout=55.0)
    app = bob.training()
    app.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait_for("round 1/2 done")
    seconds = time.monotonic() - stopped
    app.send_signal(signal.SIGCONT)
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [1, 2]
    assert done.refused == [(1, "bob")]
    line = done.line("round 1:", "bob")
    assert "round-timeout" in line
    first, second = (
        [line for line in done.log if f"round {n}/2: bob: loss" in line] for n in (1, 2)
    )
    assert (len(first), len(second)) == (0, 1)
    observe(
        "node too slow (round-timeout=55)",
        "the round ends without it, its late reply is dropped",
        line,
        seconds,
    )


def test_a_superlink_restarted_between_runs_finds_its_nodes_again(
    federation: Federation, observe: Observe
) -> None:
    federation.node("alice")
    federation.node("bob")
    assert federation.submit(num_rounds=1).finish().status == 0
    federation.link.kill()
    begin = time.monotonic()
    federation.link = federation.start_link()
    run = federation.submit(num_rounds=1)
    run.wait_for("round 1/1: 2 clients")
    seconds = time.monotonic() - begin
    done = run.finish()
    assert done.status == 0, done.log
    assert done.clients == [2]
    observe(
        "SuperLink killed and restarted between runs",
        "nodes reconnect by themselves",
        seconds=seconds,
    )
