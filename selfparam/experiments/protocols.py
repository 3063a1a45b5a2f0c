"""The protocols of the paper as functions of a lab, a cell and its target sets -> scores.

single: one context into a fresh θ'. batch: n contexts at once, all questions after. sequential: n contexts one after
another (a fold; merged after each), all questions after every step. The ablation is one of these with other authors.
Refuses to know files and processes. Source: arXiv 2410.00487, sections 4.1-4.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from selfparam.data.items import Item
from selfparam.experiments.lab import Lab
from selfparam.experiments.spec import Cell, Table
from selfparam.methods import Reader, Stacking
from selfparam.methods.readers import ANSWER_TOKENS
from selfparam.metrics.qa_f1 import mean_f1, qa_f1
from selfparam.types import TargetSet, content_hash

Scores = dict[str, Any]


def members(table: Table, cell: Cell) -> range:
    """Which items of the benchmark the cell is about. Sequences do not share contexts."""
    if table.protocol == "single":
        return range(cell.index, cell.index + 1)
    return range(cell.index * cell.n, (cell.index + 1) * cell.n)


def at_once(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet]) -> Scores:
    """single and batch: absorb the contexts of the cell in one call, then ask."""
    begin = time.perf_counter()
    reader = cell.method.make().absorb(lab.lm, sets, seed=table.seed)
    absorbed = time.perf_counter() - begin
    scores = scores_of(lab, table, cell, sets, reader)
    scores["seconds"]["absorb"] = absorbed
    return scores


def stacked(lab: Lab, table: Table, cells: Sequence[Cell], sets: Sequence[TargetSet], method: Stacking) -> list[Scores]:
    """single: the cells' contexts, each into its own θ', trained together. seconds: the stack's, shared equally."""
    readers = method.absorb_each(lab.lm, sets, seed=table.seed)
    found, absorbing = [], 0.0
    for cell, one in zip(cells, sets, strict=True):
        begin = time.perf_counter()
        reader = next(readers)
        absorbing += time.perf_counter() - begin
        found.append(scores_of(lab, table, cell, [one], reader))
    for scores in found:
        scores["seconds"]["absorb"] = absorbing / len(found)
    return found


def scores_of(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet], reader: Reader) -> Scores:
    """What a reader knows of the cell's contexts, what F1 hides, and the seconds of answering."""
    items = [lab.bench.items[i] for i in members(table, cell)]
    begin = time.perf_counter()
    scores = asked(reader, items)
    answering = time.perf_counter() - begin
    return {
        **scores, **aside(lab, table, reader, items), "targets": content_hash(*(s.id for s in sets)),
        "pairs": sum(len(s.related) for s in sets), "seconds": {"answer": answering},
    }


def sequential(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet]) -> Scores:
    """One sequence: matrix[k][j] = F1 on context j after steps[k] injections; step 0 is the base.

    just: mean F1 on the context that was injected last. f1: mean over all contexts at the end.
    """
    items = [lab.bench.items[i] for i in members(table, cell)]
    method, once = cell.method.make(), cell.method.at_once
    steps = sorted({0, cell.n}) if once else sorted({*(table.ask_at or range(cell.n + 1)), cell.n})
    groups = [sets] if once else [[one] for one in sets]
    reader: Reader | None = None
    matrix: list[list[float]] = []
    answers: list[list[str]] = []
    just: list[float] = []
    absorbing = answering = 0.0
    if 0 in steps:
        matrix.append(base_row(lab, items, answers))
    for done, group in enumerate(groups, 1):
        begin = time.perf_counter()
        reader = method.absorb(lab.lm, group, after=reader, seed=table.seed)
        absorbing += time.perf_counter() - begin
        begin = time.perf_counter()
        step = cell.n if once else done
        if step in steps:
            found = asked(reader, items)
            matrix.append(list(found["contexts"].values()))
            answers.append([one[2] for one in found["answers"]])
            if not once:
                just.append(matrix[-1][done - 1])
        answering += time.perf_counter() - begin
    assert reader is not None  # spec: n is at least 1
    return {
        **found, **aside(lab, table, reader, items), "steps": steps, "matrix": matrix, "answers_by_step": answers,
        "just": mean(just) if just else None, "targets": content_hash(*(s.id for s in sets)),
        "pairs": sum(len(s.related) for s in sets), "seconds": {"absorb": absorbing, "answer": answering},
    }


def base_row(lab: Lab, items: Sequence[Item], answers: list[list[str]]) -> list[float]:
    """F1 of θ itself on each context, from memory; its answers are appended."""
    given = lab.lm.answer([q.text for item in items for q in item.questions], max_new_tokens=ANSWER_TOKENS)
    answers.append(given)
    left = iter(given)
    return [mean(qa_f1(next(left), q.answers) for q in item.questions) for item in items]


PROTOCOLS: dict[str, Callable[[Lab, Table, Cell, Sequence[TargetSet]], Scores]] = {
    "single": at_once, "batch": at_once, "sequential": sequential,
}


def asked(reader: Reader, items: Sequence[Item]) -> Scores:
    """QA-F1: mean over a context's questions, then over contexts; every answer."""
    questions = [q for item in items for q in item.questions]
    given = reader.answer(questions)
    scored = [(q.about or "", q.text, a, qa_f1(a, q.answers)) for q, a in zip(questions, given, strict=True)]
    by_context: dict[str, list[float]] = {item.context.id: [] for item in items}
    for about, _, _, score in scored:
        by_context[about].append(score)
    return {"f1": mean_f1(by_context), "contexts": {x: mean(scores) for x, scores in by_context.items()},
            "answers": scored}


def aside(lab: Lab, table: Table, reader: Reader, items: Sequence[Item]) -> Scores:
    """What F1 hides: leak, fresh, world, kl, 𝒮. Nothing but 𝒮 for a reader that is handed the right context."""
    found: Scores = {"storage_tokens": reader.storage_tokens, "notes": list(reader.notes)}
    if reader.storage_tokens is None:
        return found | {"leak": None, "fresh": None, "world": None, "kl": None}
    elsewhere = [q for item in items[: table.probes.leak] for q in item.elsewhere]
    leak = None
    if elsewhere:
        given = reader.answer(elsewhere)
        leak = mean(qa_f1(a, q.answers) for a, q in zip(given, elsewhere, strict=True))
    return found | {"leak": leak} | lab.probe(reader.lm)
