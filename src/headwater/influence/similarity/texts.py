"""How much two texts have in common, token by token: BM25, the classic of full-text search, and the overlap of their vocabularies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from headwater.errors import InputError
from headwater.influence.similarity.vectors import tokens_in
from headwater.tasks import Examples, Task

K1, B = 1.5, 0.75  # Robertson and Zaragoza 2009: the usual choice
READ = 1024  # examples at once


def bags(sets: Iterable[tuple[Examples, Task]]) -> sparse.csr_matrix:
    """How often each token occurs in each example, over all sets: (examples, tokens), float64. Raises InputError where there are no tokens."""
    rows, columns, first = [], [], 0
    for examples, task in sets:
        for start in range(0, len(examples), READ):
            stop = min(start + READ, len(examples))
            found = tokens_in(examples.batch(range(start, stop)), task)
            if found is None:
                raise InputError("a comparison of texts, and examples that are none", "token ids (examples, length)", "hw.floors.inputs('cosine') compares numbers")
            ids, counted = (t.cpu().numpy() for t in found)
            place, where = np.nonzero(counted)
            rows.append(first + start + place)
            columns.append(ids[place, where])
        first += len(examples)
    r, c = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_matrix((np.ones(len(r)), (r, c)), shape=(first, int(c.max(initial=0)) + 1))


def bm25(queries: sparse.csr_matrix, train: sparse.csr_matrix) -> np.ndarray:
    """BM25 of each training text for each query text, (queries, train): ``sum over tokens t of the query of count_q(t) idf(t) tf (k1 + 1) /
    (tf + k1 (1 - b + b length / mean length))``, ``idf = log(1 + (N - n_t + 1/2) / (n_t + 1/2))`` so that it is never negative."""
    queries, train = _as_wide(queries, train)
    n, length = train.shape[0], np.asarray(train.sum(1)).ravel()
    holding = np.asarray((train > 0).sum(0)).ravel()
    idf = np.log1p((n - holding + 0.5) / (holding + 0.5))
    full = K1 * (1 - B + B * length / max(length.mean(), 1e-300))
    weight = train.copy()
    at = np.repeat(np.arange(n), np.diff(weight.indptr))
    weight.data = weight.data * (K1 + 1) / (weight.data + full[at]) * idf[weight.indices]
    return (queries @ weight.T).toarray()


def overlap(queries: sparse.csr_matrix, train: sparse.csr_matrix) -> np.ndarray:
    """Jaccard similarity of the sets of tokens, (queries, train); 0 for two texts without any."""
    queries, train = ((m > 0).astype(float) for m in _as_wide(queries, train))
    shared = (queries @ train.T).toarray()
    either = np.asarray(queries.sum(1)) + np.asarray(train.sum(1)).T - shared
    return shared / np.maximum(either, 1)


def _as_wide(a: sparse.csr_matrix, b: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Both with as many columns, and duplicates added up."""
    wide = max(a.shape[1], b.shape[1])
    out = []
    for m in (a, b):
        m = sparse.csr_matrix((m.data, m.indices, m.indptr), shape=(m.shape[0], wide))
        m.sum_duplicates()
        out.append(m)
    return out[0], out[1]
