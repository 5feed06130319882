"""Numbers as people read them: units, three digits, shares or losses."""

from typing import Any

import pytest

from fedbt_app import formats


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (formats.format_flops, 0, "0 FLOP"),
        (formats.format_flops, 2.154e15, "2.15 PFLOP"),
        (formats.format_flops, 999, "999 FLOP"),
        (formats.format_bytes, 13_430_000, "13.4 MB"),
        (formats.format_bytes, 1000, "1.00 kB"),
        (formats.format_bytes, None, "n/a"),
        (formats.format_memory, 5 * 2**28, "1.25 GiB"),
        (formats.format_memory, 1023 * 2**20, "1,023 MiB"),
        (formats.format_seconds, 0.0123, "0.0123 s"),
        (formats.format_seconds, 119.4, "119 s"),
        (formats.format_seconds, 750, "12.5 min"),
        (formats.format_seconds, 3.4 * 3600, "3.40 h"),
        (formats.format_seconds, None, "n/a"),
        (formats.format_ratio, 0.0704, "7.04 %"),
        (formats.format_ratio, 1.0, "100 %"),
        (formats.format_ratio, 0.000312, "0.0312 %"),
        (formats.format_ratio, 0.0, "0 %"),
        (formats.format_ratio, None, "n/a"),
    ],
)
def test_formats(write: Any, value: float | None, text: str) -> None:
    assert write(value) == text


def test_scores_are_shares_or_losses() -> None:
    assert formats.format_score("accuracy", 0.8125) == "81.2 %"
    assert formats.format_score("loss", 0.8125) == "0.812"
    assert formats.format_score("f1", None) == "n/a"
