"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["bytes_text", "change_text", "count_text", "factor_text", "ms_text", "part_text"]


def count_text(count: float) -> str:
    """1234567 -> '1.23 M'."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}" if abs(count) < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f}"


def bytes_text(size_bytes: float) -> str:
    """Decimal units: 2310000 -> '2.31 MB'."""
    if size_bytes < 1e3:
        return f"{size_bytes:.0f} B"
    return (
        f"{count_text(size_bytes).replace(' k', ' kB').replace(' M', ' MB').replace(' G', ' GB').replace(' T', ' TB')}"
    )


def ms_text(milliseconds: float) -> str:
    """Three significant digits: '0.512 ms', '12.3 ms'."""
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def factor_text(before: float, after: float, *, better: str, worse: str) -> str:
    """'3.3x smaller', '1.2x larger' or 'same'; `better` names a fall."""
    if before <= 0 or after <= 0:
        return ""
    factor = before / after
    if abs(factor - 1) < 0.005:
        return "same"
    return f"{factor:.2f}x {better}" if factor > 1 else f"{1 / factor:.2f}x {worse}"


def change_text(before: float, after: float) -> str:
    """'-49 %' or '+3 %'."""
    if before == 0:
        return ""
    percent = 100 * (after - before) / before
    return "same" if abs(percent) < 0.05 else f"{percent:+.1f} %"


def part_text(part: float, whole: float) -> str:
    """'41 %', '2.3 %', '< 0.1 %', '> 99.9 %' or 'none'."""
    percent = 100 * part / whole if whole else 0.0
    if percent == 0:
        return "none"
    if percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %" if percent < 10 or 99 < percent < 100 else f"{percent:.0f} %"
