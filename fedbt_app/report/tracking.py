"""A run's rounds as TensorBoard shows them: what rounds.jsonl holds, as scalars by round."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fedbt_app.costs.ledger import RoundEntry
from fedbt_app.errors import FedBTError

FOLDER = "tensorboard"
FILES = "events.out.tfevents.*"
COSTS = ("train_flops", "uplink_bytes", "downlink_bytes", "seconds")


def board(output: Path, wanted: bool, done: int | None) -> Callable[[RoundEntry], None]:
    """Return what writes a finished round into `tensorboard/` of `output`, if that is `wanted`.

    Parameters
    ----------
    done
        rounds of the stopped run that this one goes on with; None for a new run, which drops an
        earlier one's files

    Raises
    ------
    FedBTError
        When TensorBoard is not installed, or the folder cannot be used; nothing is dropped then.
    """
    folder = output / FOLDER
    # TensorBoard hides what it has of the rounds from here on: this run does them again
    purge_step = None
    if done is not None:
        purge_step = done + 1
    try:
        if wanted:
            from torch.utils.tensorboard import SummaryWriter
        if done is None:
            for path in folder.glob(FILES):
                path.unlink()
        if not wanted:
            return lambda entry: None
        writer = SummaryWriter(str(folder), purge_step=purge_step)
    except ImportError:
        raise FedBTError(
            "tensorboard=true needs TensorBoard where the server runs: pip install 'fedbt-app[tensorboard]', or drop it"
        ) from None
    except OSError as error:
        raise FedBTError(
            f"{folder} is unusable ({error.strerror}): choose another output-dir"
        ) from None

    return partial(_add, writer)


def _add(writer: Any, entry: RoundEntry) -> None:
    for name in COSTS:
        writer.add_scalar(f"cost/{name}", getattr(entry, name), entry.round)
    for name, value in entry.metrics.items():
        writer.add_scalar(f"metrics/{name}", value, entry.round)
    writer.flush()  # TensorBoard shows the round at once, and a crash loses none
