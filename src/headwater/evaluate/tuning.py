"""Choosing a setting on some queries, and judging it on others: what was chosen on the queries it is judged by is praised too much.

Published tables of diffusion attribution report the largest LDS over 27 regularisations on the queries that are reported, which no user
has at hand. :func:`tuned` keeps the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.evaluate.bank import Bank
from headwater.evaluate.datamodels import LDS, lds


@dataclass(frozen=True, eq=False)
class Tuned:
    """One of several scores, chosen by its LDS on some queries (see :func:`tuned`).

    ``scores``: the chosen ones, of all queries; ``chosen``: their place in the list; ``names``: of all. ``lds``: of the chosen, on ``judged``, the
    queries that had no part in the choice. ``candidates``: LDS of each on ``chosen_on`` (candidates,). Queries are numbered as in the bank.
    """

    scores: Any
    chosen: int
    names: tuple[str, ...]
    lds: LDS
    candidates: np.ndarray
    chosen_on: tuple[int, ...]
    judged: tuple[int, ...]
    picked: tuple[int, ...] | None = None

    def judge(self, bank: Bank, *, bootstrap: int = 1000, seed: int = 0) -> LDS:
        """LDS of the chosen scores on a bank of some of the queries (``bank.at([...])``), or on further trainings of them. Raises InputError where a
        query is among them that the choice was made on."""
        numbers, mine = _numbers(bank), list(range(_count(self.scores)) if self.picked is None else self.picked)
        used = {mine[q] for q in self.chosen_on}
        seen = sorted(used.intersection(numbers))
        if seen:
            expected = "queries that had no part in the choice: the numbers in judged"
            raise InputError(f"queries {seen[:5]} in a bank to judge by, on which these scores were chosen", expected, "bank.at(tuned.judged)")
        places = {number: place for place, number in enumerate(mine)}
        strange = [q for q in numbers if q not in places]
        if strange:
            raise InputError(f"queries {strange[:5]} that these scores are not of", f"queries among {mine[:5]} ...", "trace them too")
        return lds(_at(self.scores, [places[q] for q in numbers]), bank, bootstrap=bootstrap, seed=seed)

    def __repr__(self) -> str:
        return f"Tuned({self.names[self.chosen]}, chosen from {len(self.names)} on {len(self.chosen_on)} queries; on the others: {self.lds!r})"


def tuned(scores: Sequence[Any], bank: Bank, *, fraction: float = 0.5, bootstrap: int = 1000, seed: int = 0) -> Tuned:
    """Choose the scores with the largest LDS on a part of the queries, and report that LDS on the others.

    Args:
        scores: candidates of the same queries and training examples: a sweep, ``hw.trace(run, queries, hw.DTrak(regularisation=(0.0005, 0.005, 0.05)))``.
        bank: retrained models' measurements of those queries.
        fraction: of the queries, to choose on; they are drawn by ``seed``.

    Equal candidates: the first is chosen. Both parts are judged by the same trainings, so a setting that fits these subsets by chance
    is still praised; ``Tuned.judge`` takes a bank of others.

    Raises:
        InputError: fewer than two candidates, fewer than two queries in a part, or shapes that do not fit. NotFinite.
    """
    held = list(scores)
    if len(held) < 2:
        raise InputError(f"{len(held)} candidates to choose from", "at least two scores", "a sweep: hw.DTrak(regularisation=(0.0005, 0.005, 0.05))")
    count = round(fraction * bank.queries)
    if not 2 <= count <= bank.queries - 2:
        raise InputError(f"fraction={fraction} of {bank.queries} queries", "at least two queries to choose on, and two to judge by", "ask about more queries")
    wrong = [_count(s) for s in held if _count(s) != bank.queries]
    if wrong:
        raise InputError(f"scores of {wrong[0]} queries for a bank of {bank.queries}", "the same queries in both", "bank.at([...])")
    order = np.random.default_rng([seed, bank.queries]).permutation(bank.queries)
    chosen_on, judged = np.sort(order[:count]), np.sort(order[count:])
    found = np.array([lds(_at(s, chosen_on), bank.at(chosen_on), bootstrap=2, seed=seed).mean for s in held])
    best = int(found.argmax())
    names = tuple(str(getattr(s, "method", "")) or f"candidate {k}" for k, s in enumerate(held))
    report = lds(_at(held[best], judged), bank.at(judged), bootstrap=bootstrap, seed=seed)
    return Tuned(held[best], best, names, report, found, tuple(map(int, chosen_on)), tuple(map(int, judged)), bank.picked)


def _count(scores: Any) -> int:
    return len(getattr(scores, "values", scores))


def _at(scores: Any, queries: Any) -> Any:
    return scores.at(queries) if hasattr(scores, "at") else np.asarray(scores)[queries]


def _numbers(bank: Bank) -> list[int]:
    return list(range(bank.queries) if bank.picked is None else bank.picked)
