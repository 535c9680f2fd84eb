"""Where checkpoints are taken: at the ends of equal intervals, also when nobody knows how long training will be."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.errors import InputError


class Places:
    """The checkpoints of one stage, in steps since its start.

    With the number of steps known, ``round(j * steps / count)``. Without, every ``stride`` steps, the stride doubling whenever more than
    ``2 * count`` have piled up; at the end the ``count`` nearest to equal intervals stay.

    >>> places = Places(2, None)
    >>> for step in range(1, 11):
    ...     if places.wanted(step, final=step == 10) and step < 10:
    ...         gone = places.thin()
    >>> places.settle(10), places.held
    ([2, 6, 8], [4, 10])
    """

    def __init__(self, checkpoints: int | Sequence[int], steps: int | None) -> None:
        fixed = None if isinstance(checkpoints, int) else sorted({int(c) for c in checkpoints})
        self.count = checkpoints if isinstance(checkpoints, int) else len(set(checkpoints))
        if self.count < 1 or (fixed and fixed[0] < 1):
            raise InputError(f"checkpoints={checkpoints!r}", "how many (at least 1), or at which steps of the stage (from 1 on)", "checkpoints=6 is the published choice")
        if steps is not None and steps < 1:
            raise InputError(f"steps={steps}", "how many optimizer steps the stage will take", "leave it out if you do not know")
        if fixed is None and steps is not None:
            fixed = [round(j * steps / self.count) for j in range(1, self.count + 1)]
        self.fixed = None if fixed is None else set(fixed) - {0}
        self.stride = 1
        self.held: list[int] = []

    def wanted(self, step: int, final: bool = False) -> bool:
        """Whether to take a checkpoint after ``step``; it then counts as taken."""
        take = final or (step in self.fixed if self.fixed is not None else step % self.stride == 0)
        if take:
            self.held.append(step)
        return take

    def thin(self) -> list[int]:
        """Checkpoints that need not be kept any longer."""
        if self.fixed is not None or len(self.held) <= 2 * self.count:
            return []
        self.stride *= 2
        gone = [s for s in self.held if s % self.stride]
        self.held = [s for s in self.held if s % self.stride == 0]
        return gone

    def settle(self, last: int) -> list[int]:
        """At the end of a stage of ``last`` steps: the checkpoints to drop, so that ``count`` well-placed ones are left."""
        if self.fixed is not None or len(self.held) <= self.count:
            return []
        free, chosen = list(self.held), set()
        for j in range(self.count, 0, -1):
            best = min(free, key=lambda s: abs(s - j * last / self.count))
            chosen.add(best)
            free.remove(best)
        gone = [s for s in self.held if s not in chosen]
        self.held = sorted(chosen)
        return gone
