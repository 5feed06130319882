"""The wire schema: what server and client say to each other, as Flower records.

The only file that knows record keys. Whatever arrives is checked for shape and type before anything
uses it; nothing is unpickled (Flower reads arrays with pickling off).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedbt_app.codec.codec import Encoded
from fedbt_app.config import LONGEST_LABEL, MOST_LABELS
from fedbt_app.costs.ledger import ClientCosts
from fedbt_app.errors import FedBTError
from fedbt_app.parts import PartState
from fedbt_app.plan import RoundPlan
from fedbt_app.tasks.fit import Fit
from fedbt_app.wire.records import (
    checked,
    count,
    encoded_records,
    metric,
    of_type,
    one_line,
    one_of,
    read_encoded,
    read_states,
    serialised_bytes,
    states_record,
    step,
    viewed,
)
from fedbt_app.wire.updates import DELTA, VALUE, Update

OK = "ok"
LACKING = "lacking"
FAILED = "failed"
# Of a client's Capabilities: what has a record of its own.
STRUCTURED = ("label_counts", "fit", "held")
ONE_LINE = ("name", "base", "tokenizer_description", "device")  # what people read of it
# Of any kind, from one client: sums and shares of more are no numbers any longer.
LARGEST_COST = 1e24
LARGEST_COUNT = 1e15  # of an evaluation: sums of such are exact, and no site has so many rows
MOST_COUNTS = 3 * MOST_LABELS + 10  # names in it: true, predicted and hit for each label


@dataclass(frozen=True)
class Sync:
    """The updates that a pool lacks and the states that it must then have."""

    lineage: str
    updates: list[Update]
    expected: dict[str, PartState]


@dataclass(frozen=True)
class Request:
    """What the server asks: a query with no more than the lineage, training with a `plan` too."""

    sync: Sync
    labels: tuple[str, ...] = ()
    plan: RoundPlan | None = None


@dataclass(frozen=True)
class Reply:
    """What a client answers to any request.

    status OK, LACKING (the pool is not as expected: `held` says what it has; send the rest), or
    FAILED (`error` says why, in one line, and `name` who). `tally` are an evaluation's counts,
    which add up over sites.
    """

    status: str = OK
    error: str = ""
    name: str = ""
    held: dict[str, PartState] | None = None
    examples: int = 0
    metrics: dict[str, float] | None = None
    tally: dict[str, float] | None = None
    costs: ClientCosts = field(default_factory=ClientCosts)
    deltas: dict[str, Encoded] | None = None


@dataclass(frozen=True)
class Capabilities:
    """A client's answer to the query: names and counts, no text.

    Attributes
    ----------
    fingerprint, tokenizer : of the base's weights, and of what its tokenizer does
    """

    name: str
    fingerprint: str
    base: str
    tokenizer: str
    tokenizer_description: str
    examples: int
    heldout: int
    local_depth: int
    device: str
    label_counts: dict[str, int]
    fit: Fit
    held: dict[str, PartState]


def request_record(request: Request) -> RecordDict:
    """Put a request into Flower records."""
    sync = request.sync
    encoded = {}
    for update in sync.updates:
        encoded[step(update.part, update.state)] = update.encoded
    arrays, headers = encoded_records(encoded)
    run: dict[str, Any] = {
        "lineage": sync.lineage,
        "labels": list(request.labels),
    }
    content = RecordDict(
        {
            "run": ConfigRecord(run),
            "expected": states_record(sync.expected),
            "updates": _updates_record(sync.updates),
            "headers": headers,
            "parts": arrays,
        }
    )
    if request.plan is not None:
        content["plan"] = _plan_record(request.plan)
    return content


def _updates_record(updates: list[Update]) -> ConfigRecord:
    return ConfigRecord(
        {
            "parts": [update.part for update in updates],
            "kinds": [update.kind for update in updates],
            "versions": [update.state.version for update in updates],
            "digests": [update.state.digest for update in updates],
        }
    )


def _plan_record(plan: RoundPlan) -> ConfigRecord:
    return ConfigRecord(
        {
            "round": plan.round,
            "local-blocks": list(plan.local_blocks),
            "trained-blocks": list(plan.trained_blocks),
            "embeddings": plan.embeddings,
            "adapters": plan.adapters,
        }
    )


def read_request(message: Message) -> Request:
    """Read a request on the client."""
    return checked("the server's request", lambda: _read_request(message.content))


def _read_request(content: Any) -> Request:
    run = content["run"]
    encoded = read_encoded(content["parts"], content["headers"])
    sync = Sync(
        lineage=of_type(run["lineage"], str),
        updates=_read_updates(content["updates"], encoded),
        expected=read_states(content["expected"]),
    )
    plan = None
    if "plan" in content:
        plan = _read_plan(content["plan"])
    labels = tuple(map(str, run["labels"]))
    return Request(sync, labels, plan)


def _read_updates(record: Any, encoded: Mapping[str, Encoded]) -> list[Update]:
    listed = zip(
        record["parts"],
        record["kinds"],
        record["versions"],
        record["digests"],
        strict=True,
    )
    updates = []
    for part, kind, version, digest in listed:
        state = PartState(count(version), of_type(digest, str))
        update = Update(
            part=part,
            kind=one_of(kind, (DELTA, VALUE)),
            state=state,
            encoded=encoded[step(part, state)],
        )
        updates.append(update)
    return updates


def _read_plan(record: Any) -> RoundPlan:
    return RoundPlan(
        round=of_type(record["round"], int),
        local_blocks=tuple(map(int, record["local-blocks"])),
        trained_blocks=tuple(map(int, record["trained-blocks"])),
        embeddings=of_type(record["embeddings"], bool),
        adapters=of_type(record["adapters"], bool),
    )


def reply_message(reply: Reply, message: Message) -> Message:
    """Answer `message`; the reply states its own serialised size, and the request's."""
    deltas = reply.deltas or {}
    content = _reply_content(reply, deltas)
    costs = replace(
        reply.costs,
        downlink_payload_bytes=payload_bytes(message.content),
        downlink_serialised_bytes=serialised_bytes(message),
        uplink_payload_bytes=sum(encoded.nbytes for encoded in deltas.values()),
    )

    def with_costs(measured: ClientCosts) -> Message:
        # as floats, whose encoding has one size: stating the size does not change it
        record = MetricRecord()
        for name, value in asdict(measured).items():
            record[name] = float(value)
        content["costs"] = record
        return Message(content, reply_to=message)

    size = serialised_bytes(with_costs(costs))
    return with_costs(replace(costs, uplink_serialised_bytes=size))


