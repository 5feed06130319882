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
from fedbt_app.tasks.base import Fit
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

OK, LACKING, FAILED = "ok", "lacking", "failed"
# of any kind, from one client: sums and shares of more are no numbers any longer
LARGEST_COUNT = 1e15  # of an evaluation: sums of such are exact, and no site has so many rows
MOST_COUNTS = 3 * MOST_LABELS + 10  # names in it: true, predicted and hit for each label
LARGEST_COST = 1e24


@dataclass(frozen=True)
class Sync:
    """The updates that a pool lacks and the states that it must then have."""

    lineage: str
    updates: list[Update]
    expected: dict[str, PartState]


@dataclass(frozen=True)
class Request:
    """What the server asks. A query brings no more than the lineage; `plan` is for
    training only.
    """

    sync: Sync
    labels: tuple[str, ...] = ()
    plan: RoundPlan | None = None


@dataclass(frozen=True)
class Reply:
    """What a client answers to any request.

    status OK, LACKING (the pool is not as expected: `held` says what it has; send the rest), or
    FAILED (`error` says why, in one line). `tally` are an evaluation's counts, which add up over sites.
    """

    status: str = OK
    error: str = ""
    held: dict[str, PartState] | None = None
    examples: int = 0
    metrics: dict[str, float] | None = None
    tally: dict[str, float] | None = None
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
    fit: Fit
    held: dict[str, PartState]


# What has a record of its own in the answer to a query.
APART = ("label_counts", "fit", "held")


