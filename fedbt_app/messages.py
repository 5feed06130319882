"""The wire schema: what server and client say to each other, as Flower records.

The only file that knows record keys. Whatever arrives is checked here for shape and type before
anything uses it; nothing is unpickled (Flower reads arrays with pickling off).
"""

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedbt_app.codec import Encoded
from fedbt_app.config import LONGEST_LABEL, MOST_LABELS
from fedbt_app.costs import ClientCosts
from fedbt_app.errors import FedBTError
from fedbt_app.plan import RoundPlan
from fedbt_app.pool import PartState
from fedbt_app.state import DELTA, VALUE, Update

OK, LACKING, FAILED = "ok", "lacking", "failed"
LARGEST_COST = 1e24  # of any kind, from one client: sums and shares of more are no numbers any longer

T = TypeVar("T")


@dataclass(frozen=True)
class Sync:
    """The updates that a pool lacks and the states that it must then have."""

    lineage: str
    updates: list[Update]
    expected: dict[str, PartState]


@dataclass(frozen=True)
class Request:
    """What the server asks. A query brings no more than the lineage; `plan` is for training only."""

    sync: Sync
    labels: tuple[str, ...] = ()
    plan: RoundPlan | None = None


@dataclass(frozen=True)
class Reply:
    """What a client answers to any request.

    status OK, LACKING (the pool is not as expected: `held` says what it has; send the rest), or
    FAILED (`error` says why, in one line).
    """

    status: str = OK
    error: str = ""
    held: dict[str, PartState] | None = None
    examples: int = 0
    metrics: dict[str, float] | None = None
    costs: ClientCosts = field(default_factory=ClientCosts)
    deltas: dict[str, Encoded] | None = None


@dataclass(frozen=True)
class Capabilities:
    """A client's answer to the query: names and counts, no text."""

    name: str
    fingerprint: str
    base: str
    examples: int
    heldout: int
    local_depth: int
    device: str
    label_counts: dict[str, int]
    held: dict[str, PartState]


def request_record(request: Request) -> RecordDict:
    """Put a request into Flower records."""
    sync = request.sync
    run = ConfigRecord({"lineage": sync.lineage, "labels": list(request.labels)})
    updates = ConfigRecord(
        {
            "parts": [update.part for update in sync.updates],
            "late": [update.late for update in sync.updates],
            "kinds": [update.kind for update in sync.updates],
            "versions": [update.state.version for update in sync.updates],
            "digests": [update.state.digest for update in sync.updates],
        }
    )
    arrays, headers = _encoded_records({_step(update.part, update.state): update.encoded for update in sync.updates})
    content = RecordDict(
        {
            "run": run,
            "expected": _states_record(sync.expected),
            "updates": updates,
            "headers": headers,
            "parts": arrays,
        }
    )
    if request.plan is not None:
        plan = request.plan
        content["plan"] = ConfigRecord(
            {
                "round": plan.round,
                "local-blocks": list(plan.local_blocks),
                "trained-blocks": list(plan.trained_blocks),
                "embeddings": plan.embeddings,
                "adapters": plan.adapters,
            }
        )
    return content


def read_request(message: Message) -> Request:
    """Read a request on the client."""
    return _checked("the server's request", lambda: _read_request(message.content))


def _read_request(content: Any) -> Request:
    run, updates, encoded = content["run"], content["updates"], _read_encoded(content)
    states = [
        PartState(_count(v), _of_type(d, str)) for v, d in zip(updates["versions"], updates["digests"], strict=True)
    ]
    listed = zip(updates["parts"], updates["kinds"], states, updates["late"], strict=True)
    sync = Sync(
        lineage=_of_type(run["lineage"], str),
        updates=[
            Update(part, _one_of(kind, (DELTA, VALUE)), state, encoded[_step(part, state)], _of_type(late, bool))
            for part, kind, state, late in listed
        ],
        expected=_read_states(content["expected"]),
    )
    plan = None
    if "plan" in content:
        raw = content["plan"]
        plan = RoundPlan(
            round=_of_type(raw["round"], int),
            local_blocks=tuple(map(int, raw["local-blocks"])),
            trained_blocks=tuple(map(int, raw["trained-blocks"])),
            embeddings=_of_type(raw["embeddings"], bool),
            adapters=_of_type(raw["adapters"], bool),
        )
    return Request(sync, tuple(map(str, run["labels"])), plan)


