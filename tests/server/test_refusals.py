"""Clients and replies that are refused, and what that costs the others: nothing."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Federated, RecordingGrid, federate
from federated import THIRD, Settings, Tamper, Tensors, assert_equal, round_of
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import HEAD, HeadKind
from fedbt_app.wire.local_grid import LocalGrid, simulated

# Clients that are refused -------------------------------------------------------------------------------------


def test_client_with_another_base_is_refused_by_both_fingerprints_and_names_and_the_rest_goes_on(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    other = tmp_path / "other-bert"
    shutil.copytree(tiny_bert, other)
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(tiny_bert)).save_pretrained(other)
    nodes = simulated(3)
    nodes[THIRD]["model-path"] = str(other)
    run = federate(small(num_rounds=1), nodes)
    (refusal,) = run.refusals
    for folder in (other, tiny_bert):
        assert folder.name in refusal.reason
        assert Checkpoint(folder).fingerprint(HeadKind.SEQUENCE)[:12] in refusal.reason
    assert "client-2" in refusal.reason
    assert run.outcome.rounds[0].clients == 2


def other_tokenizer(tiny_bert: Path, folder: Path, **settings: Any) -> Path:
    """Copy the tiny BERT with other settings of its tokenizer."""
    shutil.copytree(tiny_bert, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_client_whose_tokenizer_lower_cases_while_the_runs_does_not_is_refused_with_both_named(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    cased = other_tokenizer(tiny_bert, tmp_path / "cased", do_lower_case=False)
    nodes = simulated(3)
    nodes[THIRD]["model-path"] = str(tiny_bert)
    run = federate(small(num_rounds=1, model=str(cased)), nodes)
    (refusal,) = run.refusals
    for folder, casing in ((tiny_bert, "lower-casing"), (cased, "cased")):
        facts = Checkpoint(folder).tokenizer_facts
        assert f"{facts.fingerprint[:12]} ({facts.description})" in refusal.reason
        assert facts.description.endswith(f" pieces, {casing}")
    assert "client-2" in refusal.reason
    assert "model-path" in refusal.reason
    assert run.outcome.rounds[0].clients == 2


def test_client_with_the_same_tokenizer_in_other_files_takes_part(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    nodes = simulated(3)
    nodes[THIRD]["model-path"] = str(other_tokenizer(tiny_bert, tmp_path / "vocabulary-alone"))
    run = federate(small(num_rounds=1), nodes)
    assert run.refusals == []
    assert run.outcome.rounds[0].clients == 3


def with_an_added_token(tiny_bert: Path, folder: Path) -> Path:
    """Copy the tiny BERT with a tokenizer of one more entry than its embedding has rows."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_bert, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(["[NAME]"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_larger_than_the_embedding_is_refused_at_the_server_and_at_a_client(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    added = str(with_an_added_token(tiny_bert, tmp_path / "added"))
    rows = Checkpoint(tiny_bert).architecture.dimensions.vocabulary
    wanted = rf"tokenizer has {rows + 1} entries, the embedding {rows}: "
    values = small(num_rounds=1, model=added)
    for dataset in (values["dataset"], "none"):
        config = RunConfig.load(values | {"dataset": dataset})
        with pytest.raises(FedBTError, match=wanted):
            server_app.run(LocalGrid(client_app.app, values, simulated(3)), config)
    nodes = simulated(3)
    nodes[THIRD]["model-path"] = added
    (refusal,) = federate(small(num_rounds=1), nodes).refusals
    assert re.search(wanted, refusal.reason)


def test_a_casing_that_is_not_the_vocabularys_is_told_by_the_server_and_each_site(
    small: Settings, tiny_bert: Path, tmp_path: Path, flower_log: list[str]
) -> None:
    folder = other_tokenizer(tiny_bert, tmp_path / "cased", do_lower_case=True)
    pieces = (folder / "vocab.txt").read_text().replace("severe", "COPD")
    (folder / "vocab.txt").write_text(pieces)
    values = small(num_rounds=1, model=str(folder))
    report = server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))
    told = [
        line for line in flower_log if "upper-case letters but the tokenizer lower-cases" in line
    ]
    assert [line.partition(" the ")[0] for line in told] == [
        "fedbt:",
        "fedbt: client-0:",
        "fedbt: client-1:",
        "fedbt:",  # once more among the last lines
    ]
    assert any("lower-cases" in warning for warning in report["warnings"])
    assert report["tokenizer_fingerprint"] == Checkpoint(folder).tokenizer_facts.fingerprint


def test_two_clients_of_one_name_are_refused(small: Settings) -> None:
    nodes = simulated(3)
    nodes[11]["name"] = nodes[THIRD]["name"] = "clinic"
    run = federate(small(num_rounds=1), nodes)
    (refusal,) = run.refusals
    assert "'clinic'" in refusal.reason
    assert sorted(one.name for one in run.participants) == ["client-0", "clinic"]


def test_node_that_comes_back_under_a_new_id_takes_its_own_place(small: Settings) -> None:
    nodes = simulated(3)

    def restart(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply) == 1:
            nodes[99] = nodes.pop(THIRD)
        return reply

    run = federate(small(num_rounds=2, round_timeout=1.0), nodes, restart)
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3]