def _reply_content(reply: Reply, deltas: Mapping[str, Encoded]) -> RecordDict:
    arrays, headers = encoded_records(deltas)
    return RecordDict(
        {
            "reply": ConfigRecord(
                {"status": reply.status, "error": reply.error, "name": reply.name}
            ),
            "held": states_record(reply.held or {}),
            "counts": MetricRecord({"num-examples": reply.examples}),
            "metrics": MetricRecord(dict(reply.metrics or {})),
            "tally": MetricRecord(dict(reply.tally or {})),
            "headers": headers,
            "parts": arrays,
        }
    )


def read_reply(message: Message) -> Reply:
    """Read any reply on the server.

    Raises
    ------
    FedBTError
        When the node failed, or sent something that is not a reply of FedBT.
    """
    _refuse_errors(message)
    return checked("the client's reply", lambda: _read_reply(message.content))


def _read_reply(content: Any) -> Reply:
    costs = _read_costs(content["costs"])
    metrics = {}
    for name, value in content["metrics"].items():
        metrics[metric(name)] = float(value)
    answer = content["reply"]
    return Reply(
        status=one_of(answer["status"], (OK, LACKING, FAILED)),
        error=one_line(answer["error"]),
        held=read_states(content["held"]),
        examples=count(content["counts"]["num-examples"]),
        metrics=metrics,
        tally=_read_tally(content["tally"]),
        costs=costs,
        deltas=read_encoded(content["parts"], content["headers"]),
    )