def reply_message(reply: Reply, message: Message) -> Message:
    """Answer `message`; the reply states its own serialised size, and the request's."""
    arrays, headers = _encoded_records(reply.deltas or {})
    costs = replace(
        reply.costs,
        downlink_payload_bytes=payload_bytes(message.content),
        downlink_serialised_bytes=serialised_bytes(message),
        uplink_payload_bytes=sum(encoded.nbytes for encoded in (reply.deltas or {}).values()),
    )
    content = RecordDict(
        {
            "reply": ConfigRecord({"status": reply.status, "error": reply.error}),
            "held": _states_record(reply.held or {}),
            "counts": MetricRecord({"num-examples": reply.examples}),
            "metrics": MetricRecord(dict(reply.metrics or {})),
            "headers": headers,
            "parts": arrays,
        }
    )

    def with_costs(measured: ClientCosts) -> Message:
        # as floats, whose encoding has one size: stating the size does not change it
        content["costs"] = MetricRecord({name: float(value) for name, value in asdict(measured).items()})
        return Message(content, reply_to=message)

    return with_costs(replace(costs, uplink_serialised_bytes=serialised_bytes(with_costs(costs))))


def read_reply(message: Message) -> Reply:
    """Read any reply on the server.

    Raises
    ------
    FedBTError
        When the node failed, or sent something that is not a reply of FedBT.
    """
    _refuse_errors(message)
    return _checked("the client's reply", lambda: _read_reply(message.content))


def _read_reply(content: Any) -> Reply:
    kinds: dict[str, Callable[[float], Any]] = {spec.name: spec.type for spec in fields(ClientCosts)}  # type: ignore[misc]
    costs = content["costs"]
    for name in kinds:
        if not 0 <= costs[name] <= LARGEST_COST:  # NaN is neither
            raise ValueError(f"cost {name} is not a number of zero or more")
    return Reply(
        status=_one_of(content["reply"]["status"], (OK, LACKING, FAILED)),
        error=_one_line(content["reply"]["error"]),
        held=_read_states(content["held"]),
        examples=_count(content["counts"]["num-examples"]),
        metrics={_metric(name): float(value) for name, value in content["metrics"].items()},
        costs=ClientCosts(**{name: kind(costs[name]) for name, kind in kinds.items()}),
        deltas=_read_encoded(content),
    )


def capabilities_message(capabilities: Capabilities, message: Message) -> Message:
    """Answer a query."""
    plain = {name: value for name, value in asdict(capabilities).items() if name not in ("label_counts", "held")}
    content = RecordDict(
        {
            "capabilities": ConfigRecord(plain),
            "labels": ConfigRecord(
                {"names": list(capabilities.label_counts), "counts": list(capabilities.label_counts.values())}
            ),
            "held": _states_record(capabilities.held),
            "reply": ConfigRecord({"status": OK, "error": ""}),
        }
    )
    return Message(content, reply_to=message)


def refusal_message(error: str, message: Message) -> Message:
    """Answer any request with one line on why the client can't do it."""
    return reply_message(Reply(status=FAILED, error=error), message)


def read_capabilities(message: Message) -> Capabilities:
    """Read the answer to a query; FedBTError when the client failed or refused."""
    _refuse_errors(message)
    return _checked("the client's answer to the query", lambda: _read_capabilities(message.content))


