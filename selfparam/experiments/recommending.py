"""The protocol recommend: absorb all conversations in one call, then fill turns of other conversations with films.

A method answers with its weights and what it puts in front (methods.Fronted); the question that a retriever gets is the
conversation so far. Refuses to know files and how hits become a table. Source: arXiv 2410.00487, 4.4 and A.1.1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from selfparam.data.conversations import Request
from selfparam.errors import ModelError, TableError
from selfparam.experiments.lab import Lab
from selfparam.experiments.spec import Asking, Cell, Table
from selfparam.experiments.unfinished import Unfinished
from selfparam.methods import Fronted, Reader
from selfparam.metrics.recall import FILTERS, KS, Row, entity_name, outcomes, recall, rows_of, shares
from selfparam.targets.recommend import prompt_named, recommend, request, shortened
from selfparam.types import Question, TargetSet, content_hash

Scores = dict[str, Any]


def recommending(lab: Lab, table: Table, cell: Cell, sets: Sequence[TargetSet], unfinished: Unfinished) -> Scores:
    """Absorb, ask, and count hits.

    hit_at: for each filter, the least of KS at which each target is a hit (0: at none). units: what each target's
    hit is averaged with, the conversation that it is about or itself. low, high: of the hits at KS over all choices
    among equally near names. shares: what recall hides. outputs: the texts.
    """
    test = lab.bench.test
    assert test is not None  # lab.benchmark
    begin, method = time.perf_counter(), cell.method.make()
    reader = method.absorb(lab.lm, sets, seed=table.seed, **unfinished.options(method))
    absorbed = time.perf_counter() - begin
    begin = time.perf_counter()
    texts, cut = asked(reader, test.requests, table.recommend)
    answering = time.perf_counter() - begin
    names = {i: entity_name(key) for i, key in test.keys.items()}
    rows = rows_of(texts, [[names[i] for i in r.targets] for r in test.requests],
                   [[names[i] for i in r.seen] for r in test.requests], names.values())
    counted = recall(rows)
    notes = [*reader.notes, *([f"{cut} of {len(texts)} conversations lost their oldest turns: the window of "
                               f"{lab.lm.window} tokens is too small"] if cut else [])]
    kept = {"fresh": None, "world": None, "kl": None} if reader.storage_tokens is None else lab.probe(reader.lm)
    return {
        "hit_at": {chosen: [at for row in rows for at in hit_at(row, chosen)] for chosen in FILTERS},
        "units": [r.about or f"{i}.{k}" for i, r in enumerate(test.requests) for k in range(len(r.targets))],
        "low": {chosen: counted.low[chosen]["all"] for chosen in FILTERS},
        "high": {chosen: counted.high[chosen]["all"] for chosen in FILTERS},
        "groups": {group: {"targets": n, **{chosen: counted.hits[chosen][group] for chosen in FILTERS}}
                   for group, n in counted.targets.items()},
        "shares": asdict(shares(texts, rows, frozenset(names[i] for i in test.films) or None)), "outputs": texts,
        "storage_tokens": reader.storage_tokens, "notes": notes, **kept,
        "targets": content_hash(*(s.id for s in sets)), "pairs": sum(len(s.related) for s in sets),
        "seconds": {"absorb": absorbed, "answer": answering},
    }


def asked(reader: Reader, requests: Sequence[Request], how: Asking) -> tuple[list[str], int]:
    """The text for each request, and how many conversations were shortened. Raises TableError, ModelError."""
    if not isinstance(reader, Fronted):
        raise TableError("a method of this table cannot recommend: its reader has no in_front")
    lm, prompt = reader.lm, prompt_named(how.prompt)
    most = lm.window - how.tokens - len(lm.prefix())
    if most < 1:
        raise ModelError(f"{how.tokens} new tokens leave no room for a prompt in the window of {lm.window}: lower "
                         "recommend.tokens")
    said = [shortened(lm, r.input, most, prompt) for r in requests]
    rooms = [lm.window - how.tokens - len(lm.question(request(one, prompt))) for one in said]
    about = [Question(one.strip(), (), r.about or None) for one, r in zip(said, requests, strict=True)]
    texts = recommend(lm, said, reader.in_front(about, rooms), prompt=prompt, max_new_tokens=how.tokens)
    return texts, sum(one != r.input for one, r in zip(said, requests, strict=True))


def hit_at(row: Row, chosen: str) -> list[int]:
    """For each target of the row, the least of KS at which it is a hit; 0 where it is none."""
    sets = outcomes(row, chosen)  # type: ignore[arg-type]
    return [next((k for k, found in zip(KS, sets, strict=True) if min(found) >> i & 1), 0)
            for i in range(len(row.targets))]
