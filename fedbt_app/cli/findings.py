"""What a check finds: one line each, marked by whether a run would go on."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from fedbt_app.errors import FedBTError


class Mark(Enum):
    """How a line begins."""

    OK = "ok  "
    WARNING = "warn"
    FAILURE = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of a check; of a failure, `detail` says the mend."""

    mark: Mark
    subject: str
    detail: str

    @property
    def ok(self) -> bool:
        """Whether a run would go on."""
        return self.mark is not Mark.FAILURE

    def __str__(self) -> str:
        return f"{self.mark.value} {self.subject}: {self.detail}"


def warned(subject: str, details: Iterable[str]) -> Iterator[Finding]:
    """Yield warnings."""
    for detail in details:
        yield Finding(Mark.WARNING, subject, detail)


def until_failure(subject: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """Yield what is found, and what ended it as a failure of `subject`."""
    try:
        yield from found
    except FedBTError as error:
        yield Finding(Mark.FAILURE, subject, str(error))


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep what a run would log off the screen: a check prints it as findings."""
    log = logging.getLogger("flwr")
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False
