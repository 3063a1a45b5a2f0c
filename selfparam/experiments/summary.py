"""Rows -> what a table shows: means over contexts, bootstrap intervals, paired differences, the paper's figures.

Refuses to know how rows are made and how a table looks. Source: arXiv 2410.00487, tables 1 and 2, figure 2; intervals
are percentile bootstraps over contexts (sequential: over sequences, whose contexts depend on each other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np

from selfparam.experiments.rows import Row
from selfparam.experiments.spec import Cell, MethodSpec, ModelSpec, Table, cells_of, methods_of
from selfparam.metrics.recall import KS, mcnemar

SAMPLES = 2000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a table. f1 and the probes: means (None: not measured); kl in nats per token, seconds of a cell.

    interval: 95 % of the mean F1. gain: mean difference to the best baseline on the same contexts with its 95 %.
    storage: mean tokens kept outside the weights. done, cells: how many of its cells have a row.
    forgetting, bwt, step (seconds of one step), new, old (shares of changed facts): of sequences.
    recall: of recommendations, Recall@1 over all targets by filter, and the least and most over all choices among ties;
    last: Recall@20; interval and gain are of the table's filter; p: exact McNemar test against the gain's rival.
    lists, unknown: shares of outputs with a numbered list, of titles that are no entity.
    """

    method: MethodSpec
    done: int
    cells: int
    f1: float | None = None
    interval: Interval | None = None
    paper: float | None = None
    gain: tuple[float, Interval] | None = None
    just: float | None = None
    leak: float | None = None
    fresh: float | None = None
    world: float | None = None
    kl: float | None = None
    storage: float | None = None
    seconds: float | None = None
    forgetting: float | None = None
    bwt: float | None = None
    step: float | None = None
    new: float | None = None
    old: float | None = None
    recall: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    last: float | None = None
    p: float | None = None
    lists: float | None = None
    unknown: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """The lines of one model and one number of contexts. baseline: the label that gains are measured against."""

    model: ModelSpec
    n: int
    lines: tuple[Line, ...]
    baseline: str = ""
    notes: tuple[str, ...] = ()