def put(record: str, key: str, value: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content[record].__setitem__(key, value)


def drop(*path: str) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        place: Any = reply.content
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def replace(record: str, value: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content.__setitem__(record, value)


def drop_head(reply: Message) -> None:
    del reply.content["parts"]["head/values"], reply.content["headers"][HEAD]


def rename_a_tensor(reply: Message) -> None:
    headers = reply.content["headers"]
    headers[HEAD] = headers[HEAD].replace("classifier.bias", "x.bias")


def reshape(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], None]:
    def apply(reply: Message) -> None:
        parts = reply.content["parts"]
        parts["head/values"] = Array(change(parts["head/values"].numpy().copy()))

    return apply


def poison(value: float) -> Callable[[Message], None]:
    def change(values: np.ndarray) -> np.ndarray:
        values[7] = value
        return values

    return reshape(change)


def send_unasked(reply: Message) -> None:
    content = reply.content
    content["parts"]["block.0/values"] = content["parts"]["block.3/values"]
    content["headers"]["block.0"] = content["headers"]["block.3"].replace("layer.3.", "layer.0.")


def send_bytes(data_: bytes) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        array = reply.content["parts"]["head/values"]
        reply.content["parts"]["head/values"] = Array(array.dtype, array.shape, array.stype, data_)

    return change


def npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


SPOILT: dict[str, tuple[Callable[[Message], None], str]] = {
    "nan": (poison(math.nan), "nan|finite"),
    "infinity": (poison(math.inf), "inf|finite"),
    "absurd step": (poison(2e6), "more than 1e\\+06: lower learning-rate"),
    "unasked tensors": (send_unasked, "nobody asked for"),
    "missing part": (drop_head, "no delta of 'head'"),
    "array without header": (drop("headers", HEAD), "JSON"),
    "header without array": (drop("parts", "head/values"), "arrays sent"),
    "two dimensions": (reshape(lambda values: values[:, None]), "one-dimensional"),
    "float64": (reshape(lambda values: values.astype(np.float64)), "float32"),
    "too short": (reshape(lambda values: values[:-1]), "entries"),
    "too long": (reshape(lambda values: np.append(values, values[:1])), "entries"),
    "another tensor's name": (rename_a_tensor, "not asked for"),
    "no examples": (put("counts", "num-examples", 0), "0 examples"),
    "negative examples": (put("counts", "num-examples", -3), "malformed"),
    "examples not whole": (put("counts", "num-examples", 2.5), "malformed"),
    "unknown status": (put("reply", "status", "fine"), "malformed"),
    "cost is nan": (put("costs", "seconds", math.nan), "malformed"),
    "cost is negative": (put("costs", "train_flops", -1.0), "malformed"),
    "no costs": (drop("costs"), "malformed"),
    "no counts": (drop("counts"), "malformed"),
    "no arrays": (drop("parts"), "malformed"),
    "record of another type": (replace("parts", MetricRecord({"a": 1.0})), "malformed"),
    "array without bytes": (send_bytes(b""), "malformed"),
    "array of garbage": (send_bytes(b"garbage" * 20), "malformed"),
    "array that claims terabytes": (send_bytes(npy_header("(100000000000000,)")), "malformed"),
    "state of endless nesting": (put("held", HEAD, "[" * 100_000), "malformed"),
    "failure": (
        replace("reply", ConfigRecord({"status": "failed", "error": "disk full"})),
        "disk full",
    ),
}


@pytest.fixture(scope="module")
def without_third() -> dict[str, Tensors]:
    """Keep the result of the run in which client-2 does not take part, once it was made."""
    return {}


def check_left_out(
    values: dict[str, Any], without: dict[str, Tensors], tamper: Tamper, reason: str
) -> Federated:
    """Run with client-2 spoilt: it is refused in one line and all else is as if it had not been there."""
    if not without:
        nodes = simulated(3)
        del nodes[THIRD]
        without["tensors"] = federate(values, nodes).tensors
    run = federate(values, simulated(3), tamper)
    (refusal,) = run.refusals
    assert refusal.client == "client-2"
    assert re.search(reason, refusal.reason), refusal.reason
    assert len(refusal.reason.splitlines()) == 1
    assert run.outcome.rounds[0].clients == 2
    assert_equal(run.tensors, without["tensors"])
    return run


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_reply_is_refused_whole_in_one_line_and_the_rest_goes_on(
    small: Settings, without_third: dict[str, Tensors], flower_log: list[str], kind: str
) -> None:
    spoil, reason = SPOILT[kind]

    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply):
            spoil(reply)
        return reply

    check_left_out(small(num_rounds=1), without_third, tamper, reason)
    assert len([line for line in flower_log if "client-2 is left out" in line]) == 1


def test_node_error_is_refused_in_one_line(
    small: Settings, without_third: dict[str, Tensors]
) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node != THIRD or not round_of(reply):
            return reply
        return Message(Error(3, "Node\nUnavailable"), reply_to=grid_message(reply))

    check_left_out(small(num_rounds=1), without_third, tamper, "Node")


