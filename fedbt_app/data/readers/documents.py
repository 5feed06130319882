"""Texts with character spans, whatever tool wrote them, as rows of words and tags.

| written by | a row |
|---|---|
| doccano, Prodigy, spaCy | `{"text": .., "label": [[start, end, type], ..]}`; also `entities`, `spans` |
| Label Studio (JSON) | `{"data": {"text": ..}, "annotations": [{"result": [..]}]}` |
| Label Studio (JSON-MIN) | `{"text": .., "label": [{"start": .., "end": .., "labels": [..]}]}` |
| BioC (JSON) | `{"passages": [{"offset": .., "text": .., "annotations": [..]}]}` |

A document is a row, so that no split cuts it. A task without tagged words gets the text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedbt_app.data.readers.spans import Changes, Span, placed, tagged
from fedbt_app.data.readers.table import Wanted
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes

SPAN_COLUMNS = ("entities", "spans", "label", "labels", "annotations")
_STARTS = ("start", "start_offset", "begin")
_ENDS = ("end", "end_offset", "stop")
_TYPES = ("label", "type", "tag", "entity_group", "entity", "labels")


class Documents:
    """Turns the documents among rows into rows that tasks read, and counts what it changes."""

    def __init__(self, wanted: Wanted, notes: Notes, name: str) -> None:
        self._wanted, self._notes, self._name = wanted, notes, name
        self._changes = Changes()
        self._texts = self._unlabelled = self._several = self._pieces = 0

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield a row for each row, except for texts that nobody has labelled."""
        for number, row in enumerate(rows, start=1):
            try:
                made = self._row(row)
            except FedBTError as error:
                raise FedBTError(f"row {number}: {error}") from None
            # what a document of another form makes the lines below raise
            except (AttributeError, KeyError, TypeError, ValueError):
                raise FedBTError(
                    f"row {number} is not as BioC or Label Studio write it: export the file anew"
                ) from None
            if made is not None:
                yield made

    def row(self, text: str, spans: Sequence[Span]) -> Row:
        """Return a text with its spans as the task reads it.

        Raises
        ------
        FedBTError
            If a span is outside the text, or is not where its mention stands.
        """
        wanted = self._wanted
        if not wanted.words:
            return {wanted.text: text}
        found = placed(text, spans)
        if found is None:
            raise FedBTError(
                "a span is outside the text, or other characters than its own stand there: offsets "
                "count characters from 0, the end is not included; export the file anew"
            )
        self._texts += 1
        words, tags = tagged(text, found, self._changes)
        return {wanted.tokens: words, wanted.tags: tags}

    def pieces(self, count: int) -> None:
        """Count a span in several pieces."""
        self._pieces += count > 1

    def tell(self) -> None:
        """Note what was done, once all rows are made."""
        if self._texts:
            self._notes.add(f"{self._name}: {self._texts} texts with {self._changes.told()}")
        if self._pieces:
            self._notes.add(
                f"{self._name}: {self._pieces} spans in several pieces, each piece became an entity"
            )
        if self._unlabelled:
            self._notes.add(f"{self._name}: {self._unlabelled} texts without annotation left out")
        if self._several:
            self._notes.add(
                f"{self._name}: {self._several} texts with several annotations, the first was taken"
            )

    def _row(self, row: Row) -> Row | None:
        if isinstance(row.get("passages"), list):
            return self._bioc(row)
        if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
            return self._label_studio(row)
        wanted = self._wanted
        text = row.get(wanted.text)
        if not wanted.words or wanted.tokens in row or not isinstance(text, str):
            return row
        column = next(
            (name for name in (wanted.tags, *SPAN_COLUMNS) if isinstance(row.get(name), list)), None
        )
        if column is None:
            return row
        others = {name: value for name, value in row.items() if name != column}
        return others | dict(self.row(text, self._spans(row[column])))

    # -- spans in lists and objects ----------------------------------------------------------------

    def _spans(self, items: Sequence[Any]) -> list[Span]:
        return [span for item in items for span in self._span(item)]

    def _span(self, item: Any) -> list[Span]:
        if isinstance(item, Mapping) and isinstance(item.get("offsets"), list):
            kind = _text_of(_first(item, _TYPES))
            self.pieces(len(item["offsets"]))
            return [_made(*_pair(offset), kind) for offset in item["offsets"]]
        if isinstance(item, Mapping):
            mention = item.get("text")
            return [
                _made(
                    _first(item, _STARTS),
                    _first(item, _ENDS),
                    _text_of(_first(item, _TYPES)),
                    mention if isinstance(mention, str) else None,
                )
            ]
        if isinstance(item, list) and len(item) == 3:
            start, end, kind = item
            return [_made(start, end, kind)]
        raise _no_span()

    # -- Label Studio ------------------------------------------------------------------------------

    def _label_studio(self, row: Row) -> Row | None:
        done = [
            found
            for found in row["annotations"]
            if isinstance(found, Mapping) and not found.get("was_cancelled")
        ]
        if not done:
            self._unlabelled += 1
            return None
        self._several += len(done) > 1
        data, wanted = row["data"], self._wanted
        text = data.get(wanted.text)
        if text is None:
            texts = [value for value in data.values() if isinstance(value, str)]
            if len(texts) != 1:
                raise FedBTError(
                    f"its data has no {wanted.text!r}: set text-column to the name of the text"
                )
            text = texts[0]
        result = [item for item in done[0].get("result", []) if isinstance(item, Mapping)]
        values = [item["value"] for item in result if isinstance(item.get("value"), Mapping)]
        tagged_values = [value for value in values if "labels" in value]
        spans = self._spans(tagged_values) if wanted.words else []
        made = dict(data) | dict(self.row(text, spans))
        choices = [choice for value in values for choice in value.get("choices", ())]
        if len(choices) == 1:
            made[wanted.label] = choices[0]
        elif choices:
            made[wanted.label] = choices
        return made

    # -- BioC --------------------------------------------------------------------------------------

    def _bioc(self, row: Row) -> Row:
        passages = []
        for passage in row["passages"]:
            parts = passage.get("sentences") if not passage.get("text") else None
            for part in parts or [passage]:
                annotations = [
                    *part.get("annotations", ()),
                    *(passage.get("annotations", ()) if parts and part is parts[0] else ()),
                ]
                passages.append((int(part.get("offset", 0)), part.get("text") or "", annotations))
        return self.row(*self.of_passages(passages))

    def of_passages(
        self, passages: Sequence[tuple[int, str, Iterable[Any]]]
    ) -> tuple[str, list[Span]]:
        """Return BioC passages (offset, text, annotations) as one text, a line a passage."""
        text = ""
        moves = []  # where a passage was in the document, and where it is in the text
        for offset, part, _ in passages:
            text += "\n" if text else ""
            moves.append((offset, offset + len(part), len(text)))
            text += part
        spans = []
        for _, _, annotations in passages:
            for annotation in annotations:
                spans += self._annotation(annotation, moves)
        return text, spans

    def _annotation(
        self, annotation: Mapping[str, Any], moves: Sequence[tuple[int, int, int]]
    ) -> list[Span]:
        kind = _text_of((annotation.get("infons") or {}).get("type"))
        locations = annotation.get("locations") or []
        self.pieces(len(locations))
        mention = annotation.get("text") if len(locations) == 1 else None
        spans = []
        for location in locations:
            start = int(location["offset"])
            end = start + int(location["length"])
            move = next((at - begin for begin, stop, at in moves if begin <= start < stop), None)
            if move is None:
                raise FedBTError(
                    "an annotation is outside the passages: BioC offsets count from the document's "
                    "first character; export the file anew"
                )
            spans.append(Span(start + move, end + move, kind, mention))
        return spans


def _first(item: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _pair(offset: Any) -> tuple[Any, Any]:
    if not isinstance(offset, list) or len(offset) != 2:
        raise _no_span()
    return offset[0], offset[1]


def _made(start: Any, end: Any, kind: Any, mention: str | None = None) -> Span:
    if type(start) is not int or type(end) is not int:
        raise _no_span()
    return Span(start, end, _text_of(kind), mention)


def _text_of(kind: Any) -> str:
    if isinstance(kind, list) and len(kind) == 1:
        kind = kind[0]
    if not isinstance(kind, str) or not kind.strip():
        raise FedBTError("a span has not one type: give each a type, a span for each of several")
    return kind.strip()


def _no_span() -> FedBTError:
    return FedBTError(
        "an item of its list of spans is none: write [start, end, type], or an object with start, "
        "end and label"
    )
