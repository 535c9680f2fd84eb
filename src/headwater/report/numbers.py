"""Numbers as they are read: the same rule for the page and for its text twin."""

from __future__ import annotations

import math
from collections.abc import Iterable


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable; a dash for None.

    >>> number(0.12345), number(1234567.0), number(2.0), number(3.2e-7), number(None)
    ('0.123', '1234567', '2.00', '3.20e-07', '–')
    """
    if value is None:
        return "–"
    if not math.isfinite(value) or value == 0:
        return str(value).removesuffix(".0")
    size = abs(value)
    if size < 1e-4 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def signed(value: float) -> str:
    """:func:`number` with its sign always written."""
    return number(value) if value <= 0 or math.isnan(value) else "+" + number(value)


def percent(value: float) -> str:
    """A share of one, in percent."""
    return f"{100 * value:.3g} %"


def ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round values (1, 2 or 5 times a power of ten apart) from at or below ``low`` to at or above ``high``.

    >>> ticks(0.0, 0.46)
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(k * step, 12) for k in range(first, max(last, first + 1) + 1))


def plain(values: Iterable[float]) -> list[str]:
    """Tick labels: as many decimals as the finest one needs, no more.

    >>> plain([0.0, 0.25, 0.5])
    ['0', '0.25', '0.5']
    """
    return [f"{v:.12g}".replace("-0", "0") if v == 0 else f"{v:.6g}" for v in values]
