"""Which states to keep while a training is walked backwards: a trade of memory for replayed steps.

With s states kept at a time (the first among them) and every step replayed at most r times, ``C(s + r, s)`` steps can be walked backwards,
and no schedule can do better (Griewank and Walther 2000, "revolve", Algorithm 799). So one number, the repetitions r, spans the ladder:
r = 1 keeps every state, r = 2 about ``sqrt(2 T)`` states, and r of about ``log2(T) / 2`` no more than r states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import TypeVar

from headwater.errors import InputError

S = TypeVar("S")
NAMES = ("every", "sqrt", "log")


@dataclass(frozen=True)
class Schedule:
    """``length`` steps walked backwards with at most ``states`` states kept.

    >>> [Schedule.named(name, 1000).states for name in ("every", "sqrt", "log")]
    [999, 44, 6]
    >>> [round(Schedule.named(name, 1000).replays / 1000, 1) for name in ("every", "sqrt", "log")]
    [1.0, 2.0, 5.3]
    """

    length: int
    states: int

    @property
    def repetitions(self) -> int:
        """How often a step is replayed at most."""
        return repetitions(self.length, self.states)

    @property
    def replays(self) -> int:
        """How many steps are replayed in all, the first sweep included: ``T r - C(s + r, s + 1)``."""
        r = self.repetitions
        return self.length * r - comb(self.states + r, self.states + 1)

    @classmethod
    def named(cls, name: str, length: int) -> Schedule:
        """The schedule "every", "sqrt" or "log"."""
        if name not in NAMES:
            raise InputError(f"schedule={name!r}", f"one of {', '.join(NAMES)}, or 'auto'", "schedule='auto' chooses from the memory budget")
        if name == "log":
            r = next(r for r in range(1, length + 1) if comb(2 * r, r) >= length)
            return cls(length, _states(length, r))
        return cls(length, _states(length, 1 if name == "every" else 2))

    @classmethod
    def within(cls, length: int, states: int) -> Schedule:
        """The one with the fewest replays that keeps at most ``states`` states (as few of them as that takes).

        Raises InputError where not even one fits.
        """
        if states < 1:
            raise InputError("a memory budget below one state of the training", "room for at least one", "raise memory=, or keep='disk'")
        return cls(length, _states(length, repetitions(length, states)))


def repetitions(length: int, states: int) -> int:
    """The smallest r with ``C(states + r, states) >= length``."""
    r = 0
    while comb(states + r, states) < length:
        r += 1
    return r


def _states(length: int, r: int) -> int:
    """The smallest s with ``C(s + r, s) >= length``."""
    s = 1
    while comb(s + r, s) < length:
        s += 1
    return s


def split(length: int, states: int) -> int:
    """How far to go before the next state is kept, with ``length`` steps ahead and ``states`` states to keep, the present one among them."""
    r = repetitions(length, states)
    left, right = comb(states + r - 1, states), comb(states - 1 + r, states - 1)  # what r-1 more repetitions, and one state less, can do
    shorter = comb(states + r - 2, states) if r >= 2 else 0
    return max(1, length - right, min(shorter, left, length - 1))


def walk(
    schedule: Schedule,
    first: S,
    advance: Callable[[S, int, int], S],
    back: Callable[[S, int], None],
    keep: Callable[[int, S], None],
    drop: Callable[[int], None],
    load: Callable[[int], S],
) -> None:
    """Walk backwards: ``back(state before step k, k)`` for k = length-1 .. 0.

    ``advance(state, from, to)``: replay. ``keep(k, state)``, ``load(k)``, ``drop(k)``: the states that are kept, at most
    ``schedule.states`` at a time.
    """
    held = [0]
    keep(0, first)
    for k in reversed(range(schedule.length)):
        while held[-1] > k:
            drop(held.pop())
        at = held[-1]
        state = load(at)
        while at < k and len(held) < schedule.states:
            to = at + split(k + 1 - at, schedule.states - len(held) + 1)
            state = advance(state, at, to)
            at = to
            if at < k:
                keep(at, state)
                held.append(at)
        if at < k:
            state = advance(state, at, k)
        back(state, k)
    drop(0)
