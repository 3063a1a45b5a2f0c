"""The protocols of the paper as functions of a lab, a cell and its target sets -> scores.

single: one context into a fresh θ'. batch: n contexts at once, all questions after. sequential: n contexts one after
another, or some in each step (a day's): a fold, merged after each step, all questions after every step. The ablation is
one of these with other authors. recommend is in recommending.py. Refuses to know files and processes.
Source: arXiv 2410.00487, sections 4.1-4.3; days and changed facts are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import mean

from selfparam.data.items import Item
from selfparam.experiments.lab import Lab
from selfparam.experiments.recommending import Scores, recommending
from selfparam.experiments.spec import Cell, Table
from selfparam.experiments.unfinished import Unfinished
from selfparam.methods import Reader, Stacking
from selfparam.methods.readers import ANSWER_TOKENS
from selfparam.metrics.forgetting import backward_transfer, forgetting
from selfparam.metrics.qa_f1 import mean_f1, qa_f1
from selfparam.types import Question, TargetSet, content_hash


def members(table: Table, cell: Cell) -> range:
    """Which items of the benchmark the cell is about. Sequences do not share contexts."""
    if table.protocol == "single":
        return range(cell.index, cell.index + 1)
    return range(cell.index * cell.n, (cell.index + 1) * cell.n)


def at_once(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet], unfinished: Unfinished) -> Scores:
    """single and batch: absorb the contexts of the cell in one call, then ask."""
    begin, method = time.perf_counter(), cell.method.make()
    reader = method.absorb(lab.lm, sets, seed=table.seed, **unfinished.options(method))
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


def sequential(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet], unfinished: Unfinished) -> Scores:
    """One sequence: matrix[k][j] = F1 on context j after steps[k] contexts; 0 is the base.

    learned: F1 on each context right after its step, just: their mean. f1: mean over all contexts at the end.
    forgetting, bwt: of metrics/forgetting.py, on the steps that were asked. along: probes after those steps.
    """
    items = [lab.bench.items[i] for i in members(table, cell)]
    method, size = cell.method.make(), cell.n if cell.method.at_once else table.per_step
    every = range(0, cell.n + 1, size)
    steps = sorted({0, cell.n} if cell.method.at_once else {*(table.ask_at or every), cell.n})
    reader: Reader | None = None
    parts = ("matrix", "answers_by_step", "learned", "along")
    so_far: Scores = {part: [] for part in parts} | {"seconds": [0.0, 0.0]}
    before = unfinished.restored(lab.lm)
    if before:
        reader, at, so_far = before
    (matrix, answers, learned, along), seconds = (so_far[part] for part in parts), so_far["seconds"]
    if 0 in steps and not before:
        matrix.append(base_row(lab, items, answers))
        along.append(lab.base)
    first, since = at if before else 0, time.perf_counter()
    for start in range(first, cell.n, size):
        done, left = min(start + size, cell.n), ""
        if start > first:
            spent = time.perf_counter() - since
            left = f", about {timedelta(seconds=round(spent / (start - first) * (cell.n - start)))} left of it"
        unfinished.says((f"context {done}" if done == start + 1 else f"contexts {start + 1} to {done}")
                        + f" of {cell.n}{left}")
        begin = time.perf_counter()
        whole = unfinished.options(method) if size == cell.n else {}
        reader = method.absorb(lab.lm, sets[start:done], after=reader, seed=table.seed, **whole)
        seconds[0] += time.perf_counter() - begin
        begin = time.perf_counter()
        found = asked(reader, items if done in steps else items[start:done])
        scores = list(found["contexts"].values())
        learned += scores[start:done] if done in steps else scores
        if done in steps:
            matrix.append(scores)
            answers.append([one[2] for one in found["answers"]])
            along += [lab.probe(reader.lm)] if table.probes.along and done < cell.n else []
        seconds[1] += time.perf_counter() - begin
        if done < cell.n:
            unfinished.keep(reader, done, so_far)
    assert reader is not None  # spec: n is at least 1
    beside = aside(lab, table, reader, items)
    newest = cell.n - (cell.n - 1) // size * size
    earlier = matrix[0 in steps : -1]
    once = cell.method.at_once
    return {
        **found, **beside, **changed(reader, items), "steps": steps, "matrix": matrix, "answers_by_step": answers,
        "learned": learned, "just": None if once else mean(learned),
        "forgetting": forgetting(earlier, learned, matrix[-1], newest),
        "bwt": backward_transfer(learned, matrix[-1], newest),
        "targets": content_hash(*(s.id for s in sets)), "pairs": sum(len(s.related) for s in sets),
        "seconds": dict(zip(("absorb", "answer"), seconds, strict=True)),
        **({"along": {key: [one[key] for one in (*along, beside)] for key in lab.base}} if table.probes.along else {}),
    }


def changed(reader: Reader, items: Sequence[Item]) -> Scores:
    """Facts that a later context changed: shares answered exactly with the new and with the old value; {} without."""
    now = [q for item in items for q in item.changed]
    if not now:
        return {}
    before = [q for item in items for q in item.outdated]
    given = reader.answer(now)

    def share(questions: Sequence[Question]) -> float:
        return mean(qa_f1(a, q.answers) == 1 for a, q in zip(given, questions, strict=True))

    return {"new": share(now), "old": share(before)}


def base_row(lab: Lab, items: Sequence[Item], answers: list[list[str]]) -> list[float]:
    """F1 of θ itself on each context, from memory; its answers are appended."""
    given = lab.lm.answer([q.text for item in items for q in item.questions], max_new_tokens=ANSWER_TOKENS)
    answers.append(given)
    left = iter(given)
    return [mean(qa_f1(next(left), q.answers) for q in item.questions) for item in items]


PROTOCOLS: dict[str, Callable[[Lab, Table, Cell, Sequence[TargetSet], Unfinished], Scores]] = {
    "single": at_once, "batch": at_once, "sequential": sequential, "recommend": recommending,
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
