"""What a model that learns in turn forgets: forgetting and backward transfer, from a retention matrix.

R[k][j] = score on context j after step k; R[j][j], right after it was learned. Refuses to know models and questions.
Sources: backward transfer, Lopez-Paz & Ranzato 2017 (arXiv 1706.08840, section 2); forgetting, Chaudhry et al. 2018
(arXiv 1801.10112, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean


def backward_transfer(learned: Sequence[float], end: Sequence[float], newest: int = 1) -> float | None:
    """BWT = mean over earlier contexts of R[T][j] - R[j][j], in [-1, 1]; negative: later steps cost.

    learned: R[j][j]; end: R[T][j], both [contexts] in the order of learning. newest: contexts of the last step, which
    are left out. None where nothing is earlier.
    """
    earlier = range(len(end) - newest)
    return mean(end[j] - learned[j] for j in earlier) if earlier else None


def forgetting(rows: Sequence[Sequence[float]], learned: Sequence[float], end: Sequence[float],
               newest: int = 1) -> float | None:
    """F = mean over earlier contexts of max_l R[l][j] - R[T][j] over the steps l before the last, in [-1, 1].

    rows: R[l] of those steps l that were asked, [steps, contexts], without the base's and without the last.
    """
    earlier = range(len(end) - newest)
    return mean(max(learned[j], *(row[j] for row in rows)) - end[j] if rows else learned[j] - end[j]
                for j in earlier) if earlier else None
