from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbt_app.errors import FedBTError
from fedbt_app.plan import AUTO, FULL, METHODS, PAPER, RunPlan, full_plan, untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.schedules import cyclic_decreasing, shallow_progressive


def run_plan(
    task: str,
    method: str = "fedbt",
    depth: int = 12,
    rounds: int = 10,
    schedule: str = PAPER,
    seed: int = 3,
) -> RunPlan:
    return RunPlan(METHODS[method], TASKS[task], depth, rounds, schedule, seed)


PRE_TRAINING = run_plan("mlm")


# Schedules ----------------------------------------------------------------------------------------


def test_pre_training_gives_each_block_half_of_the_rounds_that_remain() -> None:
    for blocks in (
        [0, 0, 0, 0, 0, 1, 1, 1, 2, 3],
        [0, 0, 0, 1, 2],
        [0] * 10 + [1] * 5 + [2] * 3 + [3, 4],
        [0],
        [0, 1],
    ):
        assert shallow_progressive(len(blocks), 6) == blocks


@given(st.integers(1, 300), st.integers(1, 12))
def test_the_pre_training_schedule_climbs_by_single_blocks_and_stays_in_the_local_model(
    rounds: int, depth: int
) -> None:
    schedule = shallow_progressive(rounds, depth)
    assert len(schedule) == rounds
    assert schedule[0] == 0
    assert max(schedule) < depth
    assert {after - before for before, after in pairwise(schedule)} <= {0, 1}


def test_fine_tuning_cycles_from_the_deepest_block_through_half_the_depth() -> None:
    lowest = cyclic_decreasing(10, 12)
    assert [12 - block for block in lowest] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert sum(12 - block for block in lowest) == 31
    assert cyclic_decreasing(5, 6) == [5, 4, 3, 5, 4]
    assert cyclic_decreasing(3, 1) == [0, 0, 0]


def test_pre_training_plans_follow_the_schedule_and_train_one_block() -> None:
    plans = PRE_TRAINING.rounds("a")
    assert [one.trained_blocks for one in plans] == [
        (block,) for block in shallow_progressive(10, 6)
    ]
    assert [one.trained_parts for one in plans[-2:]] == [("block.2", "head"), ("block.3", "head")]


def test_fine_tuning_plans_train_all_blocks_above_the_lowest_at_full_depth() -> None:
    for task in ("classification", "ner"):
        plans = run_plan(task).rounds()
        assert [len(one.trained_blocks) for one in plans] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
        assert {one.local_blocks for one in plans} == {tuple(range(12))}
        assert plans[2].trained_parts == ("block.9", "block.10", "block.11", "head")
        assert [one.lowest_trained for one in plans[:3]] == [11, 10, 9]


# Sampled local models -----------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.data(), st.integers(1, 24), st.integers(1, 30), st.integers(0, 2**31), st.text(max_size=5)
)
def test_a_sampled_local_model_keeps_the_shallow_blocks_and_draws_the_rest_ascending_from_above(
    data: st.DataObject, depth: int, rounds: int, seed: int, client: str
) -> None:
    local_depth, round_ = data.draw(st.integers(1, depth)), data.draw(st.integers(0, rounds - 1))
    plan = run_plan("mlm", depth=depth, rounds=rounds, seed=seed)
    made = plan.round(round_, client, local_depth)
    (block,) = made.trained_blocks
    kept, drawn = made.local_blocks[: block + 1], made.local_blocks[block + 1 :]
    assert len(made.local_blocks) == local_depth
    assert kept == tuple(range(block + 1))
    assert list(drawn) == sorted(drawn)
    assert all(block < one < depth for one in drawn)
    assert made.local_blocks.count(block) == 1
    assert made == plan.round(round_, client, local_depth)
    if local_depth == depth:
        assert made.local_blocks == tuple(range(depth))


def test_blocks_are_sampled_with_replacement_from_every_deeper_block() -> None:
    drawn = [PRE_TRAINING.round(0, str(number)).local_blocks[1:] for number in range(300)]
    assert {block for one in drawn for block in one} == set(range(1, 12))
    assert any(len(set(one)) < len(one) for one in drawn)


