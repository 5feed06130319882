"""Excel workbooks (.xlsx), read row by row: values, not formulas."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedbt_app.data.readers.opened import binary
from fedbt_app.data.readers.table import Table, Wanted, check_unique, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes


def read_excel(path: Path, wanted: Wanted) -> Table:
    """Read the sheet whose first row names the wanted columns; the first sheet where none does."""
    notes = Notes()
    with _opened(path, data_only=True) as book:
        sheets = book.worksheets
        headers = [_header(sheet) for sheet in sheets]
        best = _best(headers, wanted)
        header = headers[best]
        check_unique(header, wanted)
        table = table_of(_rows(sheets[best], header, wanted), wanted, notes)
        table.width = sum(bool(name) for name in header)
    if any(None in values for values in table.columns.values()):
        _check_formulas(path, best, header, wanted)
    notes.add(f"{path.name}: Excel, sheet {best + 1} of {len(headers)}, {table.rows} rows")
    return table


@contextmanager
def _opened(path: Path, data_only: bool) -> Iterator[Any]:
    import openpyxl

    with binary(path) as stream:
        try:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=data_only)
        except Exception as error:  # whatever a broken archive makes the library raise
            raise FedBTError(
                f"it is no Excel workbook ({type(error).__name__}): save it as .xlsx, without a "
                "password, or as CSV"
            ) from None
        yield book


def _best(headers: list[list[str]], wanted: Wanted) -> int:
    known = [len(wanted.columns & set(header)) for header in headers]
    most = max(known, default=0)
    if most and known.count(most) > 1:
        raise FedBTError(
            f"{known.count(most)} sheets have the columns: keep one, or save each as a file of its "
            "own"
        )
    if not known:
        raise FedBTError("it has no sheet of rows: save the rows as .xlsx or CSV")
    return known.index(most)


def _check_formulas(path: Path, sheet: int, header: list[str], wanted: Wanted) -> None:
    """Refuse formulas without a stored value: they would be read as empty cells."""
    with _opened(path, data_only=True) as values, _opened(path, data_only=False) as formulas:
        pairs = zip(
            values.worksheets[sheet].iter_rows(),
            formulas.worksheets[sheet].iter_rows(),
            strict=False,
        )
        for number, (shown, written) in enumerate(pairs, start=1):
            for name, value, formula in zip(header, shown, written, strict=False):
                if name in wanted.columns and value.value is None and formula.data_type == "f":
                    raise FedBTError(
                        f"row {number}: column {name!r} holds a formula without a value: open and "
                        "save the file in Excel, or save it as CSV"
                    )


def _values(sheet: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number and the cells of each row that is not empty."""
    # what a file says of its size may be wrong, and then rows would be missing
    sheet.reset_dimensions()
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        if any(cell.value is not None and str(cell.value).strip() for cell in cells):
            yield number, cells


def _header(sheet: Any) -> list[str]:
    _, cells = next(_values(sheet), (0, ()))
    return ["" if cell.value is None else str(cell.value).strip() for cell in cells]


def _rows(sheet: Any, header: list[str], wanted: Wanted) -> Iterator[Row]:
    rows = _values(sheet)
    next(rows, None)
    for number, cells in rows:
        row = {}
        for name, cell in zip(header, cells, strict=False):
            if name in wanted.columns:
                row[name] = _plain(cell, number, name)
        # cells at the end of a row may be left out; a name for each keeps the columns
        yield {name: row.get(name) for name in header if name}


def _plain(cell: Any, number: int, name: str) -> Any:
    if cell.data_type == "e":
        raise FedBTError(f"row {number}: column {name!r} holds an error of a formula: mend it")
    value = cell.value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return value