def request_record(request: Request) -> RecordDict:
    """Put a request into Flower records."""
    sync = request.sync
    run = ConfigRecord({"lineage": sync.lineage, "labels": list(request.labels)})
    updates = ConfigRecord(
        {
            "parts": [update.part for update in sync.updates],
            "kinds": [update.kind for update in sync.updates],
            "versions": [update.state.version for update in sync.updates],
            "digests": [update.state.digest for update in sync.updates],
        }
    )
    arrays, headers = encoded_records(
        {step(update.part, update.state): update.encoded for update in sync.updates}
    )
    content = RecordDict(
        {
            "run": run,
            "expected": states_record(sync.expected),
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
    return checked("the server's request", lambda: _read_request(message.content))


def _read_request(content: Any) -> Request:
    run, updates, encoded = (
        content["run"],
        content["updates"],
        read_encoded(content["parts"], content["headers"]),
    )
    states = [
        PartState(count(v), of_type(d, str))
        for v, d in zip(updates["versions"], updates["digests"], strict=True)
    ]
    listed = zip(updates["parts"], updates["kinds"], states, strict=True)
    sync = Sync(
        lineage=of_type(run["lineage"], str),
        updates=[
            Update(part, one_of(kind, (DELTA, VALUE)), state, encoded[step(part, state)])
            for part, kind, state in listed
        ],
        expected=read_states(content["expected"]),
    )
    plan = None
    if "plan" in content:
        raw = content["plan"]
        plan = RoundPlan(
            round=of_type(raw["round"], int),
            local_blocks=tuple(map(int, raw["local-blocks"])),
            trained_blocks=tuple(map(int, raw["trained-blocks"])),
            embeddings=of_type(raw["embeddings"], bool),
            adapters=of_type(raw["adapters"], bool),
        )
    return Request(sync, tuple(map(str, run["labels"])), plan)


def reply_message(reply: Reply, message: Message) -> Message:
    """Answer `message`; the reply states its own serialised size, and the request's."""
    arrays, headers = encoded_records(reply.deltas or {})
    costs = replace(
        reply.costs,
        downlink_payload_bytes=payload_bytes(message.content),
        downlink_serialised_bytes=serialised_bytes(message),
        uplink_payload_bytes=sum(encoded.nbytes for encoded in (reply.deltas or {}).values()),
    )
    content = RecordDict(
        {
            "reply": ConfigRecord({"status": reply.status, "error": reply.error}),
            "held": states_record(reply.held or {}),
            "counts": MetricRecord({"num-examples": reply.examples}),
            "metrics": MetricRecord(dict(reply.metrics or {})),
            "tally": MetricRecord(dict(reply.tally or {})),
            "headers": headers,
            "parts": arrays,
        }
    )

    def with_costs(measured: ClientCosts) -> Message:
        # as floats, whose encoding has one size: stating the size does not change it
        content["costs"] = MetricRecord(
            {name: float(value) for name, value in asdict(measured).items()}
        )
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
    return checked("the client's reply", lambda: _read_reply(message.content))


def _read_reply(content: Any) -> Reply:
    kinds: dict[str, Any] = {spec.name: spec.type for spec in fields(ClientCosts)}  # int or float
    costs = content["costs"]
    for name in kinds:
        if not 0 <= costs[name] <= LARGEST_COST:  # NaN is neither
            raise ValueError(f"cost {name} is not a number of zero or more")
    return Reply(
        status=one_of(content["reply"]["status"], (OK, LACKING, FAILED)),
        error=one_line(content["reply"]["error"]),
        held=read_states(content["held"]),
        examples=count(content["counts"]["num-examples"]),
        metrics={metric(name): float(value) for name, value in content["metrics"].items()},
        tally=_read_tally(content["tally"]),
        costs=ClientCosts(**{name: kind(costs[name]) for name, kind in kinds.items()}),
        deltas=read_encoded(content["parts"], content["headers"]),
    )


def _read_tally(record: Mapping[str, float]) -> dict[str, float]:
    """Read an evaluation's counts; FedBTError where one of them is no count."""
    tally = {metric(name): float(value) for name, value in record.items()}
    if len(tally) > MOST_COUNTS or not all(0 <= value <= LARGEST_COUNT for value in tally.values()):
        raise FedBTError(
            "gave scores that are no counts: its evaluation is left out"
        )  # NaN is none, too
    return tally


def capabilities_message(capabilities: Capabilities, message: Message) -> Message:
    """Answer a query."""
    plain = {name: value for name, value in asdict(capabilities).items() if name not in APART}
    content = RecordDict(
        {
            "capabilities": ConfigRecord(plain),
            "labels": ConfigRecord(
                {
                    "names": list(capabilities.label_counts),
                    "counts": list(capabilities.label_counts.values()),
                }
            ),
            "fit": ConfigRecord(asdict(capabilities.fit)),
            "held": states_record(capabilities.held),
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
    return checked("the client's answer to the query", lambda: _read_capabilities(message.content))


def _read_capabilities(content: Any) -> Capabilities:
    if one_of(content["reply"]["status"], (OK, FAILED)) == FAILED:
        raise FedBTError(one_line(content["reply"]["error"]) or "the client gives no reason")
    plain, labels = content["capabilities"], content["labels"]
    wanted = {spec.name: spec.type for spec in fields(Capabilities) if spec.name not in APART}
    values: dict[str, Any] = {name: of_type(plain[name], kind) for name, kind in wanted.items()}  # type: ignore[arg-type]
    for name in ("examples", "heldout", "local_depth"):
        count(values[name])
    values |= {name: one_line(values[name]) for name in ("name", "base", "device")}
    names, counts = labels["names"], labels["counts"]
    if len(names) > MOST_LABELS or any(
        not of_type(name, str).isprintable() or len(name) > LONGEST_LABEL for name in names
    ):
        raise FedBTError(
            f"it has more than {MOST_LABELS} labels, or one that is no name: check its label-column"
        )
    return Capabilities(
        **values,
        label_counts={name: count(number) for name, number in zip(names, counts, strict=True)},
        fit=Fit(**{spec.name: count(content["fit"][spec.name]) for spec in fields(Fit)}),
        held=read_states(content["held"]),
    )


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of tensor data in a message, without names, headers or framing."""
    return sum(viewed(array).nbytes for array in content.array_records.get("parts", {}).values())


def _refuse_errors(message: Message) -> None:
    """Raise for an answer that Flower made because the node gave none."""
    if message.has_error():
        raise FedBTError(
            f"no answer from the node ({one_line(message.error.reason or 'reason unknown')})"
        )