def _read_tally(record: Any) -> dict[str, float]:
    """Read an evaluation's counts; FedBTError where one of them is no count."""
    tally = {metric(name): float(value) for name, value in record.items()}
    in_range = all(0 <= value <= LARGEST_COUNT for value in tally.values())  # NaN is not
    if len(tally) > MOST_COUNTS or not in_range:
        raise FedBTError("gave scores that are no counts: its evaluation is left out")
    return tally


def _read_costs(record: Any) -> ClientCosts:
    costs: dict[str, Any] = {}
    for spec in fields(ClientCosts):
        value = record[spec.name]
        if not 0 <= value <= LARGEST_COST:  # NaN is neither
            raise ValueError(f"cost {spec.name} is not a number of zero or more")
        kind: Any = spec.type  # int or float: all travel as floats
        costs[spec.name] = kind(value)
    return ClientCosts(**costs)


def capabilities_message(capabilities: Capabilities, message: Message) -> Message:
    """Answer a query."""
    plain = asdict(capabilities)
    for name in STRUCTURED:
        del plain[name]
    labels: dict[str, Any] = {
        "names": list(capabilities.label_counts),
        "counts": list(capabilities.label_counts.values()),
    }
    content = RecordDict(
        {
            "capabilities": ConfigRecord(plain),
            "labels": ConfigRecord(labels),
            "fit": ConfigRecord(asdict(capabilities.fit)),
            "held": states_record(capabilities.held),
            "reply": ConfigRecord({"status": OK, "error": "", "name": capabilities.name}),
        }
    )
    return Message(content, reply_to=message)


def refusal_message(error: str, message: Message, name: str = "") -> Message:
    """Answer any request with one line on why the client, by its name, can't do it."""
    return reply_message(Reply(status=FAILED, error=error, name=name), message)


def name_in(message: Message) -> str:
    """Return what the node of an answer calls itself, where it says so; else nothing."""
    try:
        return one_line(message.content["reply"]["name"])[:LONGEST_LABEL]
    except Exception:  # whatever a stranger's message makes go wrong
        return ""


def read_capabilities(message: Message) -> Capabilities:
    """Read the answer to a query; FedBTError when the client failed or refused."""
    _refuse_errors(message)
    return checked("the client's answer to the query", lambda: _read_capabilities(message.content))


def _read_capabilities(content: Any) -> Capabilities:
    if one_of(content["reply"]["status"], (OK, FAILED)) == FAILED:
        reason = one_line(content["reply"]["error"])
        raise FedBTError(reason or "the client gives no reason")
    plain = content["capabilities"]
    values: dict[str, Any] = {}
    for spec in fields(Capabilities):
        if spec.name not in STRUCTURED:
            kind: Any = spec.type
            values[spec.name] = of_type(plain[spec.name], kind)
    for name in ("examples", "heldout", "local_depth"):
        count(values[name])
    for name in ONE_LINE:
        values[name] = one_line(values[name])
    return Capabilities(
        **values,
        label_counts=_read_label_counts(content["labels"]),
        fit=_read_fit(content["fit"]),
        held=read_states(content["held"]),
    )


def _read_fit(record: Any) -> Fit:
    return Fit(**{spec.name: count(record[spec.name]) for spec in fields(Fit)})


def _read_label_counts(record: Any) -> dict[str, int]:
    names = record["names"]
    named = all(of_type(name, str).isprintable() and len(name) <= LONGEST_LABEL for name in names)
    if len(names) > MOST_LABELS or not named:
        raise FedBTError(
            f"it has more than {MOST_LABELS} labels, or one that is no name: check its label-column"
        )
    counts = map(count, record["counts"])
    return dict(zip(names, counts, strict=True))


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of tensor data in a message, without names, headers or framing."""
    arrays: Mapping[str, Any] = content.array_records.get("parts", {})
    return sum(viewed(array).nbytes for array in arrays.values())


def _refuse_errors(message: Message) -> None:
    """Raise for an answer that Flower made because the node gave none."""
    if message.has_error():
        reason = one_line(message.error.reason or "reason unknown")
        raise FedBTError(f"no answer from the node ({reason})")