def test_the_sample_is_redrawn_for_every_round_client_and_seed() -> None:
    long = run_plan("mlm", rounds=40)
    plans = [long.round(round_, "a").local_blocks for round_ in range(20)]  # block 0 in all of them
    assert all(before != after for before, after in pairwise(plans))
    assert len({PRE_TRAINING.round(0, str(number)).local_blocks for number in range(20)}) > 15
    assert (
        len({run_plan("mlm", seed=number).round(0, "a").local_blocks for number in range(20)}) > 15
    )


def test_half_the_depth_is_the_default_of_sampled_pre_training_only() -> None:
    assert PRE_TRAINING.default_local_depth == len(PRE_TRAINING.round(0, "a").local_blocks) == 6
    assert run_plan("mlm", depth=1).default_local_depth == 1
    assert {run_plan("mlm", method).default_local_depth for method in ("full", "head", "lora")} == {
        12
    }
    assert {run_plan(task).default_local_depth for task in ("classification", "ner")} == {12}


def test_clients_of_unequal_depth_train_the_blocks_nearest_to_the_schedule_that_they_hold() -> None:
    by_depth = {depth: PRE_TRAINING.round(9, "a", depth) for depth in (1, 2, 4, 12)}
    assert [one.trained_blocks for one in by_depth.values()] == [(0,), (1,), (3,), (3,)]
    assert [len(one.local_blocks) for one in by_depth.values()] == [1, 2, 4, 12]
    assert by_depth[12].local_blocks == tuple(range(12))


def test_fine_tuning_with_less_depth_keeps_the_topmost_trained_blocks_over_the_shallowest() -> None:
    plan = run_plan("classification")
    for round_, local_depth, local, trained in (
        (0, 4, (0, 1, 2, 11), (11,)),
        (2, 4, (0, 9, 10, 11), (9, 10, 11)),
        (
            5,
            4,
            (8, 9, 10, 11),
            (8, 9, 10, 11),
        ),  # the schedule says 6: the topmost four that it can hold
        (5, 8, (0, 1, 6, 7, 8, 9, 10, 11), (6, 7, 8, 9, 10, 11)),
        (5, 99, tuple(range(12)), (6, 7, 8, 9, 10, 11)),
    ):
        made = plan.round(round_, "a", local_depth)
        assert (made.local_blocks, made.trained_blocks) == (local, trained)


# Methods ------------------------------------------------------------------------------------------


def test_baselines_train_the_same_parts_of_the_whole_model_in_every_round() -> None:
    baselines = {
        "full": (("embeddings", "block.0", "block.1", "block.2", "block.3", "head"), -1),
        "head": (("head",), 4),
        "lora": (("adapter.0", "adapter.1", "adapter.2", "adapter.3", "head"), 0),
    }
    for task, (method, (parts, lowest)) in product(TASKS, baselines.items()):
        for made in run_plan(task, method, depth=4, rounds=5).rounds("a"):
            assert made.trained_parts == parts
            assert made.local_blocks == (0, 1, 2, 3)
            assert made.lowest_trained == lowest


def test_fedbt_lora_trains_adapters_where_fedbt_trains_blocks() -> None:
    for task in TASKS:
        for blocks, adapters in zip(
            run_plan(task).rounds("a"), run_plan(task, "fedbt-lora").rounds("a"), strict=True
        ):
            assert adapters.local_blocks == blocks.local_blocks
            assert adapters.trained_parts == tuple(
                part.replace("block", "adapter") for part in blocks.trained_parts
            )


def test_the_plans_of_the_whole_model_train_all_or_nothing_of_it() -> None:
    for depth in (1, 4):
        assert full_plan(depth) == run_plan("mlm", FULL, depth).round(0)
        assert untrained_plan(depth) == run_plan("mlm", "head", depth).round(0)


def test_every_method_of_the_table_can_be_planned() -> None:
    assert set(METHODS) == {"fedbt", "full", "head", "lora", "fedbt-lora"}
    assert all(run_plan("mlm", method).round(0).trained_parts[-1] == "head" for method in METHODS)


