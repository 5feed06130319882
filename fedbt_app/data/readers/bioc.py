"""BioC in XML, read document by document (BioC in JSON is read by json_files)."""

import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedbt_app.data.readers.documents import Documents
from fedbt_app.data.readers.opened import binary
from fedbt_app.data.readers.table import Table, Wanted, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes


def read_bioc(path: Path, wanted: Wanted) -> Table:
    """Read each document as a row."""
    notes = Notes()
    documents = Documents(wanted, notes, path.name)
    table = table_of(documents.rows(_documents(path)), wanted, notes)
    documents.tell()
    if not table.rows:
        raise FedBTError("it has no <document> of BioC: other XML is not read, convert it")
    notes.add(f"{path.name}: BioC, {table.rows} documents")
    return table


def _documents(path: Path) -> Iterator[Row]:
    """Yield each document as BioC writes it in JSON."""
    with binary(path) as stream:
        try:
            for _, element in xml.iterparse(stream):
                if element.tag == "document":
                    yield {"passages": [_part(passage) for passage in element.iter("passage")]}
                    element.clear()
        except xml.ParseError as error:
            line = error.position[0]
            raise FedBTError(f"line {line} is no well-formed XML: export the file anew") from None


def _part(element: xml.Element) -> dict[str, Any]:
    """Return a passage, or a sentence of one."""
    try:
        return {
            "offset": int(element.findtext("offset") or 0),
            "text": element.findtext("text") or "",
            "sentences": [_part(sentence) for sentence in element.findall("sentence")],
            "annotations": [_annotation(found) for found in element.findall("annotation")],
        }
    except ValueError:
        raise FedBTError("an offset or length of BioC is no number: export the file anew") from None


def _annotation(element: xml.Element) -> dict[str, Any]:
    return {
        "infons": {infon.get("key"): infon.text for infon in element.findall("infon")},
        "locations": [
            {"offset": int(place.get("offset", "")), "length": int(place.get("length", ""))}
            for place in element.findall("location")
        ],
        "text": element.findtext("text"),
    }
