"""Fictional worlds that come back: the same subject in a second context, with a changed fact or with further facts.

Contexts come in blocks: `apart` subjects, then the second context of each of them. Refuses to know models and training.
Source: ours.
"""

from __future__ import annotations

import random
from dataclasses import replace

from selfparam.data.items import Benchmark, Count, Item
from selfparam.data.slots import Slots
from selfparam.data.worlds import Fact, Subject, Wordings, domains, held_out, item_of, subject
from selfparam.errors import ContextError

FRESH_SEED = 99  # of worlds that are only read, never injected


def not_fresh(seed: int) -> None:
    """Raises ContextError where the injected worlds would be those."""
    if seed == FRESH_SEED:
        raise ContextError(f"data.seed = {seed} is that of the worlds that are only read: use another")


def revisits(n: int, fresh: int, count: Count, *, seed: int = 0, wordings: Wordings = "known", apart: int = 10,
             facts: int = 4, asked: int = 2, changed: bool = False) -> Benchmark:
    """n contexts in blocks of 2 × apart. asked: wordings in which the pairs ask for each fact.

    changed: the second context tells the same facts, the first of them with another value; the first context's
    questions ask the others only. Otherwise the second context tells further facts of the subject.
    """
    most = max(len(d.relations) for d in domains()) // 2
    if not 1 + changed <= facts <= most:
        raise ContextError(f"data.facts = {facts} must be {1 + changed} to {most}")
    not_fresh(seed)
    slots = Slots(random.Random(f"revisits {seed} {wordings} {changed}"), "test")
    items: list[Item] = []
    while len(items) < n:
        pairs = [_visits(slots, wordings, facts, asked, changed) for _ in range(apart)]
        items += [first for first, _ in pairs] + [second for _, second in pairs]
    unread = tuple(Item(w.context, w.questions, w.pairs, w.elsewhere) for w in held_out(fresh, FRESH_SEED, wordings))
    return Benchmark(tuple(items[:n]), unread)


def _visits(slots: Slots, wordings: Wordings, facts: int, asked: int, changed: bool) -> tuple[Item, Item]:
    """The first and the second context of a new subject."""
    domain = slots.rng.choice([d for d in domains() if len(d.relations) >= 2 * facts])
    whole = subject(slots, domain, facts if changed else 2 * facts)
    told, later = whole.facts[:facts], whole.facts[facts:]
    if changed:
        later = (_other(slots, told[0]), *told[1:])
    first, second = (_item(slots, replace(whole, facts=part), wordings, asked) for part in (told, later))
    if not changed:
        return first, second
    now, before = second.questions[:1], first.questions[:1]
    return (replace(first, questions=first.questions[1:], elsewhere=first.elsewhere[1:]),
            replace(second, changed=now, outdated=tuple(replace(q, about=second.context.id) for q in before)))


def _other(slots: Slots, fact: Fact) -> Fact:
    """The same relation with another value."""
    while True:
        found = Fact(fact.relation, slots.draw(fact.relation.value))
        if found.answer != fact.answer:
            return found


def _item(slots: Slots, about: Subject, wordings: Wordings, asked: int) -> Item:
    made = item_of(slots, about, wordings, asked)
    return Item(made.context, made.questions, made.pairs, made.elsewhere)
