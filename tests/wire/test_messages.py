"""The wire schema: round trips through Flower's serialisation, malformed replies, stated sizes."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.task_identity import TaskIdentity

from fedbt_app.codec.codec import Encoded, encode
from fedbt_app.costs.ledger import ClientCosts
from fedbt_app.errors import FedBTError
from fedbt_app.parts import PartState
from fedbt_app.plan import RoundPlan
from fedbt_app.tasks.fit import Fit
from fedbt_app.wire.local_grid import over_the_wire
from fedbt_app.wire.messages import (
    FAILED,
    LACKING,
    Capabilities,
    Reply,
    Request,
    Sync,
    capabilities_message,
    payload_bytes,
    read_capabilities,
    read_reply,
    read_request,
    refusal_message,
    reply_message,
    request_record,
)
from fedbt_app.wire.records import serialised_bytes
from fedbt_app.wire.updates import DELTA, VALUE, Update

CODECS = ("float32", "bf16", "int4+zstd")
LINEAGE = "0123456789abcdef" * 2
HEAD = {
    "cls.predictions.bias": torch.arange(50.0),
    "cls.predictions.transform.dense.weight": torch.eye(8),
}
BLOCK = {"bert.encoder.layer.3.output.dense.weight": torch.linspace(-1, 1, 96).reshape(8, 12)}
PLAN = RoundPlan(2, (0, 1, 3, 3), (1,), embeddings=False, adapters=True)
COSTS = ClientCosts(
    train_flops=10**14, stock_flops=3, same_flops=2, seconds=1.25, peak_memory_bytes=2**31
)


@pytest.fixture(autouse=True)
def task() -> None:
    """Let this process make messages."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def sent(content: RecordDict, kind: str = "train") -> Message:
    """Return a message as the client receives it."""
    message = Message(content, dst_node_id=7, message_type=kind, group_id="1")
    message.metadata.__dict__["_message_id"] = message.object_id
    return over_the_wire(message)


def a_request(codec: str = "float32", plan: RoundPlan | None = PLAN) -> Request:
    updates = [
        Update("head", VALUE, PartState(0, "a" * 64), encode(HEAD, "float32")),
        Update("block.3", DELTA, PartState(4, "b" * 64), encode(BLOCK, codec)),
    ]
    expected = {
        "head": PartState(0, "a" * 64),
        "block.3": PartState(4, "b" * 64),
        "adapter.2": PartState(1, "c" * 64),
    }
    return Request(Sync(LINEAGE, updates, expected), ("O", "B-Organ", "é,ü"), plan)


def a_reply(codec: str = "float32") -> Reply:
    return Reply(
        held={"head": PartState(0, "a" * 64)},
        examples=120,
        metrics={"train_loss": 1.5},
        costs=COSTS,
        deltas={"head": encode(HEAD, codec), "block.3": encode(BLOCK, codec)},
    )


CAPABILITIES = Capabilities(
    name="clinic",
    fingerprint="f" * 64,
    base="bert-base-uncased",
    tokenizer="e" * 64,
    tokenizer_description="30522 pieces, lower-casing",
    examples=120,
    heldout=13,
    local_depth=6,
    device="cuda:1",
    label_counts={"heart": 70, "liver": 63},
    fit=Fit(rows=133, rows_cut=7, pieces=9000, pieces_cut=120, unknown=3),
    held={"head": PartState(2, "d" * 64)},
)


def assert_same(one: Encoded, other: Encoded) -> None:
    assert one.header == other.header
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype
        assert np.array_equal(array, other.arrays[name])


def test_request_survives_the_wire() -> None:
    for codec, plan in product(CODECS, (PLAN, None)):
        request = a_request(codec, plan)
        read = read_request(sent(request_record(request)))
        assert (read.labels, read.plan) == (request.labels, request.plan)
        assert (read.sync.lineage, read.sync.expected) == (LINEAGE, request.sync.expected)
        for one, other in zip(read.sync.updates, request.sync.updates, strict=True):
            assert (one.part, one.kind, one.state) == (other.part, other.kind, other.state)
            assert_same(one.encoded, other.encoded)


