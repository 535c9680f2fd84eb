"""``Datamodel``: what each example contributes, read off models that were retrained without it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import DataMismatch, InputError, QueryError
from headwater.evaluate.bank import Bank
from headwater.evaluate.ridge import Gram, Line, chosen_alpha
from headwater.influence.request import Request
from headwater.result import TrainingScores
from headwater.tasks import fingerprint
from headwater.tasks.code import code_digest


@dataclass(frozen=True, eq=False)
class Datamodel:
    """Regression of retrained measurements on who was there (Ilyas et al. 2022, arXiv 2202.00622): no gradients, no assumption about the
    training, only its outcomes.

    ``f(z_q; theta(S)) = c_q + sum over i in S of score[q, i] + noise`` is fitted to the subsets S of a bank (mean over seeds), with an
    unpenalised constant and the penalty ``alpha |scores|^2``.

    Args:
        bank: from ``hw.evaluate.retrain``, of many subsets: with fewer than examples, what lies between them is shrunk to 0, and the
            standard errors say so. ``bank.at(queries)`` for some of its queries. Subsets with missing trainings are left out.
        alpha: the penalty; default: the one that predicts left-out subsets best, the same for all queries. 0: least squares.
        folds: parts that the subsets are dealt into for that. ``seed``: of the deal.

    Scores have the measurement's unit: the effect of having an example, on average over subsets of the bank's size. ``stderr``: see
    :meth:`headwater.evaluate.ridge.Gram.line`. Where all subsets have one size, they cannot tell the level (all scores of a query raised by
    the same amount predict the same differences): it is set so that the prediction for all examples is what the models trained on all
    of them say (``bank.base``); a bank without these leaves every query's scores with the mean 0, and the provenance says so.

    Judge it by other trainings than those it was fitted to; ``hw.evaluate.lds`` warns otherwise::

        fitted, judging = bank.split(0.8)
        hw.evaluate.lds(hw.trace(run, queries, hw.Datamodel(fitted)), judging)

    >>> from headwater.evaluate import Bank, halves
    >>> effects = np.array([[3.0, 1.0, 0.0, 2.0]])
    >>> subsets = halves(4, 30)
    >>> bank = Bank(subsets, (0,), subsets.sums(effects)[:, None], effects.sum(1)[None])
    >>> Datamodel(bank).scores().values.round(4)
    array([[3., 1., 0., 2.]])
    """

    bank: Bank
    alpha: float | None = None
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bank, Bank):
            raise InputError(f"a {type(self.bank).__name__} where a bank belongs", "a hw.evaluate.Bank", "hw.evaluate.retrain makes one, Bank.open reads one")
        if self.alpha is not None and not 0 <= self.alpha < np.inf:
            raise InputError(f"alpha={self.alpha}", "a penalty of at least 0, or None", "leave it out: it is chosen by cross-validation")
        if self.folds < 2:
            raise InputError(f"folds={self.folds}", "at least two", "folds=5")

    def answer(self, request: Request) -> TrainingScores:
        """The scores of a question whose queries are the bank's (see :class:`headwater.influence.request.Answering`).

        Raises:
            DataMismatch: the bank's models were trained on other data than the run's. QueryError: it measured other queries, or by another
            measure.
        """
        run, asked, bank = request.run, request.asked, self.bank
        _same_data(bank, request)
        _same_queries(bank, request)
        rows = np.concatenate(asked.rows)
        found = self._fitted(bank if asked.names is None else _added_up(bank, rows, asked.count), asked.names)
        found.provenance.update(run=str(run.path), data=[stage.fingerprint for stage in run.stages], queries_compared=bank.facts is not None and bank.picked is None)
        return found

    def scores(self) -> TrainingScores:
        """The same without a run: rows are the bank's queries, columns its training examples."""
        return self._fitted(self.bank, None)

    def _fitted(self, bank: Bank, names: tuple[str, ...] | None) -> TrainingScores:
        started = time.perf_counter()
        whole = bank.complete()
        x, y = whole.subsets.mask().astype(np.float64), whole.values.mean(axis=1)
        alpha, explained = chosen_alpha(x, y, self.folds, self.seed) if self.alpha is None else (self.alpha, None)
        if explained is not None and explained <= 0:
            warnings.warn(
                f"the regression predicts left-out subsets no better than their mean (R^2 {explained:.2f}): {len(x)} subsets are too few, or the measurement "
                "does not depend on which examples are there; see stderr",
                stacklevel=2,
            )
        gram = Gram.of(x, y)
        rank = len(gram.values)
        if alpha == 0 and rank >= len(x) - 1:
            raise InputError(f"alpha=0 and {len(x)} subsets of {x.shape[1]} examples", "more subsets than examples for least squares", "leave alpha out")
        line = gram.line(alpha)
        level, doubt, how = _level(whole, x, line)
        facts = {
            "bank": str(bank.directory) if bank.directory is not None else None,
            "subsets": len(x),
            "seeds": list(bank.seeds),
            "alpha": alpha,
            "explained": explained,
            "level": how,
            "fitted": whole.marks(),
            "cost": {"seconds": round(time.perf_counter() - started, 3), "retraining_seconds": bank.seconds},
        }
        name = f"Datamodel({len(x)} subsets, alpha={alpha:.3g})"
        return TrainingScores(line.slope.T + level[:, None], np.sqrt(line.stderr.T**2 + doubt[:, None]), name, "measurement", names, provenance=facts)


