"""Split a data set's rows over simulated clients: pure functions of settings, columns and seed.

Every partitioner returns one ascending array of row numbers a client, and every row is in exactly
one of them.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS

Rows = NDArray[np.int64]
Columns = Mapping[str, Sequence[Any]]

DRAWS = 100  # attempts at a dirichlet split in which no client goes short
MIN_ROWS = 2  # that every client gets from dirichlet: one to train on, one to hold out


def partition(
    config: RunConfig,
    num_rows: int,
    columns: Columns,
    num_partitions: int,
) -> list[Rows]:
    """Split `num_rows` rows over `num_partitions` clients as `config.partitioner` says.

    Parameters
    ----------
    columns
        Column name to one value a row; read only where the partitioner needs a label or a site.

    Returns
    -------
    list of int64 arrays
        Ascending row numbers, one non-empty array a client. The same input gives the same split
        everywhere.

    Raises
    ------
    FedBTError
        If a column is missing, the settings do not fit the number of clients, or a client would get
        no row.
    """
    if num_partitions < 1:
        raise FedBTError(f"cannot split rows over {num_partitions} clients: use at least one")
    if num_rows < num_partitions:
        raise FedBTError(
            f"{num_rows} training rows are too few for {num_partitions} clients: "
            "use fewer clients or more data"
        )
    split = PARTITIONERS[config.partitioner]
    parts = split(config, num_rows, columns, num_partitions)
    for client, part in enumerate(parts):
        if not part.size:
            client_of_all = f"client {client} of {num_partitions}"
            raise FedBTError(
                f"partitioner={config.partitioner} leaves {client_of_all} without rows: "
                "use fewer clients, more data, more even settings or partitioner=iid"
            )
    return parts


def iid(num_rows: int, num_partitions: int, seed: int) -> list[Rows]:
    """Shuffle and cut into parts whose sizes differ by at most one."""
    return size_skewed(num_rows, [1.0] * num_partitions, seed)


def size_skewed(num_rows: int, weights: Sequence[float], seed: int) -> list[Rows]:
    """Shuffle and cut into parts proportional to `weights`, rounded by largest remainder."""
    share = np.asarray(weights, dtype=np.float64)
    exact = share / share.sum() * num_rows
    sizes = np.floor(exact).astype(np.int64)
    left_over = num_rows - int(sizes.sum())
    # stable: equal remainders go by client, so that the split is the same everywhere
    by_remainder = np.argsort(sizes - exact, kind="stable")
    sizes[by_remainder[:left_over]] += 1
    shuffled = np.random.default_rng(seed).permutation(num_rows)
    cuts = np.cumsum(sizes)[:-1]
    return [np.sort(part) for part in np.split(shuffled, cuts)]


def dirichlet(
    labels: Sequence[Any],
    num_partitions: int,
    alpha: float,
    seed: int,
) -> list[Rows]:
    """Give each client its own mix of labels: each label's shares over them are Dirichlet(alpha).

    A small `alpha` puts nearly all rows of a label on one client, a large one comes close to iid.
    The whole split is drawn again, at most `DRAWS` times, until every client has `MIN_ROWS` rows.

    Raises
    ------
    FedBTError
        If no draw gives every client enough rows.
    """
    rng = np.random.default_rng(seed)
    classes = _groups(labels)
    for _ in range(DRAWS):
        parts = _dirichlet_draw(classes, num_partitions, alpha, rng)
        shortest = min(range(num_partitions), key=lambda client: parts[client].size)
        if parts[shortest].size >= MIN_ROWS:
            return parts
    raise FedBTError(
        "partitioner=dirichlet gave some client "
        f"fewer than {MIN_ROWS} rows in each of {DRAWS} draws, "
        f"client {shortest} of {num_partitions} in the last: "
        f"raise dirichlet-alpha (now {alpha:g}), use fewer clients or partitioner=iid"
    )


def _dirichlet_draw(
    classes: Sequence[Rows],
    num_partitions: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[Rows]:
    parts: list[list[Rows]] = [[] for _ in range(num_partitions)]
    for rows in classes:
        shares = rng.dirichlet(np.full(num_partitions, alpha))
        ends = np.cumsum(shares) * rows.size
        cuts = np.rint(ends[:-1]).astype(np.int64)  # the last part takes what is left
        pieces = np.split(rng.permutation(rows), cuts)
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return _merged(parts)


def natural(sites: Sequence[Any], num_partitions: int) -> list[Rows]:
    """Keep sites whole: one a client in sorted order.

    Where there are more sites than clients, the largest go first, each to the emptiest client.

    Raises
    ------
    FedBTError
        If there are fewer sites than clients.
    """
    found = _groups(sites)
    if len(found) == num_partitions:
        return found
    if len(found) < num_partitions:
        raise FedBTError(
            f"partition-column has {len(found)} distinct values, "
            f"too few for {num_partitions} clients: "
            "use fewer clients or another partitioner"
        )
    parts: list[list[Rows]] = [[] for _ in range(num_partitions)]
    # a heap of (rows so far, client): its first is the emptiest client, the lowest of equal ones
    loads = [(0, client) for client in range(num_partitions)]
    for rows in sorted(found, key=len, reverse=True):
        load, client = heapq.heappop(loads)
        parts[client].append(rows)
        heapq.heappush(loads, (load + rows.size, client))
    return _merged(parts)


# The same by the run's settings -------------------------------------------------------------------


def _iid(
    config: RunConfig,
    num_rows: int,
    columns: Columns,
    num_partitions: int,
) -> list[Rows]:
    return iid(num_rows, num_partitions, config.seed)


def _dirichlet(
    config: RunConfig,
    num_rows: int,
    columns: Columns,
    num_partitions: int,
) -> list[Rows]:
    labels = TASKS[config.task].skew_by(config, columns)
    if labels is None:
        raise FedBTError(
            f"partitioner=dirichlet needs the column {config.label_column!r}, "
            "which the data has not: set label-column, or partitioner=iid"
        )
    return dirichlet(labels, num_partitions, config.dirichlet_alpha, config.seed)


def _size_skewed(
    config: RunConfig,
    num_rows: int,
    columns: Columns,
    num_partitions: int,
) -> list[Rows]:
    weights = _weights(config.partition_weights, num_partitions)
    return size_skewed(num_rows, weights, config.seed)


def _natural(
    config: RunConfig,
    num_rows: int,
    columns: Columns,
    num_partitions: int,
) -> list[Rows]:
    name = config.partition_column
    if name not in columns:
        raise FedBTError(
            f"partition-column {name!r} is not in the data: name the column that holds the site"
        )
    empty = sum(site is None or not str(site).strip() for site in columns[name])
    if empty:
        raise FedBTError(
            f"partition-column {name!r} is empty in {empty} rows: fill it, or drop these rows"
        )
    return natural(columns[name], num_partitions)


Partitioner = Callable[[RunConfig, int, Columns, int], list[Rows]]
PARTITIONERS: dict[str, Partitioner] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "size-skewed": _size_skewed,
    "natural": _natural,
}


def _groups(values: Sequence[Any]) -> list[Rows]:
    """Return the rows of each distinct value, by value as text."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(str(value), []).append(row)
    return [np.asarray(rows[value], dtype=np.int64) for value in sorted(rows)]


def _merged(parts: Iterable[list[Rows]]) -> list[Rows]:
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def _weights(text: str, num_partitions: int) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    positive = all(math.isfinite(weight) and weight > 0 for weight in weights)
    if not weights or not positive:
        raise FedBTError(
            f"partition-weights={text} must be positive numbers with commas, for example 1,3,6"
        )
    if len(weights) != num_partitions:
        raise FedBTError(
            f"partition-weights has {len(weights)} weights for {num_partitions} clients: "
            "give one a client"
        )
    return weights
