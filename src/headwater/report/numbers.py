"""Numbers as they are read: the same rule for the page and for its text twin."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable; a dash for None. The minus is a real one, which is read aloud.

    >>> number(0.12345), number(1234567.0), number(-2.0), number(3.2e-7), number(9.996), number(None)
    ('0.123', '1234567', '−2.00', '3.20e-07', '10.0', '–')
    """
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return minus("0" if value == 0 else str(float(value)))
    if not 1e-4 <= abs(value) < 1e9:
        return minus(f"{value:.2e}")
    return minus(f"{value:.{places(value, 3)}f}")


def minus(text: str) -> str:
    """The text of a number with a minus sign in place of a leading hyphen."""
    return "−" + text[1:] if text.startswith("-") else text


def signed(value: float) -> str:
    """:func:`number` with its sign always written.

    >>> signed(0.5), signed(-0.5), signed(0.0)
    ('+0.500', '−0.500', '0')
    """
    return "+" + number(value) if value > 0 else number(value)


def alike(values: Sequence[float], decimals: int) -> list[str]:
    """Numbers that belong together, with the same decimals; each by itself where they are all very small or one is very large.

    >>> alike((0.12, 0.09, 0.15), 3), alike((3e-7, 1e-7), 8)
    (['0.120', '0.090', '0.150'], ['3.00e-07', '1.00e-07'])
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if not 1e-4 <= largest < 1e9:
        return [number(v) for v in values]
    return [minus(f"{v:.{decimals}f}") if math.isfinite(v) else number(v) for v in values]


def places(size: float, digits: int) -> int:
    """How many decimals show so many digits of a number of this size: 9 at most.

    >>> places(0.0312, 2), places(9.996, 3), places(1500.0, 3)
    (3, 1, 0)
    """
    if size == 0 or not math.isfinite(size):
        return 0
    rounded = float(f"{abs(size):.{digits - 1}e}")  # 9.996 has one digit before the point, 10.0 two
    return min(9, max(0, digits - 1 - math.floor(math.log10(rounded))))


def percent(value: float) -> str:
    """A share of one, in percent.

    >>> percent(0.25), percent(0.0714), percent(float("nan"))
    ('25 %', '7.14 %', 'nan %')
    """
    share = 100 * value
    return minus(f"{share:.0f}" if abs(share) >= 1000 else f"{share:.3g}") + " %"


def ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round values (1, 2 or 5 times a power of ten apart) from at or below ``low`` to at or above ``high``, both finite.

    >>> ticks(0.0, 0.46)
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    >>> ticks(0.0, 3e-15, about=3)
    (0.0, 1e-15, 2e-15, 3e-15)
    """
    span, size = high - low, max(abs(low), abs(high))
    if size > 1e307:  # the next round value might overflow
        return (-size, 0.0, size)
    if span <= 1e-12 * size or size < 1e-300:  # a single value, to the precision of a float
        span = size if size >= 1e-300 else 1.0
    exponent = math.floor(math.log10(span / about))
    times = next(m for m in (1, 2, 5, 10) if span / (m * 10.0**exponent) <= about + 1e-9)
    step = times * 10.0**exponent
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # through decimal text, so that 3 * 0.1 is 0.3
    return tuple(float(f"{k * times}e{exponent}") for k in range(first, max(last, first + 1) + 1))


def plain(values: Iterable[float]) -> list[str]:
    """Tick labels: as many decimals as the finest one needs, no more; zero is 0.

    >>> plain([-0.25, 0.0, 0.5]), plain([0, 5000, 10000])
    (['−0.25', '0', '0.50'], ['0', '5000', '10000'])
    """
    exact = [f"{v:.12g}" for v in values]
    largest = max((abs(float(e)) for e in exact), default=0.0)
    if largest >= 1e7 or 0 < largest < 1e-3 or any("e" in e for e in exact):
        return [minus(f"{float(e):.3g}") for e in exact]
    decimals = max((len(e.partition(".")[2]) for e in exact), default=0)
    return ["0" if float(e) == 0 else minus(f"{float(e):.{decimals}f}") for e in exact]


_QUANTITY = re.compile(r"[+−±×~≈<>$€-]?\s?\d[\d.,'\u202f\u00a0]*(e[+−-]?\d+)?(\s?(±|to)\s?[\d.]+)?(\s?(%|×|[^\W\d]{1,7}(/[^\W\d]{1,7})?))?")


def is_quantity(text: str) -> bool:
    """Whether a cell reads as a number, perhaps with a unit, or as a missing one.

    >>> [is_quantity(cell) for cell in ("0.42", "−3.1e-4", "12 s", "0.42 ± 0.03", "4.1 GB", "–", "", "#412", "Grad-Dot")]
    [True, True, True, True, True, True, True, False, False]
    """
    return text.strip() in {"", "–", "-", "nan", "inf", "−inf"} or _QUANTITY.fullmatch(text.strip()) is not None


def duration(seconds: float) -> str:
    """Seconds in words: ``0.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
