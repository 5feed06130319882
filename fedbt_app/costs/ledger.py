"""Measured costs: FLOPs by torch's dispatcher, bytes, seconds and peak memory; sums, never averages."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class ClientCosts:
    """What one client measured while it answered one message. Payload is tensor data, serialised all of it."""

    train_flops: int = 0
    stock_flops: int = 0  # the same batches in a stock full-model step, by formula: the report's reference
    same_flops: int = 0  # the same batches in full-model training with our optimisations, by formula
    downlink_payload_bytes: int = 0
    downlink_serialised_bytes: int = 0
    uplink_payload_bytes: int = 0
    uplink_serialised_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    prefix_cache_bytes: int = 0  # disk that holds the frozen blocks' output
    saved_flops: int = 0  # what the frozen blocks would have cost again without it, by formula


@dataclass
class Ledger:
    """The server's books: sums over clients, and the largest memory of any. By cause, each byte once."""

    train_flops: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    first_contact_bytes: int = 0
    catch_up_bytes: int = 0
    evaluation_bytes: int = 0
    client_seconds: float = 0.0
    peak_memory_bytes: int = 0
    uplink_payload_bytes: int = 0
    downlink_payload_bytes: int = 0
    stock_flops: int = 0
    same_flops: int = 0
    saved_flops: int = 0
    prefix_cache_bytes: int = 0  # of the client with the largest
    healed_parts: int = 0  # sent again, whole, to a client whose pool was not what it had said

    def add(self, other: "Ledger") -> None:
        """Sum everything; memory and cache are maxima."""
        for spec in fields(self):
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            combine = max if spec.name in ("peak_memory_bytes", "prefix_cache_bytes") else sum
            setattr(self, spec.name, combine((mine, theirs)))

    def book_work(self, costs: ClientCosts) -> None:
        """Book what a client computed."""
        self.train_flops += costs.train_flops
        self.stock_flops += costs.stock_flops
        self.same_flops += costs.same_flops
        self.client_seconds += costs.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, costs.peak_memory_bytes)
        self.prefix_cache_bytes = max(self.prefix_cache_bytes, costs.prefix_cache_bytes)
        self.saved_flops += costs.saved_flops

    def book_downlink(self, rest: str, serialised: int, payload_by_cause: dict[str, int]) -> None:
        """Book a message to a client: its parts by their cause, headers and all else under `rest`."""
        fields_ = {
            "round": "downlink_bytes",
            "first_contact": "first_contact_bytes",
            "catch_up": "catch_up_bytes",
        }
        for cause, size in payload_by_cause.items():
            setattr(self, fields_[cause], getattr(self, fields_[cause]) + size)
        self.downlink_payload_bytes += payload_by_cause.get("round", 0)
        setattr(self, rest, getattr(self, rest) + serialised - sum(payload_by_cause.values()))


@dataclass
class RoundEntry:
    """One line of rounds.jsonl and of the report's `rounds`."""

    round: int
    trained_blocks: list[int]
    clients: int
    train_flops: int
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run leaves, besides the model."""

    rounds: list[RoundEntry] = field(default_factory=list)
    cost: Ledger = field(default_factory=Ledger)
    full_bytes_up: int = 0  # what full-model averaging would have sent for the same exchanges
    full_bytes_down: int = 0
    client_metrics: dict[str, float] = field(default_factory=dict)
