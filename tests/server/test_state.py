import gc
import weakref
from pathlib import Path

import pytest
import torch

from fedbt_app.aggregation.mean import WeightedMean
from fedbt_app.aggregation.momentum import Momentum
from fedbt_app.client.client import synchronise
from fedbt_app.client.pool import ParameterPool
from fedbt_app.costs.ledger import Cause
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import PartState
from fedbt_app.server.state import GlobalState, by_part
from fedbt_app.tasks import TASKS
from fedbt_app.tensors import Tensors, digest
from fedbt_app.wire.messages import Request, Sync
from fedbt_app.wire.updates import DELTA, VALUE, Update

RUN = "0123456789abcdef" * 2
LABELS = ("heart", "kidney", "liver")
TASK = TASKS["classification"]


@pytest.fixture
def checkpoint(tiny_bert: Path) -> Checkpoint:
    return Checkpoint(tiny_bert)


class Site:
    """A client's pool, brought up to date as client.py does it."""

    def __init__(self, checkpoint: Checkpoint, root: Path, name: str = "a") -> None:
        self.pool = ParameterPool(root, RUN, name)
        self.weights = Weights(checkpoint, self.pool.tensors, ModelSpec(TASK, LABELS))

    def receive(self, state: GlobalState) -> list[Update]:
        updates = state.updates_for(self.pool.states())
        held = synchronise(
            self.pool, self.weights, Request(Sync(RUN, updates, state.states()), LABELS)
        )
        assert held == state.states()
        return updates