def grid_message(reply: Message) -> Message:
    """Return a message that what answers it answers the same as `reply` does."""
    message = Message(
        reply.content, dst_node_id=reply.metadata.src_node_id, message_type="train", group_id="1"
    )
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message


def test_silence_is_refused_after_the_timeout(
    small: Settings, without_third: dict[str, Tensors]
) -> None:
    def lose(node: int, reply: Message) -> Message | None:
        return None if node == THIRD and round_of(reply) else reply

    check_left_out(small(num_rounds=1, round_timeout=1.0), without_third, lose, "round-timeout")


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_message_that_flower_does_not_take_costs_its_node_only_and_books_no_bytes(
    small: Settings, kind: str
) -> None:
    class Full(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            lost = message.metadata.dst_node_id == THIRD and message.metadata.message_type == kind
            return [] if lost else super().push_messages([message])

    values = small(num_rounds=1, round_timeout=60.0)
    report = server_app.run(Full(client_app.app, values, simulated(3)), RunConfig.load(values))
    assert report["refused"]
    assert all(
        refusal["reason"].startswith("Flower did not take the ") for refusal in report["refused"]
    )
    assert report["rounds"][0]["clients"] == 2


def test_error_of_several_lines_becomes_one_line(
    small: Settings, without_third: dict[str, Tensors]
) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply):
            reply.content["reply"] = ConfigRecord(
                {"status": "failed", "error": "no\nfedbt: error: forged"}
            )
        return reply

    check_left_out(small(num_rounds=1), without_third, tamper, "no")


def drop_everything(reply: Message) -> None:
    for name in list(reply.content):
        del reply.content[name]


QUERY_SPOILT: dict[str, Callable[[Message], None]] = {
    "nothing": drop_everything,
    "no reply record": drop("reply"),
    "no status": drop("reply", "status"),
    "reply of another type": replace("reply", MetricRecord({"status": 1})),
    "unknown status": put("reply", "status", "fine"),
    "no capabilities": drop("capabilities"),
    "no labels": drop("labels"),
    "name is a number": put("capabilities", "name", 3),
    "negative examples": put("capabilities", "examples", -1),
    "no examples": put("capabilities", "examples", 0),
    "unequal lists": put("labels", "counts", [1]),
    "negative label count": replace("labels", ConfigRecord({"names": ["heart"], "counts": [-1]})),
    "held is no JSON": replace("held", ConfigRecord({"head": "x"})),
}


@pytest.mark.parametrize("kind", QUERY_SPOILT)
def test_spoilt_answer_to_the_query_is_refused_in_one_line_and_the_rest_goes_on(
    small: Settings, kind: str
) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and reply.metadata.message_type == "query":
            QUERY_SPOILT[kind](reply)
        return reply

    run = federate(small(num_rounds=1), simulated(3), tamper)
    (refusal,) = run.refusals
    assert refusal.reason
    assert len(refusal.reason.splitlines()) == 1
    assert [one.name for one in run.participants] == ["client-0", "client-1"]


def test_spoilt_metric_of_one_client_does_not_spoil_the_evaluation(small: Settings) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and reply.metadata.message_type == "evaluate":
            reply.content["metrics"] = MetricRecord({"loss": math.nan, "accuracy": math.inf})
        return reply

    run = federate(small(num_rounds=1, client_evaluation="final"), simulated(3), tamper)
    assert all(math.isfinite(value) for value in run.outcome.client_metrics.values())


def test_when_every_client_failed_the_run_stops_with_the_reason_and_leaves_no_result(
    small: Settings,
) -> None:
    values = small()

    def fail(node: int, reply: Message) -> Message:
        if round_of(reply) == 2:
            reply.content["reply"] = ConfigRecord(
                {"status": "failed", "error": f"disk {node} full"}
            )
        return reply

    with pytest.raises(FedBTError, match=r"round 2: 0 of 3 clients .*disk 1\d full"):
        server_app.run(RecordingGrid(values, simulated(3), fail), RunConfig.load(values))
    folder = Path(values["output-dir"])
    assert not (folder / "report.json").exists()
    assert not (folder / "model").exists()


def test_counts_that_are_none_are_left_out_of_the_federations_scores(small: Settings) -> None:
    values = small(method="head", num_rounds=1, client_evaluation="final")
    honest = federate(values, simulated(3)).outcome.client_metrics
    assert honest["accuracy"] >= 0
    for spoilt in (
        {"loss": math.nan},
        {"loss": math.inf},
        {"true_0": -1.0},
        {"hit_0": 1e300},
        {"not a name": 1.0},
    ):

        def tamper(node: int, reply: Message, spoilt: dict[str, float] = spoilt) -> Message:
            if node == THIRD and reply.metadata.message_type == "evaluate":
                reply.content["tally"] = MetricRecord(spoilt)
            return reply

        run = federate(values, simulated(3), tamper)
        assert [refusal.client for refusal in run.refusals] == ["client-2"], spoilt
        found = run.outcome.client_metrics
        assert all(math.isfinite(value) and value >= 0 for value in found.values()), spoilt
        assert found.keys() == honest.keys()
