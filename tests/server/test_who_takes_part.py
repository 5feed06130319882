"""Labels, sampling and seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import federate
from federated import THIRD, Settings, asked, assert_equal, assert_pools_up_to_date, round_of
from flwr.app import Message

from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.wire.local_grid import over_the_wire, simulated

# Labels -------------------------------------------------------------------------------------------------------


def write_site(folder: Path, labels: str) -> Path:
    folder.mkdir()
    rows = [
        {"text": f"the patient has severe {label} failure", "label": label}
        for label in labels.split() * 6
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sites(tmp_path: Path, *labels: str) -> dict[int, dict[str, Any]]:
    return {
        10 + index: {
            "name": f"site-{index}",
            "data-path": str(write_site(tmp_path / f"site-{index}", one)),
        }
        for index, one in enumerate(labels)
    }


def test_labels_are_merged_by_name_in_sorted_order_and_clients_may_lack_some(
    small: Settings, tmp_path: Path
) -> None:
    nodes = sites(tmp_path, "liver heart", "kidney heart", "liver")
    run = federate(small(dataset="none", heldout_fraction=0.2, client_evaluation="final"), nodes)
    assert run.rounds.labels == ("heart", "kidney", "liver")
    assert run.tensors["classifier.weight"].shape == (3, 32)
    assert run.refusals == []
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3]


def test_order_in_which_clients_answer_does_not_change_the_labels(
    small: Settings, tmp_path: Path
) -> None:
    nodes = sites(tmp_path, "liver heart", "kidney heart", "liver")
    backwards = dict(reversed(nodes.items()))
    values = small(dataset="none", num_rounds=1)
    ones, others = federate(values, nodes), federate(values, backwards)
    assert ones.rounds.labels == others.rounds.labels
    assert_equal(ones.tensors, others.tensors)


def test_ner_labels_have_both_tags_of_every_entity(small: Settings) -> None:
    run = federate(small(task="ner", num_rounds=1), simulated(2))
    assert run.rounds.labels == ("B-Organ", "B-Sign", "I-Organ", "I-Sign", "O")


def test_configured_labels_keep_their_order(small: Settings) -> None:
    run = federate(small(labels="liver, heart ,kidney", num_rounds=1), simulated(2))
    assert run.rounds.labels == ("liver", "heart", "kidney")


def test_client_with_a_label_outside_the_configured_set_is_refused(
    small: Settings, tmp_path: Path
) -> None:
    nodes = sites(tmp_path, "liver heart", "heart spleen")
    run = federate(small(dataset="none", labels="heart,liver", num_rounds=1), nodes)
    assert [one.name for one in run.participants] == ["site-0"]
    (refusal,) = run.refusals
    assert "a label that is not one of heart,liver" in refusal.reason
    assert "spleen" not in refusal.reason  # the site refused it: it has not left


def test_client_that_joins_later_with_a_new_label_is_refused(
    small: Settings, tmp_path: Path
) -> None:
    everyone = sites(tmp_path, "liver heart", "heart liver", "heart spleen")
    nodes = {node: everyone[node] for node in (10, 11)}

    def join(node: int, reply: Message) -> Message:
        if round_of(reply):
            nodes[THIRD] = everyone[THIRD]
        return reply

    run = federate(small(dataset="none"), nodes, join)
    (refusal,) = run.refusals
    assert "spleen" in refusal.reason
    assert [entry.clients for entry in run.outcome.rounds] == [2, 2]


def test_client_that_joins_later_takes_part_from_then_on(small: Settings) -> None:
    everyone = simulated(3)
    nodes = {node: everyone[node] for node in (10, 11)}

    def join(node: int, reply: Message) -> Message:
        if round_of(reply) == 2:
            nodes[THIRD] = everyone[THIRD]
        return reply

    run = federate(small(num_rounds=3, client_evaluation="final"), nodes, join)
    assert [entry.clients for entry in run.outcome.rounds] == [2, 2, 3]
    assert run.outcome.cost.catch_up_bytes > 0
    assert_pools_up_to_date(run)


# Sampling and seeds -------------------------------------------------------------------------------------------


def test_participation_of_a_half_asks_half_of_the_clients_by_the_seed(small: Settings) -> None:
    values = small(participation=0.5, num_rounds=4, max_train_examples=16, method="head")
    first, again = asked(federate(values, simulated(4))), asked(federate(values, simulated(4)))
    assert first == again
    assert all(len(set(nodes)) == 2 for nodes in first.values())
    assert len({tuple(nodes) for nodes in first.values()}) > 1
    assert asked(federate(values | {"seed": 6}, simulated(4))) != first


def test_clients_left_out_of_some_rounds_are_up_to_date_in_the_end(small: Settings) -> None:
    values = small(
        participation=0.5, num_rounds=4, client_evaluation="final", max_train_examples=16
    )
    run = federate(values, simulated(4))
    assert run.refusals == []
    assert_pools_up_to_date(run)


@pytest.mark.parametrize("codec", ["float32", "int2"])
def test_what_clients_missed_as_they_were_not_drawn_is_downlink(
    small: Settings, codec: str
) -> None:
    values = small(
        participation=0.5, num_rounds=4, codec=codec, method="full", max_train_examples=16
    )
    run = federate(values, simulated(4))
    assert run.outcome.cost.catch_up_bytes == 0
    assert (
        run.outcome.full_bytes_down == run.outcome.full_bytes_up * 6 / 8
    )  # two of four clients, none in round 1


def test_training_that_diverged_is_refused_by_the_client_itself(small: Settings) -> None:
    with pytest.raises(
        FedBTError, match=r"training diverged, .* is not finite: lower learning-rate"
    ):
        federate(small(learning_rate=1e38, num_rounds=1), simulated(2))


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_model_bit_for_bit_and_another_does_not(
    small: Settings, task: str
) -> None:
    first = federate(small(task=task), simulated(2)).tensors
    assert_equal(first, federate(small(task=task), simulated(2)).tensors)
    other = federate(small(task=task, seed=6), simulated(2)).tensors
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_lowers_the_loss(settings: Settings) -> None:
    values = settings(
        task="mlm", num_rounds=6, method="full", learning_rate=5e-3, client_evaluation="never"
    )
    losses = [
        entry.metrics["train_loss"] for entry in federate(values, simulated(2)).outcome.rounds
    ]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("codec", ["bf16", "int8+zstd", "int4", "int2"])
def test_pools_equal_the_global_state_bit_for_bit_with_lossy_codecs_too(
    small: Settings, codec: str
) -> None:
    run = federate(small(codec=codec, client_evaluation="final"), simulated(2))
    assert run.refusals == []
    assert run.outcome.cost.catch_up_bytes == 0
    assert_pools_up_to_date(run)


def test_messages_travel_unchanged(small: Settings) -> None:
    run = federate(small(num_rounds=1), simulated(2))
    for message in run.grid.sent + run.grid.received:
        assert over_the_wire(message).content == message.content
