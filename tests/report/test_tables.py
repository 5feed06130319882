"""Numbers as people read them: units, three digits, shares or losses."""

from typing import Any

import pytest

from fedbt_app.report import tables


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (tables.format_flops, 0, "0 FLOP"),
        (tables.format_flops, 2.154e15, "2.15 PFLOP"),
        (tables.format_flops, 999, "999 FLOP"),
        (tables.format_bytes, 13_430_000, "13.4 MB"),
        (tables.format_bytes, 1000, "1.00 kB"),
        (tables.format_bytes, None, "n/a"),
        (tables.format_memory, 5 * 2**28, "1.25 GiB"),
        (tables.format_memory, 1023 * 2**20, "1,023 MiB"),
        (tables.format_seconds, 0.0123, "0.0123 s"),
        (tables.format_seconds, 119.4, "119 s"),
        (tables.format_seconds, 750, "12.5 min"),
        (tables.format_seconds, 3.4 * 3600, "3.40 h"),
        (tables.format_seconds, None, "n/a"),
        (tables.format_ratio, 0.0704, "7.04 %"),
        (tables.format_ratio, 1.0, "100 %"),
        (tables.format_ratio, 0.000312, "0.0312 %"),
        (tables.format_ratio, 0.0, "0 %"),
        (tables.format_ratio, None, "n/a"),
    ],
)
def test_formats(write: Any, value: float | None, text: str) -> None:
    assert write(value) == text


def test_scores_are_shares_or_losses() -> None:
    assert tables.format_score("accuracy", 0.8125) == "81.2 %"
    assert tables.format_score("loss", 0.8125) == "0.812"
    assert tables.format_score("f1", None) == "n/a"