def test_query_survives_the_wire() -> None:
    query = Request(Sync(LINEAGE, [], {}))
    assert read_request(sent(request_record(query), "query")) == query


def test_reply_survives_the_wire() -> None:
    for codec in CODECS:
        reply, message = a_reply(codec), sent(request_record(a_request()))
        read = read_reply(over_the_wire(reply_message(reply, message)))
        assert (read.status, read.error) == ("ok", "")
        assert (read.held, read.examples, read.metrics) == (
            reply.held,
            reply.examples,
            reply.metrics,
        )
        for name in ("train_flops", "stock_flops", "same_flops", "seconds", "peak_memory_bytes"):
            assert getattr(read.costs, name) == getattr(COSTS, name)
        assert read.deltas is not None
        assert reply.deltas is not None
        assert read.deltas.keys() == reply.deltas.keys()
        for part, encoded in read.deltas.items():
            assert_same(encoded, reply.deltas[part])


def test_reply_of_a_client_that_lacks_parts_survives_the_wire() -> None:
    reply = Reply(LACKING, held={"block.0": PartState(1, "e" * 64)})
    read = read_reply(over_the_wire(reply_message(reply, sent(request_record(a_request())))))
    assert (read.status, read.held, read.deltas) == (LACKING, reply.held, {})


def test_refusal_survives_the_wire() -> None:
    read = read_reply(
        over_the_wire(refusal_message("no space left", sent(request_record(a_request()))))
    )
    assert (read.status, read.error, read.examples) == (FAILED, "no space left", 0)


def test_capabilities_survive_the_wire() -> None:
    message = sent(request_record(Request(Sync(LINEAGE, [], {}))), "query")
    assert (
        read_capabilities(over_the_wire(capabilities_message(CAPABILITIES, message)))
        == CAPABILITIES
    )


def test_capabilities_hold_names_and_counts_and_nothing_else() -> None:
    message = sent(request_record(Request(Sync(LINEAGE, [], {}))), "query")
    content = over_the_wire(capabilities_message(CAPABILITIES, message)).content
    assert {name: dict(record) for name, record in content.items()} == {
        "capabilities": {
            **{"name": "clinic", "fingerprint": "f" * 64, "base": "bert-base-uncased"},
            "tokenizer": "e" * 64,
            "tokenizer_description": "30522 pieces, lower-casing",
            **{"examples": 120, "heldout": 13, "local_depth": 6, "device": "cuda:1"},
        },
        "labels": {"names": ["heart", "liver"], "counts": [70, 63]},
        "fit": asdict(CAPABILITIES.fit),
        "held": {"head": json.dumps([2, "d" * 64])},
        "reply": {"status": "ok", "error": "", "name": "clinic"},
    }


def test_reply_has_these_records_and_no_other() -> None:
    content = reply_message(a_reply(), sent(request_record(a_request()))).content
    assert {name: set(record) for name, record in content.items()} == {
        "reply": {"status", "error", "name"},
        "held": {"head"},
        "counts": {"num-examples"},
        "metrics": {"train_loss"},
        "tally": set(),
        "costs": set(asdict(COSTS)),
        "headers": {"head", "block.3"},
        "parts": {"head/values", "block.3/values"},
    }


# Sizes --------------------------------------------------------------------------------------------


def transferred(message: Message) -> int:
    """Push `message` as Flower does and return the bytes that go out."""
    pushed: list[int] = []
    tree = get_object_tree(message).SerializeToString()
    push_objects(get_all_nested_objects(message), lambda name, content: pushed.append(len(content)))
    return sum(pushed) + len(tree)


