"""Numbers as people read them."""

from __future__ import annotations

import pytest

from onnxprune.report.figures import bytes_text, change_text, count_text, factor_text, ms_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1_234_567, "1.23 M"),
        (999_600, "1000 k"),
        (4.1e9, "4.1 G"),
        (2e12, "2 T"),
    ],
)
def test_counts_keep_three_digits(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (1500, "1.5 kB"), (2_310_000, "2.31 MB"), (4e9, "4 GB")])
def test_bytes_are_decimal(size: float, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(("value", "text"), [(0.5123, "0.512 ms"), (12.34, "12.3 ms"), (2500, "2.5 s")])
def test_milliseconds_become_seconds_when_long(value: float, text: str) -> None:
    assert ms_text(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 50, "2.00x smaller"), (50, 100, "2.00x larger"), (100, 100.1, "same"), (0, 5, ""), (5, 0, "")],
)
def test_factors_say_which_way(before: float, after: float, text: str) -> None:
    assert factor_text(before, after, better="smaller", worse="larger") == text


@pytest.mark.parametrize(
    ("before", "after", "text"), [(100, 51, "-49.0 %"), (100, 103, "+3.0 %"), (7, 7, "same"), (0, 1, "")]
)
def test_changes_are_signed_percentages(before: float, after: float, text: str) -> None:
    assert change_text(before, after) == text
