"""The books: what clients measured, summed and never averaged; each byte once, by its cause."""

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class ClientCosts:
    """What one client measured while it answered one message.

    Payload bytes are those of tensor data, serialised bytes all of a message.
    """

    train_flops: int = 0
    # the same batches in a stock full-model step, by formula: the report's reference
    stock_flops: int = 0
    # the same batches in full-model training with our optimisations, by formula
    same_flops: int = 0
    downlink_payload_bytes: int = 0
    downlink_serialised_bytes: int = 0
    uplink_payload_bytes: int = 0
    uplink_serialised_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    prefix_cache_bytes: int = 0  # disk that holds the frozen blocks' output
    saved_flops: int = 0  # what the frozen blocks would have cost again without it, by formula


class Cause(Enum):
    """Why a part is sent to a client."""

    ROUND = "round"
    FIRST_CONTACT = "first contact"
    CATCH_UP = "catch-up"


@dataclass
class Downlink:
    """Payload bytes of one message to a client, by cause."""

    round: int = 0
    first_contact: int = 0
    catch_up: int = 0

    def add(self, cause: Cause, size: int) -> None:
        """Add the payload of one part."""
        match cause:
            case Cause.ROUND:
                self.round += size
            case Cause.FIRST_CONTACT:
                self.first_contact += size
            case Cause.CATCH_UP:
                self.catch_up += size

    @property
    def total(self) -> int:
        """All of it."""
        return self.round + self.first_contact + self.catch_up


@dataclass
class Ledger:
    """The server's books: sums over clients, and the largest memory of any; each byte once."""

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

    def book_work(self, costs: ClientCosts) -> None:
        """Book what a client computed."""
        self.train_flops += costs.train_flops
        self.stock_flops += costs.stock_flops
        self.same_flops += costs.same_flops
        self.client_seconds += costs.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, costs.peak_memory_bytes)
        self.prefix_cache_bytes = max(self.prefix_cache_bytes, costs.prefix_cache_bytes)
        self.saved_flops += costs.saved_flops

    def book_request(self, sent: Downlink, serialised: int, evaluation: bool) -> None:
        """Book a message to a client: its parts by cause, all else as of round or evaluation."""
        self.downlink_bytes += sent.round
        self.first_contact_bytes += sent.first_contact
        self.catch_up_bytes += sent.catch_up
        self.downlink_payload_bytes += sent.round
        rest = serialised - sent.total
        if evaluation:
            self.evaluation_bytes += rest
        else:
            self.downlink_bytes += rest


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

    @property
    def flops_since_last_round(self) -> int:
        """FLOPs booked since the last finished round: of repeated and stopped attempts too."""
        return self.cost.train_flops - sum(entry.train_flops for entry in self.rounds)

    @property
    def uplink_since_last_round(self) -> int:
        """Uplink bytes, likewise."""
        return self.cost.uplink_bytes - sum(entry.uplink_bytes for entry in self.rounds)

    @property
    def downlink_since_last_round(self) -> int:
        """Downlink bytes, likewise."""
        return self.cost.downlink_bytes - sum(entry.downlink_bytes for entry in self.rounds)