def test_reply_states_its_own_serialised_size_and_that_of_the_request() -> None:
    request = sent(request_record(a_request()))
    for reply in (a_reply(), Reply(), Reply(LACKING, held={})):
        message = over_the_wire(reply_message(reply, request))
        costs = read_reply(message).costs
        assert costs.uplink_serialised_bytes == serialised_bytes(message) == transferred(message)
        assert costs.downlink_serialised_bytes == serialised_bytes(request) == transferred(request)


def test_payload_is_the_tensors_alone() -> None:
    request = sent(request_record(a_request()))
    costs = read_reply(reply_message(a_reply(), request)).costs
    tensors = sum(tensor.nbytes for part in (HEAD, BLOCK) for tensor in part.values())
    assert payload_bytes(request.content) == costs.downlink_payload_bytes == tensors
    assert costs.uplink_payload_bytes == tensors
    assert payload_bytes(RecordDict()) == 0


def test_serialised_size_grows_with_the_payload() -> None:
    request = request_record(a_request())
    more = replace(a_request(), labels=("O",) * 1000)
    assert serialised_bytes(sent(request)) > payload_bytes(request)
    assert serialised_bytes(sent(request_record(more))) > serialised_bytes(sent(request)) + 1000


# Malformed ----------------------------------------------------------------------------------------


def drop(record: str, key: str = "") -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        if key:
            del content[record][key]  # type: ignore[union-attr, arg-type]
        else:
            del content[record]

    return change


