"""The frozen-prefix cache."""

import dataclasses
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import local_model, plan_of

from fedbt_app.costs.cost_model import CostModel
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading
from fedbt_app.tasks.batch import Collator, special_tokens
from fedbt_app.training import prefix_cache, train
from fedbt_app.training.optimizer import TrainSettings
from fedbt_app.training.prefix_cache import FrozenBlocks, PrefixCache

LABELS = ("B-x", "I-x", "O")
SETTINGS = TrainSettings(2, 4, 1e-3, 0.01, seed=(1,))


@pytest.fixture
def checkpoint(tiny_bert: Path) -> Checkpoint:
    return Checkpoint(tiny_bert)


@pytest.fixture
def rows() -> list[dict[str, object]]:
    generator = np.random.default_rng(1)
    sizes = generator.integers(3, 20, 10)
    ids = [[2, *map(int, generator.integers(5, 40, size)), 3] for size in sizes]
    return [
        {"input_ids": one, "label": "O", "tags": ["", *["O"] * (len(one) - 2), ""]} for one in ids
    ]


def model(checkpoint: Checkpoint, task: str, method: str = "fedbt") -> LocalModel:
    return local_model(checkpoint.folder, task, plan_of(method, task, rounds=2), labels=LABELS)


def reading(checkpoint: Checkpoint) -> Reading:
    return Reading(special_tokens(checkpoint.tokenizer()), LABELS)


def collator(checkpoint: Checkpoint, task: str) -> Collator:
    return Collator(TASKS[task], reading(checkpoint))


def opened(
    root: Path,
    rows: list[dict[str, object]],
    depth: int = 2,
    base: str = "base",
    budget: int = 10**9,
) -> PrefixCache:
    cache = PrefixCache.open(root, FrozenBlocks(base, depth, 32), rows, budget)
    assert cache is not None
    return cache