def bootstrap(values: Sequence[float], samples: int = SAMPLES) -> Interval:
    """95 % percentile interval of the mean under resampling, with a fixed seed."""
    rng = np.random.default_rng(0)
    array = np.asarray(values, dtype=float)
    means = array[rng.integers(0, len(array), (samples, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def units(table: Table, rows: Sequence[Row]) -> dict[str, float]:
    """The independent scores of a method: F1 by context, or by sequence; Recall@1 by conversation asked about."""
    if table.protocol == "sequential":
        return {str(row["index"]): row["f1"] for row in rows}
    if table.protocol == "recommend":
        [row] = rows
        found: dict[str, list[bool]] = {}
        for unit, hit in zip(row["units"], hits(row, table.recommend.filter), strict=True):
            found.setdefault(unit, []).append(hit)
        return {unit: mean(hit) for unit, hit in found.items()}
    return {context: score for row in rows for context, score in row["contexts"].items()}


def hits(row: Row, chosen: str, k: int = 1) -> list[bool]:
    """For each target of the test, whether it is a hit at k."""
    return [0 < at <= k for at in row["hit_at"][chosen]]


def blocks_of(table: Table, rows: Mapping[str, Row]) -> list[Block]:
    """The whole table from its rows (by cell id), as far as they are there."""
    cells = cells_of(table)
    found = []
    for model in table.models:
        sizes = table.contexts if table.protocol == "batch" else table.contexts[:1]
        for n in sizes:
            own = [c for c in cells if c.model == model and (table.protocol != "batch" or c.n == n)]
            found.append(_block(table, model, n, own, rows))
    return found


def _block(table: Table, model: ModelSpec, n: int, cells: Sequence[Cell], rows: Mapping[str, Row]) -> Block:
    methods = methods_of(table, model)
    by_method = {m.label: [c for c in cells if c.method.label == m.label] for m in methods}
    good = {label: [rows[c.id] for c in own if c.id in rows and "error" not in rows[c.id]]
            for label, own in by_method.items()}
    scores = {label: units(table, found) for label, found in good.items() if found}
    baselines = {m.label: mean(scores[m.label].values()) for m in methods
                 if m.role == "baseline" and m.label in scores}
    best = max(baselines, key=lambda label: baselines[label]) if baselines else ""
    lines = []
    recommends = table.protocol == "recommend"
    for method in methods:
        own = by_method[method.label]
        failed = [rows[c.id]["error"] for c in own if c.id in rows and "error" in rows[c.id]]
        rival = method.against or (best if method.role == "ours" else "")
        gain = _gain(scores.get(method.label, {}), scores.get(rival, {}))
        per_step = table.per_step if table.protocol == "sequential" and not method.at_once else 0
        lines.append(_line(method, per_step, len(own), good[method.label], scores.get(method.label, {}),
                           method.paper_figure(model, table.recommend.filter if recommends else n), gain, failed))
        if recommends and good[method.label]:
            lines[-1] = _with_recall(lines[-1], table.recommend.filter, good[method.label][0], good.get(rival, []))
    hashes = {row["model_hash"] for c in cells if (row := rows.get(c.id))}
    notes = ["rows of different weights: run the table again"] if len(hashes) > 1 else []
    pairs: dict[tuple[Any, ...], set[str]] = {}
    for c in cells:
        if c.method.author and (targets := rows.get(c.id, {}).get("targets")):
            pairs.setdefault((c.method.author, c.method.pairs, c.index), set()).add(targets)
    if any(len(found) > 1 for found in pairs.values()):
        notes.append("rows of one author with other pairs: run them again together")
    made = {"{device}, {dtype}, trained in {auto}".format(**row["machine"])
            for c in cells if "machine" in (row := rows.get(c.id, {}))}
    if len(made) > 1:
        notes.append(f"rows of different machines ({'; '.join(sorted(made))}): seconds do not compare, and scores "
                     "less well")
    return Block(model, n, tuple(lines), best, tuple(notes))


def _line(method: MethodSpec, per_step: int, cells: int, rows: Sequence[Row], scores: Mapping[str, float],
          paper: float | None, gain: tuple[float, Interval] | None, failed: Sequence[str]) -> Line:
    notes = [note for row in rows for note in row.get("notes", [])]
    if method.against and gain:
        notes.append(f"gain against '{method.against}'")
    if failed:
        notes.append(f"{len(failed)} failed: {failed[0]}")
    if not rows:
        return Line(method, 0, cells, paper=paper, notes=tuple(dict.fromkeys(notes)))

    def average(key: str) -> float | None:
        found = [row[key] for row in rows if row.get(key) is not None]
        return mean(found) if found else None

    values = list(scores.values())
    return Line(
        method, len(rows), cells, mean(values), bootstrap(values) if len(values) > 1 else None, paper, gain,
        average("just"), average("leak"), average("fresh"), average("world"), average("kl"),
        average("storage_tokens"), mean(row["seconds"]["absorb"] for row in rows), average("forgetting"),
        average("bwt"), mean(row["seconds"]["absorb"] / -(-row["n"] // per_step) for row in rows) if per_step else None,
        average("new"), average("old"), notes=tuple(dict.fromkeys(notes)),
    )


def _with_recall(line: Line, chosen: str, row: Row, rivals: Sequence[Row]) -> Line:
    """The line of a row of the protocol recommend."""
    n = len(row["units"])
    found = {r: (mean(hits(row, r)), row["low"][r][0] / n, row["high"][r][0] / n) for r in row["hit_at"]}
    p = None
    if rivals and rivals[0] is not row and rivals[0]["units"] == row["units"]:
        p = mcnemar(hits(row, chosen), hits(rivals[0], chosen)).p
    return replace(line, f1=None, recall=found, last=mean(hits(row, chosen, KS[-1])), p=p,
                   lists=row["shares"]["lists"], unknown=row["shares"]["out_of_vocabulary"])


def _gain(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, Interval] | None:
    """Mean paired difference on the contexts that both have, and its interval."""
    both = [ours[k] - theirs[k] for k in ours if k in theirs]
    return (mean(both), bootstrap(both)) if len(both) > 1 else None


def retention(rows: Sequence[Row]) -> dict[str, Any]:
    """Figure 2: mean over sequences of F1 [steps, contexts], the steps, and the base's mean (its step 0)."""
    matrices = np.array([row["matrix"] for row in rows])
    steps = rows[0]["steps"]
    base = float(matrices[:, steps.index(0)].mean()) if 0 in steps else None
    return {"steps": steps, "matrix": matrices.mean(axis=0), "base": base, "sequences": len(rows)}