def test_the_frozen_prefix_is_what_no_round_trains() -> None:
    assert run_plan("classification").frozen_prefix() == 6
    assert run_plan("ner", rounds=3).frozen_prefix() == 9
    assert run_plan("ner", "fedbt-lora").frozen_prefix() == 6
    assert run_plan("ner", "head").frozen_prefix() == 12
    assert run_plan("classification").frozen_prefix(local_depth=8) == 2
    assert PRE_TRAINING.frozen_prefix() == 0
    assert run_plan("ner", "full").frozen_prefix() == run_plan("ner", "lora").frozen_prefix() == 0


# Schedules of one's own ---------------------------------------------------------------------------


def test_a_schedule_names_the_blocks_of_each_round_and_begins_again() -> None:
    for schedule, blocks in {
        "-1": [(11,)] * 4,
        "-2,-1": [(10, 11)] * 4,
        "-1; -2,-1": [(11,), (10, 11), (11,), (10, 11)],
        "0; 1; 5,11,-1": [(0,), (1,), (5, 11), (0,)],
    }.items():
        plan = run_plan("mlm", rounds=4, schedule=schedule)
        assert plan.scheduled_blocks(plan.default_local_depth) == blocks
        assert [one.trained_blocks for one in plan.rounds("a")] == blocks
        assert {one.local_blocks for one in plan.rounds("a")} == {
            tuple(range(12))
        }  # all of them: nothing to sample


def test_the_published_schedule_is_what_paper_names() -> None:
    for task, schedule in (("mlm", "0;0;0;0;0;1;1;1;2;3"), ("ner", "11;10,11;9,10,11")):
        rounds = len(schedule.split(";"))
        own, published = (run_plan(task, rounds=10, schedule=one) for one in (schedule, PAPER))
        assert own.rounds("a", 12)[:rounds] == published.rounds("a", 12)[:rounds]


def test_the_default_is_what_measured_best_for_the_task_and_the_depth() -> None:
    for task, depth, schedule, local_depth in (
        *(("mlm", 6, "paper", 6), ("mlm", 1, "paper", 1), ("mlm", 12, "paper", 6)),
        *(
            ("ner", 6, "0,2,5", 6),
            ("ner", 2, "0,1", 2),
            ("ner", 1, "0", 1),
            ("ner", 12, "paper", 12),
        ),
        *(
            ("classification", 6, "3,4,5", 6),
            ("classification", 1, "0", 1),
            ("classification", 12, "paper", 12),
        ),
    ):
        chosen, named = (run_plan(task, depth=depth, schedule=one) for one in (AUTO, schedule))
        assert chosen.rounds("a") == named.rounds("a", local_depth)
        assert chosen.default_local_depth == local_depth
        assert {len(made.local_blocks) for made in chosen.rounds("a")} == {local_depth}


def test_the_default_holds_for_a_client_that_says_how_deep_it_is() -> None:
    chosen, published = (run_plan("mlm", depth=6, schedule=one) for one in (AUTO, PAPER))
    assert chosen.rounds("a", 3) == published.rounds("a", 3)


def test_a_client_below_full_depth_keeps_what_it_trains_and_the_shallowest_others() -> None:
    made = run_plan("mlm", schedule="3,-2,-1").round(0, "a", 4)
    assert (made.trained_blocks, made.local_blocks) == ((3, 10, 11), (0, 3, 10, 11))
    made = run_plan("classification", schedule="3,-2,-1").round(0, "a", 2)
    assert (made.trained_blocks, made.local_blocks) == ((10, 11), (10, 11))


def test_what_is_no_schedule_is_refused_in_one_line() -> None:
    for schedule, problem in {
        "top": "is not one",
        "": "is not one",
        "12": "block 12",
        "-13;0": "block -13",
    }.items():
        with pytest.raises(FedBTError, match=problem) as raised:
            run_plan("ner", schedule=schedule)
        assert len(str(raised.value).splitlines()) == 1
