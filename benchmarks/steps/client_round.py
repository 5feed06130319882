"""One client's whole round in a fresh process: seconds from its start to the encoded delta."""

import secrets
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps.variants import SETTINGS, train_round
from benchmarks.workload import BATCH, LENGTH, Setting, random_rows
from fedbt_app.client.client import synchronise
from fedbt_app.client.pool import ParameterPool
from fedbt_app.codec.feedback import encode_with_feedback
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import Weights, new_tensors
from fedbt_app.parts import HEAD
from fedbt_app.plan import RoundPlan, full_plan
from fedbt_app.server.state import GlobalState
from fedbt_app.training import train
from fedbt_app.wire.messages import Request, Sync

STEPS = 16
PHASES = ("import", "sync", "load", "train", "encode_float32", "encode_int4")


def measure(
    setting: Setting, method: str, local_depth: int, scratch: Path, began: float
) -> dict[str, float]:
    """Measure a later round of a run: the server's last delta is new, the prefix cache is filled.

    Parameters
    ----------
    began : when this process was started, by `time.time()`

    Returns
    -------
    dict
        Seconds of each of PHASES, and their `total` with float32 deltas.
    """
    from transformers import BertForMaskedLM  # noqa: F401 (the lazy import that building a model waits for)

    seconds = {"import": time.time() - began}
    if method == "full":
        plan = full_plan(setting.arch.depth)
    else:
        plan = _typical(setting, local_depth)
    pool = ParameterPool(scratch / "pool", secrets.token_hex(16), "client")
    rows = random_rows([LENGTH] * STEPS * BATCH)
    request = _request(setting, plan, pool)
    if method != "full":  # the run's first round has filled the cache
        train_round(setting, plan, rows, scratch / "prefix")

    clock = _Clock(seconds)
    weights = Weights(Checkpoint(setting.folder), pool.tensors, setting.weights.spec)
    held = synchronise(pool, weights, request)
    assert held == request.sync.expected, "the pool did not take the update"
    clock.stop("sync")
    local = build(weights, plan, bfloat16=setting.bfloat16)
    cache = None
    if method != "full":
        cache = setting.open_cache(scratch / "prefix", rows)
    clock.stop("load")
    train.run(local, rows, setting.collator, SETTINGS, FlopMeter(), cache)
    if cache:
        cache.close()
    clock.stop("train")
    for codec in ("float32", "int4"):
        _encode(local, weights, pool, codec)
        clock.stop(f"encode_{codec}")
    seconds["total"] = sum(seconds[phase] for phase in PHASES if phase != "encode_int4")
    return seconds


def _encode(local: LocalModel, weights: Weights, pool: ParameterPool, codec: str) -> None:
    for part, tensors in local.deltas(weights):
        _, _, dropped = encode_with_feedback(tensors, pool.residual(part), codec)
        pool.store_residual(part, dropped)


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now


def _typical(setting: Setting, local_depth: int) -> RoundPlan:
    """Return the plan of the schedule whose step costs nearest to the mean."""
    shape = StepShape(BATCH, LENGTH, 1)
    plans = setting.schedule(local_depth)
    costs = [setting.costs.step_flops(plan, shape) for plan in plans]
    mean = sum(costs) / len(costs)
    distances = [abs(cost - mean) for cost in costs]
    nearest = distances.index(min(distances))
    return plans[nearest]


def _request(setting: Setting, plan: RoundPlan, pool: ParameterPool) -> Request:
    """Play the server: bring the pool to before the round's delta; return what sends that."""
    weights = setting.weights
    checkpoint = weights.checkpoint
    state = GlobalState(checkpoint)
    lacking = weights.lacking(HEAD)
    if lacking:
        state.introduce(HEAD, new_tensors(lacking, seed=1))
    first_sync = Sync("", state.updates_for({}), state.states())
    at_client = Weights(checkpoint, pool.tensors, weights.spec)
    held = synchronise(pool, at_client, Request(first_sync, setting.labels))
    shapes: dict[str, Any] = {}
    for part in plan.trained_parts:
        shapes |= weights.shapes(part)
    state.apply({name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()})
    sync = Sync("", state.updates_for(held), state.states())
    return Request(sync, setting.labels, plan)
