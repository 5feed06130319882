"""Values inside Flower's records: how parts, states and text are written, and checked when read.

Nothing is unpickled; a value of another type, size or sign than it should have is an error, which
`checked` words.
"""

import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedbt_app.codec.codec import Encoded
from fedbt_app.config import LONGEST_LABEL
from fedbt_app.errors import FedBTError
from fedbt_app.parts import PartState

T = TypeVar("T")


def serialised_bytes(message: Message) -> int:
    """Return the bytes that Flower transfers for `message`: its objects, each once, and their tree.

    Uses private functions of Flower, as there is no public one.
    """
    with no_object_id_recompute():  # else every level hashes all levels below it again
        tree: int = get_object_tree(message).ByteSize()
        objects = get_all_nested_objects(message)
        return tree + sum(len(item.deflate()) for item in objects.values())


def encoded_records(encoded: Mapping[str, Encoded]) -> tuple[ArrayRecord, ConfigRecord]:
    """Write encoded parts: their arrays, and their headers."""
    arrays = {}
    headers: dict[str, Any] = {}
    for part, item in encoded.items():
        headers[part] = item.header
        for name, array in item.arrays.items():
            arrays[f"{part}/{name}"] = Array(array)
    return ArrayRecord(arrays), ConfigRecord(headers)


def read_encoded(arrays: Mapping[str, Any], headers: Mapping[str, Any]) -> dict[str, Encoded]:
    """Read what `encoded_records` wrote; the codec refuses a part that has only one of the two."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, stored in arrays.items():
        part, _, key = name.rpartition("/")
        grouped.setdefault(part, {})[key] = viewed(stored)
    encoded = {}
    for part, header in headers.items():
        own = grouped.pop(part, {})
        encoded[part] = Encoded(own, of_type(header, str))
    for part, alone in grouped.items():
        encoded[part] = Encoded(alone, "")
    return encoded


def states_record(states: Mapping[str, PartState]) -> ConfigRecord:
    """Write which state of each part is held, or expected."""
    texts: dict[str, Any] = {}
    for part, state in states.items():
        texts[part] = json.dumps([state.version, state.digest])
    return ConfigRecord(texts)


def read_states(record: Mapping[str, Any]) -> dict[str, PartState]:
    """Read what `states_record` wrote."""
    states = {}
    for part, text in record.items():
        version, digest = json.loads(text)
        states[part] = PartState(count(version), of_type(digest, str))
    return states


def checked(what: str, read: Callable[[], T]) -> T:
    """Return what `read` does; FedBTError, one line about `what`, for all that goes wrong there."""
    try:
        return read()
    except FedBTError:
        raise
    except KeyError as key:
        detail = f"missing {key}"
    except Exception as reason:  # whatever else a stranger's message makes go wrong
        detail = type(reason).__name__
    raise FedBTError(f"{what} is malformed ({detail}): run the same FedBT version on both sides")


def viewed(array: Any) -> np.ndarray:
    """View a Flower array's data without a copy; ValueError when it is not as long as it says."""
    stream = io.BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of an unknown format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    begin = stream.tell()
    said = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or said != len(array.data) - begin:
        raise ValueError("an array of another length than it says")
    return np.frombuffer(array.data, dtype, offset=begin).reshape(shape)


def step(part: str, state: PartState) -> str:
    """Name one part's step to `state`: a message can bring several of a part."""
    return f"{part}@{state.version}"


def one_line(text: Any) -> str:
    """Return text that cannot look like several lines of the log, nor move a terminal's cursor."""
    words = " ".join(of_type(text, str).split())
    printable = "".join(filter(str.isprintable, words))
    return printable[:500]


def metric(name: str) -> str:
    """Return the name of a metric as it is; ValueError when it is none."""
    if not name.isidentifier() or len(name) > LONGEST_LABEL:
        raise ValueError("a metric's name is not one")
    return name


def of_type(value: Any, kind: type[T]) -> T:
    """Return the value as it is; TypeError when it is not of that very type (True is no int)."""
    if type(value) is not kind:
        raise TypeError(kind)
    return value


def one_of(value: Any, choices: tuple[str, ...]) -> str:
    """Return the value as it is; ValueError when it is not among the choices."""
    if value not in choices:
        raise ValueError(choices)
    return str(value)


def count(value: Any) -> int:
    """Return the number as it is; ValueError when it is negative or not whole."""
    if type(value) is not int or value < 0:
        raise ValueError("a count is negative or not whole")
    return value