def _read_capabilities(content: Any) -> Capabilities:
    if _one_of(content["reply"]["status"], (OK, FAILED)) == FAILED:
        raise FedBTError(_one_line(content["reply"]["error"]) or "the client gives no reason")
    plain, labels = content["capabilities"], content["labels"]
    wanted = {spec.name: spec.type for spec in fields(Capabilities) if spec.name not in ("label_counts", "held")}
    values: dict[str, Any] = {name: _of_type(plain[name], kind) for name, kind in wanted.items()}  # type: ignore[arg-type]
    for name in ("examples", "heldout", "local_depth"):
        _count(values[name])
    values |= {name: _one_line(values[name]) for name in ("name", "base", "device")}
    names, counts = labels["names"], labels["counts"]
    if len(names) > MOST_LABELS or any(_one_line(name) != name or len(name) > LONGEST_LABEL for name in names):
        raise FedBTError(f"it has more than {MOST_LABELS} labels, or one that is no name: check its label-column")
    return Capabilities(
        **values,
        label_counts={name: _count(number) for name, number in zip(names, counts, strict=True)},
        held=_read_states(content["held"]),
    )


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of tensor data in a message, without names, headers or framing."""
    return sum(_array(array).nbytes for array in content.array_records.get("parts", {}).values())


def serialised_bytes(message: Message) -> int:
    """Return the bytes that Flower transfers for `message`: its objects, each once, and their tree.

    Uses private functions of Flower, as there is no public one.
    """
    with no_object_id_recompute():  # else every level hashes all levels below it again
        objects = get_all_nested_objects(message)
        return sum(len(item.deflate()) for item in objects.values()) + get_object_tree(message).ByteSize()


def _encoded_records(encoded: Mapping[str, Encoded]) -> tuple[ArrayRecord, ConfigRecord]:
    arrays = {f"{part}/{name}": Array(array) for part, item in encoded.items() for name, array in item.arrays.items()}
    return ArrayRecord(arrays), ConfigRecord({part: item.header for part, item in encoded.items()})


def _read_encoded(content: Any) -> dict[str, Encoded]:
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, array in content["parts"].items():
        part, _, key = name.rpartition("/")
        grouped.setdefault(part, {})[key] = _array(array)
    headers = content["headers"]
    return {part: Encoded(grouped.pop(part, {}), _of_type(headers[part], str)) for part in headers} | {
        part: Encoded(arrays, "") for part, arrays in grouped.items()
    }


def _states_record(states: Mapping[str, PartState]) -> ConfigRecord:
    return ConfigRecord({part: json.dumps([state.version, state.digest]) for part, state in states.items()})


def _read_states(record: Mapping[str, Any]) -> dict[str, PartState]:
    states = {}
    for part, text in record.items():
        version, digest = json.loads(text)
        states[part] = PartState(_count(version), _of_type(digest, str))
    return states


def _refuse_errors(message: Message) -> None:
    """Raise for an answer that Flower made because the node gave none."""
    if message.has_error():
        raise FedBTError(f"no answer from the node ({_one_line(message.error.reason or 'reason unknown')})")


def _checked(what: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except FedBTError:
        raise
    except Exception as reason:  # whatever a stranger's message makes go wrong
        detail = f"missing {reason}" if isinstance(reason, KeyError) else type(reason).__name__
        raise FedBTError(f"{what} is malformed ({detail}): run the same FedBT version on both sides") from None


def _array(array: Any) -> np.ndarray:
    """View the data of a Flower array without copying; ValueError when it is not exactly as long as it says."""
    stream = io.BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of an unknown format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(array.data) - stream.tell():
        raise ValueError("an array of another length than it says")
    return np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape)


def _step(part: str, state: PartState) -> str:
    return f"{part}@{state.version}"


def _one_line(text: Any) -> str:
    """What a client says must not look like more than one line of the log, nor move a terminal's cursor."""
    return "".join(filter(str.isprintable, " ".join(_of_type(text, str).split())))[:500]


def _metric(name: str) -> str:
    if not name.isidentifier() or len(name) > LONGEST_LABEL:
        raise ValueError("a metric's name is not one")
    return name


def _of_type(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(kind)
    return value


def _one_of(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(choices)
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a count is negative or not whole")
    return value
