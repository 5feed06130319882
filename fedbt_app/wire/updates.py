"""What brings a client's pool to the server's state of a part."""

from dataclasses import dataclass

from fedbt_app.codec.codec import Encoded
from fedbt_app.costs.ledger import Cause
from fedbt_app.parts import BASE, PartState

DELTA = "delta"
VALUE = "value"


@dataclass(frozen=True)
class Update:
    """What brings one part of a client's pool one step, or all the way, to the server's state.

    `kind` is DELTA (to be added to the version before) or VALUE (replaces whatever is there);
    `late` marks a step that an up-to-date client had before, for the server's books: it is not
    sent.
    """

    part: str
    kind: str
    state: PartState
    encoded: Encoded
    late: bool = False

    @property
    def cause(self) -> Cause:
        """Why it is sent, for the ledger."""
        if self.kind == DELTA and not self.late:
            return Cause.ROUND
        if self.kind == VALUE and self.state.version == BASE:
            return Cause.FIRST_CONTACT
        return Cause.CATCH_UP
