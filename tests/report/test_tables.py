"""Numbers as people read them: units, three digits, shares or losses."""

from fedbt_app.report import tables


def test_formats() -> None:
    for write, texts in {
        tables.format_flops: {0: "0 FLOP", 2.154e15: "2.15 PFLOP", 999: "999 FLOP"},
        tables.format_bytes: {13_430_000: "13.4 MB", 1000: "1.00 kB", None: "n/a"},
        tables.format_memory: {5 * 2**28: "1.25 GiB", 1023 * 2**20: "1,023 MiB"},
        tables.format_seconds: {
            0.0123: "0.0123 s",
            119.4: "119 s",
            750: "12.5 min",
            3.4 * 3600: "3.40 h",
            None: "n/a",
        },
        tables.format_ratio: {
            0.0704: "7.04 %",
            1.0: "100 %",
            0.000312: "0.0312 %",
            0.0: "0 %",
            None: "n/a",
        },
    }.items():
        assert {value: write(value) for value in texts} == texts


def test_scores_are_shares_or_losses() -> None:
    assert tables.format_score("accuracy", 0.8125) == "81.2 %"
    assert tables.format_score("loss", 0.8125) == "0.812"
    assert tables.format_score("f1", None) == "n/a"