def deltas(checkpoint: Checkpoint, part: str, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = checkpoint.architecture.part(part, TASK.head, len(LABELS), 0)
    return {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def started(checkpoint: Checkpoint, codec: str = "float32") -> GlobalState:
    """Return a run's state before its first round: the head is new, all else is the base's."""
    state = GlobalState(checkpoint, codec)
    weights = Weights(checkpoint, state.tensors, ModelSpec(TASK, LABELS))
    state.introduce("head", new_tensors(weights.lacking("head"), seed=1))
    return state


def kinds(updates: list[Update]) -> dict[str, tuple[str, Cause]]:
    return {update.part: (update.kind, update.cause) for update in updates}


# Aggregation --------------------------------------------------------------------------------------


def test_the_weighted_mean_counts_each_tensor_over_the_clients_that_trained_it() -> None:
    total = WeightedMean()
    total.add({"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}, weight=1)
    total.add({"a": torch.tensor([4.0])}, weight=2)
    total.add({"c": torch.tensor([7.0])}, weight=5)
    assert {name: float(value) for name, value in total.result().items()} == {
        "a": 3.0,
        "b": 10.0,
        "c": 7.0,
    }
    assert {value.dtype for value in total.result().values()} == {torch.float32}


def test_the_order_in_which_clients_answer_does_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    sent = [({"a": torch.randn(1000, generator=generator)}, 7 * number + 1) for number in range(12)]
    means = []
    for order in (sent, sent[::-1], sent[5:] + sent[:5]):
        total = WeightedMean()
        for one, weight in order:
            total.add(one, weight)
        means.append(total.result()["a"])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def test_one_client_alone_gets_its_own_delta_back_exactly() -> None:
    total, delta = WeightedMean(), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    total.add({"a": delta}, weight=37)
    assert torch.equal(total.result()["a"], delta)


def test_the_sum_holds_no_more_tensors_after_many_clients_than_after_one() -> None:
    def held() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    gc.freeze()  # what was there before does not count, and takes long to count
    try:
        total, seen, counts = WeightedMean(), [], []
        for number in range(30):
            delta = torch.full((8,), float(number))
            seen.append(weakref.ref(delta))
            total.add({"a": delta, "b": delta}, weight=1)
            del delta
            counts.append(held())
    finally:
        gc.unfreeze()
    assert set(counts) == {2}
    assert not any(reference() is not None for reference in seen)


def test_adding_does_not_change_the_deltas() -> None:
    total, delta = WeightedMean(), torch.ones(3)
    total.add({"a": delta}, weight=5)
    total.add({"a": delta}, weight=5)
    assert torch.equal(delta, torch.ones(3))


def test_tensors_are_grouped_by_their_part(checkpoint: Checkpoint) -> None:
    mixed = deltas(checkpoint, "head", 0) | deltas(checkpoint, "block.2", 0)
    assert {
        part: len(tensors)
        for part, tensors in by_part(mixed, checkpoint.architecture.encoder).items()
    } == {
        "head": 4,
        "block.2": 16,
    }


# Applying -----------------------------------------------------------------------------------------


def test_a_client_that_applies_each_delta_has_the_servers_weights_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for codec in ("float32", "float32+zstd", "bf16", "int8", "int4", "int2+zstd"):
        state, site = started(checkpoint, codec), Site(checkpoint, tmp_path, codec)
        for round_, block in enumerate((3, 2, 3)):
            site.receive(state)
            for part in ("head", f"block.{block}"):
                state.apply(deltas(checkpoint, part, round_))
            assert {update.kind for update in site.receive(state)} == {DELTA}
            for part in state.states():
                mine, theirs = site.weights.part(part), state.tensors(part)
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[name], theirs[name]) for name in mine), (codec, part)


def test_a_first_delta_is_added_to_the_base_and_a_later_one_to_the_result(
    checkpoint: Checkpoint,
) -> None:
    state, name = GlobalState(checkpoint), "bert.encoder.layer.1.output.dense.weight"
    first, second = (deltas(checkpoint, "block.1", seed) for seed in (1, 2))
    state.apply(first)
    assert torch.equal(state.tensors("block.1")[name], checkpoint.tensor(name) + first[name])
    state.apply(second)
    assert torch.equal(
        state.tensors("block.1")[name], checkpoint.tensor(name) + first[name] + second[name]
    )
    assert state.tensors("block.0") == {}


def test_momentum_adds_a_share_of_the_parts_own_last_step(checkpoint: Checkpoint) -> None:
    state, name = (
        GlobalState(checkpoint, optimizer=Momentum(0.5)),
        "bert.encoder.layer.1.output.dense.weight",
    )
    first, second, third = (deltas(checkpoint, "block.1", seed) for seed in (1, 2, 3))
    expected, step = checkpoint.tensor(name), torch.zeros(())
    for sent in (first, second, third):
        state.apply(sent)
        state.apply(deltas(checkpoint, "block.2", 4))  # has its own
        step = sent[name] + 0.5 * step
        expected = expected + step
        assert torch.equal(state.tensors("block.1")[name], expected)


def test_without_momentum_no_step_is_kept(checkpoint: Checkpoint) -> None:
    state = started(checkpoint)
    state.apply(deltas(checkpoint, "block.1", 1))
    assert all(part.memory == {} for part in state.parts.values())


def test_versions_count_the_aggregations_of_each_part(checkpoint: Checkpoint) -> None:
    state = started(checkpoint)
    assert {part: one.version for part, one in state.states().items()} == {"head": 0}
    for part in ("head", "block.3", "head", "head"):
        state.apply(deltas(checkpoint, part, 0))
    assert {part: one.version for part, one in state.states().items()} == {"head": 3, "block.3": 1}
    assert state.states()["block.3"].digest == digest(state.tensors("block.3"))


def test_the_server_takes_the_delta_as_the_clients_will_decode_it(checkpoint: Checkpoint) -> None:
    state, name, sent = (
        GlobalState(checkpoint, "int4"),
        "bert.encoder.layer.1.output.dense.weight",
        {},
    )
    sent = deltas(checkpoint, "block.1", 1)
    state.apply(sent)
    assert not torch.equal(state.tensors("block.1")[name], checkpoint.tensor(name) + sent[name])


# Updates ------------------------------------------------------------------------------------------


def test_a_pool_that_is_up_to_date_is_sent_nothing(checkpoint: Checkpoint) -> None:
    state = started(checkpoint)
    state.apply(deltas(checkpoint, "block.3", 0))
    assert state.updates_for(state.states()) == []
    assert (
        state.updates_for(state.states() | {"block.0": PartState(4, "of nobody's interest")}) == []
    )


def test_a_new_head_is_sent_whole_as_first_contact(checkpoint: Checkpoint) -> None:
    (update,) = started(checkpoint).updates_for({})
    assert (update.part, update.kind, update.cause) == ("head", VALUE, Cause.FIRST_CONTACT)
    assert update.encoded.nbytes == 4 * 33 * len(LABELS)  # not the pooler


def test_a_pool_one_step_behind_is_sent_the_delta(checkpoint: Checkpoint) -> None:
    state = started(checkpoint)
    held = state.states()
    for part in ("head", "block.3"):
        state.apply(deltas(checkpoint, part, 0))
    assert kinds(state.updates_for(held)) == {
        "head": (DELTA, Cause.ROUND),
        "block.3": (DELTA, Cause.ROUND),
    }
    held = state.states()
    state.apply(deltas(checkpoint, "block.3", 1))
    assert kinds(state.updates_for(held)) == {"block.3": (DELTA, Cause.ROUND)}


def test_a_part_that_is_further_behind_or_lost_or_of_other_bits_is_sent_whole(
    checkpoint: Checkpoint,
) -> None:
    state = started(checkpoint)
    for seed in range(3):
        state.apply(deltas(checkpoint, "block.3", seed))
    held, version = state.states(), state.states()["block.3"].version
    lost = {part: one for part, one in held.items() if part != "block.3"}
    others = [held | {"block.3": PartState(other, "0" * 64)} for other in (1, version - 1, version)]
    for pool in (lost, *others):
        (update,) = state.updates_for(pool)
        assert (update.part, update.kind, update.cause) == ("block.3", VALUE, Cause.CATCH_UP)


def test_values_are_sent_in_full_precision_whatever_the_codec(checkpoint: Checkpoint) -> None:
    state = started(checkpoint, "int4")
    for seed in range(2):
        state.apply(deltas(checkpoint, "block.3", seed))
    update = next(
        update for update in state.updates_for({}, whole=True) if update.part == "block.3"
    )
    assert sum(array.nbytes for array in update.encoded.arrays.values()) == 4 * sum(
        value.numel() for value in state.tensors("block.3").values()
    )


def test_a_late_joiner_catches_up_to_the_same_bits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = started(checkpoint, "int8")
    for part, seed in (("head", 0), ("block.3", 0), ("head", 1), ("block.3", 1), ("block.2", 1)):
        state.apply(deltas(checkpoint, part, seed))
    joiner = Site(checkpoint, tmp_path, "late")
    assert [(one.part, one.kind, one.cause) for one in joiner.receive(state)] == [
        ("head", VALUE, Cause.CATCH_UP),
        (
            "block.3",
            DELTA,
            Cause.CATCH_UP,
        ),  # two small steps from the base are less than the whole part
        ("block.3", DELTA, Cause.ROUND),
        ("block.2", DELTA, Cause.ROUND),  # the base and one delta: as good as for anybody else
    ]
    assert joiner.receive(state) == []


def test_a_part_is_sent_whole_once_that_is_less_than_the_missed_steps(
    checkpoint: Checkpoint,
) -> None:
    state = started(checkpoint, "bf16")
    sent = []
    for seed in range(4):
        state.apply(deltas(checkpoint, "block.3", seed))
        sent.append([one.kind for one in state.updates_for({}) if one.part == "block.3"])
    assert sent == [[DELTA], [DELTA, DELTA], [VALUE], [VALUE]]


def test_what_the_codec_drops_is_in_the_next_delta(checkpoint: Checkpoint) -> None:
    fed_back, exact = started(checkpoint, "int2"), started(checkpoint)
    for seed in range(12):
        for state in (fed_back, exact):
            state.apply(deltas(checkpoint, "block.3", seed))
    step = deltas(checkpoint, "block.3", 0)
    for name, value in fed_back.tensors("block.3").items():
        error = (value - exact.tensors("block.3")[name]).norm()
        assert error < step[name].norm(), "twelve rounds' errors have piled up"


def test_a_client_that_missed_rounds_and_lost_a_file_recovers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state, site = started(checkpoint), Site(checkpoint, tmp_path)
    site.receive(state)
    for seed in range(3):
        state.apply(deltas(checkpoint, "head", seed) | deltas(checkpoint, "block.3", seed))
    site.receive(state)
    (site.pool.folder / "head.safetensors").write_bytes(b"damaged")
    assert kinds(site.receive(state)) == {"head": (VALUE, Cause.CATCH_UP)}


def test_a_part_that_the_server_does_not_know_is_dropped(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state, site = started(checkpoint), Site(checkpoint, tmp_path)
    site.receive(state)
    foreign = deltas(checkpoint, "block.3", 0)  # of a round that a resumed run has not done
    site.pool.store("block.3", 1, foreign)
    site.receive(state)
    assert site.pool.states() == state.states()
    assert torch.equal(
        site.weights.part("block.3")["bert.encoder.layer.3.output.dense.weight"],
        checkpoint.tensor("bert.encoder.layer.3.output.dense.weight"),
    )


def test_an_update_whose_bits_do_not_give_the_promised_digest_is_not_stored(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state, site = started(checkpoint), Site(checkpoint, tmp_path)
    (update,) = state.updates_for({})
    wrong = Update(update.part, update.kind, PartState(0, "0" * 64), update.encoded)
    held = synchronise(site.pool, site.weights, Request(Sync(RUN, [wrong], state.states()), LABELS))
    assert held == {}
    assert site.pool.states() == {}
