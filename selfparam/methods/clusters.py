"""RAPTOR's clusters: vectors reduced by UMAP, then a Gaussian mixture whose size the BIC chooses.

A node may be in several. First over everything, then inside each cluster; one whose texts are too long for a summary is
clustered again. Heavy packages are imported inside. Refuses to know texts and models.
Source: arXiv 2401.18059, section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from selfparam.errors import TableError

#: vectors [N, d] and tokens of each -> clusters of indices
Cluster = Callable[[Any, Sequence[int]], list[list[int]]]
#: vectors [N, d], neighbours, dimensions -> [N, dimensions]
Reduce = Callable[[Any, int, int], Any]

DIMENSION = 10
THRESHOLD = 0.1  # posterior above which a node belongs to a cluster
MOST_CLUSTERS = 50
LONGEST = 3500  # tokens of a cluster's texts
SEED_OF_SIZE, SEED_OF_FIT = 224, 0


def clusters(vectors: Any, lengths: Sequence[int], reduce: Reduce | None = None) -> list[list[int]]:
    """Clusters (indices, ascending) of the rows. Raises TableError without the packages."""
    reduce = reduce or umap_reduce
    found: list[list[int]] = []
    for members in _two_levels(np.asarray(vectors), reduce):
        total = sum(lengths[i] for i in members)
        if len(members) > 1 and total > LONGEST:
            inner = clusters(np.asarray(vectors)[members], [lengths[i] for i in members], reduce) \
                if len(members) < len(lengths) else _in_order(lengths)
            found += [[members[i] for i in part] for part in inner]
        else:
            found.append(members)
    return found


def _two_levels(vectors: Any, reduce: Reduce) -> list[list[int]]:
    n = len(vectors)
    if n <= DIMENSION + 1:
        return [list(range(n))]
    found: list[list[int]] = []
    for members in mixture(reduce(vectors, int((n - 1) ** 0.5), min(DIMENSION, n - 2))):
        if len(members) <= DIMENSION + 1:
            found.append(members)
            continue
        inner = mixture(reduce(vectors[members], 10, DIMENSION))
        found += [[members[i] for i in part] for part in inner]
    return found


def _in_order(lengths: Sequence[int]) -> list[list[int]]:
    """Where clustering did not divide: neighbours together, as many as are short enough."""
    parts: list[list[int]] = []
    used = 0
    for i, length in enumerate(lengths):
        if not parts or used + length > LONGEST:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += length
    return parts


def mixture(points: Any) -> list[list[int]]:
    """Members of each component of the Gaussian mixture with the least BIC; components without members are left out."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise TableError("RAPTOR needs scikit-learn and umap-learn: pip install 'selfparam[raptor]'") from error

    def fitted(size: int, seed: int) -> Any:
        try:
            return GaussianMixture(size, random_state=seed).fit(points)
        except ValueError:  # a singular covariance: this size is not to be had
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = {size: fitted(size, SEED_OF_SIZE) for size in range(1, min(MOST_CLUSTERS, len(points)))}
        bic = {size: fit.bic(points) for size, fit in fits.items() if fit is not None}
        best = fitted(min(bic, key=lambda size: bic[size]), SEED_OF_FIT) if bic else None
    if best is None:
        return [list(range(len(points)))]
    inside = best.predict_proba(points) > THRESHOLD
    return [found for column in inside.T if (found := [int(i) for i in np.flatnonzero(column)])]


def umap_reduce(vectors: Any, neighbours: int, dimensions: int) -> Any:
    """UMAP with cosine distances and a fixed seed. Raises TableError without the package."""
    try:
        import umap
    except ImportError as error:
        raise TableError("RAPTOR needs umap-learn: pip install 'selfparam[raptor]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reducer = umap.UMAP(n_neighbors=max(2, neighbours), n_components=dimensions, metric="cosine", random_state=0)
        return reducer.fit_transform(vectors)