def put(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content[record].__setitem__(key, value)  # type: ignore[union-attr]


def replaced(record: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.__setitem__(record, value)


Spoilt = dict[str, Callable[[RecordDict], None]]


def complaint(read: Callable[[Message], Any], message: Message) -> str:
    """Return what reading a message fails with; empty where it does not."""
    try:
        read(over_the_wire(message))
    except FedBTError as error:
        return str(error)
    return ""


def assert_refused(
    read: Callable[[Message], Any], make: Callable[[], Message], spoilt: Spoilt, problem: str
) -> None:
    """Assert that each change of a fresh message makes reading it fail in one line."""
    for kind, change in spoilt.items():
        message = make()
        change(message.content)
        said = complaint(read, message)
        assert problem in said, kind
        assert len(said.splitlines()) == 1, kind


REPLY_SPOILT: Spoilt = {
    **{
        f"no {name}": drop(name)
        for name in ("reply", "held", "counts", "metrics", "costs", "headers", "parts")
    },
    "no status": drop("reply", "status"),
    "no error": drop("reply", "error"),
    "no count": drop("counts", "num-examples"),
    **{f"no {name}": drop("costs", name) for name in asdict(COSTS)},
    **{f"nan {name}": put("costs", name, math.nan) for name in asdict(COSTS)},
    **{f"infinite {name}": put("costs", name, math.inf) for name in asdict(COSTS)},
    **{f"negative {name}": put("costs", name, -1.0) for name in asdict(COSTS)},
    **{f"absurd {name}": put("costs", name, 1e25) for name in asdict(COSTS)},
    "line as metric": put("metrics", "loss 0.1\nfedbt: round 9", 1.0),
    "list as cost": put("costs", "seconds", [1.0, 2.0]),
    "unknown status": put("reply", "status", "great"),
    "number as status": put("reply", "status", 1),
    "number as error": put("reply", "error", 1),
    "list as error": put("reply", "error", ["a", "b"]),
    "negative count": put("counts", "num-examples", -1),
    "float as count": put("counts", "num-examples", 1.0),
    "list as count": put("counts", "num-examples", [1]),
    "list as metric": put("metrics", "train_loss", [1.0]),
    "held no json": put("held", "head", "?"),
    "held one entry": put("held", "head", "[1]"),
    "held negative version": put("held", "head", '[-1, "a"]'),
    "held number as digest": put("held", "head", "[1, 2]"),
    "held number": put("held", "head", 3),
    "header number": put("headers", "head", 3),
    "header list": put("headers", "head", ["a"]),
    "arrays as metrics": replaced("parts", MetricRecord({"head/values": 1.0})),
    "reply as arrays": replaced("reply", ArrayRecord()),
    "costs as config": replaced("costs", ConfigRecord({"seconds": "1"})),
}


def test_malformed_reply_is_refused_in_one_line() -> None:
    request = sent(request_record(a_request()))
    assert_refused(
        read_reply,
        lambda: reply_message(a_reply(), request),
        REPLY_SPOILT,
        "the client's reply is malformed",
    )


REQUEST_SPOILT: Spoilt = {
    **{f"no {name}": drop(name) for name in ("run", "expected", "updates", "headers", "parts")},
    "unknown kind": put("updates", "kinds", ["value", "guess"]),
    "unequal lists": put("updates", "parts", ["head"]),
    "part without tensors": put("updates", "parts", ["head", "block.2"]),
    "number as lineage": put("run", "lineage", 5),
    "text as round": put("plan", "round", "2"),
    "number as flag": put("plan", "adapters", 1),
    "number as blocks": put("plan", "local-blocks", 3),
}


def test_malformed_request_is_refused_in_one_line() -> None:
    def make() -> Message:
        return Message(
            request_record(a_request()), dst_node_id=7, message_type="train", group_id="1"
        )

    assert_refused(read_request, make, REQUEST_SPOILT, "the server's request is malformed")


CAPABILITIES_SPOILT: Spoilt = {
    **{f"no {name}": drop(name) for name in ("capabilities", "labels", "held", "reply")},
    **{
        f"no {name}": drop("capabilities", name)
        for name in ("name", "fingerprint", "examples", "device")
    },
    "number as name": put("capabilities", "name", 5),
    "text as examples": put("capabilities", "examples", "5"),
    "negative examples": put("capabilities", "examples", -5),
    "negative heldout": put("capabilities", "heldout", -5),
    "negative depth": put("capabilities", "local_depth", -5),
    "unequal lists": put("labels", "counts", [1]),
    "negative label count": put("labels", "counts", [1, -1]),
    "numbers as labels": put("labels", "names", [1, 2]),
    "unknown status": put("reply", "status", "great"),
}


def test_malformed_answer_to_the_query_is_refused_in_one_line() -> None:
    query = sent(request_record(Request(Sync(LINEAGE, [], {}))), "query")
    assert_refused(
        read_capabilities,
        lambda: capabilities_message(CAPABILITIES, query),
        CAPABILITIES_SPOILT,
        "malformed",
    )


def test_labels_that_are_no_names_are_refused() -> None:
    for names in (["a\nb"], ["a" * 101], [str(number) for number in range(5001)]):
        message = capabilities_message(
            CAPABILITIES, sent(request_record(Request(Sync(LINEAGE, [], {}))), "query")
        )
        message.content["labels"] = ConfigRecord({"names": names, "counts": [1] * len(names)})
        with pytest.raises(FedBTError, match="more than 5000 labels, or one that is no name"):
            read_capabilities(over_the_wire(message))


def test_what_a_client_says_cannot_move_a_terminals_cursor() -> None:
    message = refusal_message("disk\x1b[2J full\x07\n\nnow", sent(request_record(a_request())))
    assert read_reply(message).error == "disk[2J full now"


def test_refusal_of_a_query_gives_its_reason() -> None:
    message = refusal_message(
        "no such folder", sent(request_record(Request(Sync(LINEAGE, [], {}))), "query")
    )
    with pytest.raises(FedBTError, match=r"^no such folder$"):
        read_capabilities(over_the_wire(message))


def test_node_error_gives_its_reason() -> None:
    request = sent(request_record(a_request()))
    for read in (read_reply, read_capabilities):
        for reason, shown in {
            "Node Unavailable": "Node Unavailable",
            None: "reason unknown",
        }.items():
            with pytest.raises(FedBTError, match=shown):
                read(Message(Error(1, reason), reply_to=request))


def test_very_long_error_is_cut() -> None:
    message = refusal_message("x" * 10_000, sent(request_record(a_request())))
    assert len(read_reply(message).error) <= 500