def _level(bank: Bank, x: np.ndarray, line: Line) -> tuple[np.ndarray, np.ndarray, str]:
    """What to add to each query's scores and its variance, both (queries,), and where it comes from (see :class:`Datamodel`).

    Where all subsets lack k examples the slopes sum to 0, the prediction for all examples is the intercept, a mean of the rows, and the
    models trained on all of them have the noise of one row: a variance of ``noise (1 + 1 / rows) / k^2``.
    """
    sizes, nothing = x.sum(axis=1), np.zeros(len(line.intercept))
    if np.ptp(sizes) > 0:
        return nothing, nothing, "by subsets of several sizes"
    if not np.isfinite(bank.base).all():
        return nothing, nothing, "unknown: every query's scores have the mean 0"
    missing = x.shape[1] - sizes[0]
    level = (bank.base.mean(axis=0) - line.intercept) / missing
    return level, line.noise * (1 + 1 / len(x)) / missing**2, "by the models trained on all examples"


def _added_up(bank: Bank, rows: np.ndarray, count: int) -> Bank:
    """The bank of named queries, whose measurement is the sum of their examples'."""
    member = (np.arange(count)[:, None] == rows).astype(np.float64)
    return Bank(bank.subsets, bank.seeds, bank.values @ member.T, bank.base @ member.T, bank.directory, bank.seconds, bank.name, bank.facts, bank.picked)


def _same_data(bank: Bank, request: Request) -> None:
    run = request.run
    mend = "retrain the experiment that the run was recorded with, or trace its own run"
    if run.size != bank.subsets.n:
        raise DataMismatch(f"a bank over {bank.subsets.n:,} training examples, and a run of {run.size:,}", "the same training data", mend)
    theirs: Any = (bank.facts or {}).get("train", {}).get("fingerprint")
    if theirs is not None and [theirs] != [stage.fingerprint for stage in run.stages]:
        raise DataMismatch("a bank whose models were trained on other examples than the run's", "the same examples in the same order", mend)


def _same_queries(bank: Bank, request: Request) -> None:
    asked, counts = request.asked, sum(len(examples) for examples in request.asked.examples)
    mend = "ask about the test set of the experiment, or about some of it with the bank cut alike: bank.at([...])"
    if counts != bank.queries:
        raise QueryError(f"{counts} queries, and a bank that measured {bank.queries}", "the queries that the bank measured, in that order", mend)
    facts = bank.facts or {}
    if "test" in facts and bank.picked is None and len(asked.examples) == 1 and fingerprint(asked.examples[0]) != facts["test"]["fingerprint"]:
        raise QueryError("other queries than those that the bank measured", "the test set of the experiment, in its order", mend)
    if "measure" in facts and code_digest(asked.measure, held=True) != facts["measure"]:
        raise QueryError("another measure than the bank's", "the measure that the retrained models were measured by", "pass the same measure= to retrain and to trace")
