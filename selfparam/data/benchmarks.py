"""Names of benchmarks -> Benchmark: worlds, revisits (run anywhere), pwc (the paper's), jsonl (any set of your own);
of conversations: films (runs anywhere), inspired, redial (the paper's).

Refuses to know models and experiments; where lengths count, the caller gives the function that counts tokens.
Source: arXiv 2410.00487, section 4.1; worlds.py for the fictional ones.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from selfparam.data import pwc, qa, worlds
from selfparam.data.conversations import (
    SetName,
    conversations,
    from_hub,
    read_entities,
    read_items,
    read_requests,
)
from selfparam.data.films import film_benchmark
from selfparam.data.items import Benchmark, Count, Item, Recommending
from selfparam.data.revisits import FRESH_SEED, not_fresh, revisits
from selfparam.errors import ContextError


def fictional(n: int, fresh: int, count: Count, *, seed: int = 0, wordings: worlds.Wordings = "known",
              facts: Sequence[int] = (4, 5, 6), asked: int = 2) -> Benchmark:
    """n fictional contexts that pretraining never saw, with right pairs and the leak's questions; none is too long."""

    not_fresh(seed)

    def made(size: int, from_seed: int) -> tuple[Item, ...]:
        found = worlds.held_out(size, from_seed, wordings, facts, asked)
        return tuple(Item(w.context, w.questions, w.pairs, w.elsewhere) for w in found)

    return Benchmark(made(n, seed), made(fresh, FRESH_SEED))


def from_rows(rows: Sequence[qa.Row], source: str, n: int, fresh: int, count: Count, *,
              answer_tokens: int | None, longest: int | None, tokens: str, seed: int | None = None) -> Benchmark:
    """The first n contexts that pass the filters; the ones behind them are read but never injected.

    seed: in an order drawn with it, not the one of the rows. tokens: who counts the tokens of an answer, "words" (the
    same for every model) or "model". Raises ContextError when there are fewer than n contexts.
    """
    if tokens not in ("words", "model"):
        raise ContextError(f"data.tokens = '{tokens}' is no way to count: use 'words' or 'model'")
    counter = qa.words if tokens == "words" else count
    items, notes = qa.items_of(rows, source, answer_tokens=answer_tokens, longest=longest, count=counter,
                               count_context=count)
    if len(items) < n:
        raise ContextError(f"{source}: only {len(items)} of {n} contexts pass the filters: ask for fewer contexts")
    if seed is not None:
        items = tuple(random.Random(seed).sample(items, len(items)))
    return Benchmark(items[:n], items[n : n + fresh], notes)


def from_file(n: int, fresh: int, count: Count, *, path: str, answer_tokens: int | None = None,
              longest: int | None = None, tokens: str = "words", only: Mapping[str, Sequence[str]] | None = None,
              seed: int | None = None) -> Benchmark:
    """Any JSONL of {"context", "question", "answers"}. only: {field: values}, of which a line must have one."""
    if only is not None and not (isinstance(only, Mapping) and all(isinstance(v, list) for v in only.values())):
        raise ContextError('data.only must name fields and lists of values: write { title = ["…"] }')
    return from_rows(qa.rows_of_file(path, only), Path(path).name, n, fresh, count, answer_tokens=answer_tokens,
                     longest=longest, tokens=tokens, seed=seed)


def from_pwc(n: int, fresh: int, count: Count, *, path: str | None = None, answer_tokens: int = pwc.ANSWER_TOKENS,
             longest: int | None = None, tokens: str = "words") -> Benchmark:
    """PwC with the paper's filter."""
    return from_rows(pwc.rows(path), "pwc", n, fresh, count, answer_tokens=answer_tokens, longest=longest,
                     tokens=tokens)


def recommending(name: SetName) -> Callable[..., Benchmark]:
    """INSPIRED or REDIAL: n conversations of the training set, the requests of the test."""

    def made(n: int, fresh: int, count: Count, *, path: str | None = None, test: str | None = None,
             entities: str | None = None, items: str | None = None, requests: int | None = None,
             longest: int | None = None) -> Benchmark:
        """Files that are not given come from the hub. requests: the first so many rows of the test. longest: the most
        tokens of a conversation."""
        read = conversations(name, path, n if longest is None else sys.maxsize)
        told = [x for x in read if longest is None or count(x.text) <= longest][:n]
        if len(told) < n:
            raise ContextError(f"{path or name}: only {len(told)} of {n} conversations: ask for fewer contexts")
        keys = read_entities(entities or from_hub(name, "entity2id.json"))
        asked = read_requests(test or from_hub(name, "test.jsonl"), keys, requests)
        test_items = read_items(items or from_hub(name, "item_ids.json"))
        passed = read.index(told[-1]) + 1 - n
        notes = (f"{name}: {passed} conversations of more than {longest} tokens left out",) if passed else ()
        return Benchmark(tuple(Item(x, ()) for x in told), (), notes, Recommending(tuple(asked), keys, test_items))

    return made


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "worlds": fictional, "revisits": revisits, "pwc": from_pwc, "jsonl": from_file,
    "films": film_benchmark, "inspired": recommending("inspired"), "redial": recommending("redial"),
}
