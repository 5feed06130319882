"""Write sample data of three hospitals, and a test set for the server, from the embedded data set.

python deploy/make_sample_data.py [--rows N] FOLDER
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedbt_app.data import phenotypes

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")


def write(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) + "\n"
        for row in rows
    ]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} rows")


def main() -> None:
    """Deal the training rows out to the hospitals in turn: no row is at two of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=200, help="rows a hospital, and of the test set; 0 for all"
    )
    parser.add_argument(
        "folder", type=Path, help="gets hospital-a/train.jsonl, .., server/test.jsonl"
    )
    options = parser.parse_args()
    splits = phenotypes.classified_terms()
    for rows in (
        splits.values()
    ):  # they come in the order of the ontology, one organ system after the other
        random.Random(7).shuffle(rows)
    for index, hospital in enumerate(HOSPITALS):
        own = splits["train"][index :: len(HOSPITALS)]
        write(options.folder / hospital / "train.jsonl", own[: options.rows or None])
    write(options.folder / "server" / "test.jsonl", splits["test"][: options.rows or None])


if __name__ == "__main__":
    main()