def test_gradients_from_cached_states_equal_those_of_the_whole_step(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    for task, (method, depth) in product(("classification", "ner"), (("fedbt", 2), ("head", 4))):
        local, cache = model(checkpoint, task, method), opened(tmp_path, rows, depth)
        for batch in train.batches(rows, collator(checkpoint, task), 4, np.random.default_rng(0)):
            forward.loss(local, batch).backward()
            whole = {
                name: value.grad.clone()
                for name, value in local.trained.items()
                if value.grad is not None
            }
            local.module.zero_grad()
            cache.write(batch, forward.prefix(local, batch, depth).states)
            states = cache.read(batch)
            assert states is not None
            forward.loss(local, batch, forward.Prefix(depth, states)).backward()
            for name, value in local.trained.items():
                torch.testing.assert_close(value.grad, whole[name], rtol=1e-5, atol=1e-6)
            local.module.zero_grad()


def test_training_with_a_cold_a_warm_and_no_cache_gives_the_same_weights(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    costs = CostModel(checkpoint.architecture, TASKS["classification"], len(LABELS))
    trained, flops = [], []
    for use in ("none", "cold", "warm"):
        local, meter = model(checkpoint, "classification"), FlopMeter()
        cache = None if use == "none" else opened(tmp_path, rows)
        result = train.run(
            local, rows, collator(checkpoint, "classification"), SETTINGS, meter, cache
        )
        if cache:
            cache.close()
        trained.append(local.snapshot())
        flops.append(
            meter.total + sum(costs.prefix_flops(2, size, length) for size, length in result.cached)
        )
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=1e-6)
        assert torch.equal(trained[2][name], trained[1][name])
    assert flops[0] == flops[1] == flops[2], (
        "what a run did and what it saved are together the whole step"
    )


def test_another_base_depth_or_text_is_another_cache(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    local, fill = model(checkpoint, "classification"), opened(tmp_path, rows)
    [batch] = train.batches(
        rows, collator(checkpoint, "classification"), 10, np.random.default_rng(0)
    )
    fill.write(batch, forward.prefix(local, batch, 2).states)
    fill.close()
    assert opened(tmp_path, rows).read(batch) is not None
    changed = [rows[0] | {"input_ids": [2, 9, 9, 3]}, *rows[1:]]
    for other in (
        opened(tmp_path, rows, depth=1),
        opened(tmp_path, rows, base="b"),
        opened(tmp_path, changed),
    ):
        assert (
            other.read(dataclasses.replace(batch, rows=(1,), input_ids=batch.input_ids[:1])) is None
        )


def test_over_the_budget_there_is_no_cache(rows: list[dict[str, object]], tmp_path: Path) -> None:
    needed = opened(tmp_path, rows).nbytes
    assert needed == sum(len(row["input_ids"]) for row in rows) * 32 * 4  # type: ignore[arg-type]
    assert PrefixCache.open(tmp_path, FrozenBlocks("base", 2, 32), rows, needed - 1) is None
    assert PrefixCache.open(tmp_path, FrozenBlocks("base", 0, 32), rows, 10**9) is None


def test_a_damaged_note_of_what_is_filled_empties_the_cache(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    local, cache = model(checkpoint, "classification"), opened(tmp_path, rows)
    [batch] = train.batches(
        rows, collator(checkpoint, "classification"), 10, np.random.default_rng(0)
    )
    cache.write(batch, forward.prefix(local, batch, 2).states)
    cache.close()
    [note] = tmp_path.glob("*/filled.npy")
    note.write_bytes(note.read_bytes()[:-4])
    assert opened(tmp_path, rows).read(batch) is None


def test_cache_is_closed_when_training_fails_and_keeps_what_was_filled(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    local, cache = model(checkpoint, "classification"), opened(tmp_path, rows)
    first, *_ = train.batches(
        rows, collator(checkpoint, "classification"), 4, np.random.default_rng(0)
    )
    cache.write(first, forward.prefix(local, first, 2).states)
    with pytest.raises(RuntimeError, match="out of memory"), cache:
        raise RuntimeError("out of memory")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(cache._file)
    with opened(tmp_path, rows) as again:
        assert again.read(first) is not None
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["filled.npy", "states.f32"]


def test_note_that_cannot_be_written_leaves_the_one_before_and_no_litter(
    checkpoint: Checkpoint,
    rows: list[dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    local = model(checkpoint, "classification")
    first, second, *_ = train.batches(
        rows, collator(checkpoint, "classification"), 4, np.random.default_rng(0)
    )
    with opened(tmp_path, rows) as cache:
        cache.write(first, forward.prefix(local, first, 2).states)
    with monkeypatch.context() as patch, opened(tmp_path, rows) as cache:
        cache.write(second, forward.prefix(local, second, 2).states)
        patch.setattr(prefix_cache.np, "save", fail)
    with opened(tmp_path, rows) as again:
        assert [again.read(batch) is not None for batch in (first, second)] == [True, False]
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["filled.npy", "states.f32"]


def test_a_row_masked_once_is_predicted_at_the_same_places_in_every_batch(
    checkpoint: Checkpoint, rows: list[dict[str, object]]
) -> None:
    task, own, collate = TASKS["mlm"], reading(checkpoint), collator(checkpoint, "mlm")
    masked = task.fixed(rows, own, [3])
    assert masked == task.fixed(rows, own, [3])
    assert masked != task.fixed(rows, own, [4])
    for seed in range(2):
        batch = collate(masked, np.random.default_rng(seed))
        for index, row in enumerate(masked):
            found = [
                (at, label)
                for at, label in zip(batch.positions[index], batch.labels[index], strict=True)
                if label >= 0
            ]
            assert found == list(zip(row["positions"], row["targets"], strict=True))
            assert [label for _, label in found] == [
                rows[index]["input_ids"][at] for at in row["positions"]
            ]
            assert batch.input_ids[index, : len(row["input_ids"])].tolist() == row["input_ids"]


def test_static_maskings_let_mlm_keep_its_frozen_prefix(
    checkpoint: Checkpoint, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    masked, trained = TASKS["mlm"].fixed(rows, reading(checkpoint), [1]), []
    for use in ("none", "cold", "warm"):
        local, meter = model(checkpoint, "mlm", "head"), FlopMeter()
        cache = None if use == "none" else opened(tmp_path, masked, depth=4)
        result = train.run(local, masked, collator(checkpoint, "mlm"), SETTINGS, meter, cache)
        if cache:
            cache.close()
            # two epochs of three batches; a cold cache is filled in the first
            assert len(result.cached) == {"cold": 3, "warm": 6}[use]
        trained.append(local.snapshot())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=1e-6)
        assert torch.equal(trained[2][name], trained[1][name])


def test_on_a_full_disk_what_was_not_written_whole_counts_as_missing_and_nothing_fails(
    checkpoint: Checkpoint,
    rows: list[dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, local = opened(tmp_path, rows), model(checkpoint, "classification")
    made = list(
        train.batches(rows, collator(checkpoint, "classification"), 4, np.random.default_rng(0))
    )
    whole, left = prefix_cache.os.pwrite, [3]  # rows that still fit

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < -1:
            raise OSError(28, "No space left on device")
        return whole(file, content if left[0] >= 0 else content[:1], offset)

    monkeypatch.setattr(prefix_cache.os, "pwrite", pwrite)
    for batch in made:
        cache.write(batch, forward.prefix(local, batch, 2).states)
    assert cache.fills == 3
    cache.close()
    again = opened(tmp_path, rows)
    assert [again.read(batch) is not None for batch in made] == [False] * len(made)
    again.close()
