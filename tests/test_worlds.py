"""The fictional worlds: nothing that an evaluation uses can have been trained on, and every answer is in its text."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from selfparam.data import worlds
from selfparam.data.slots import Slots, split_of
from selfparam.metrics.qa_f1 import tokens


def test_every_relation_states_its_value_and_asks_about_its_subject() -> None:
    for domain in worlds.domains():
        assert len(domain.relations) >= 8
        for r in domain.relations:
            assert len(r.says) > worlds.HELD_SAYS + 2 and len(r.asks) > worlds.HELD_ASKS + 2
            assert all("{s}" in w and "{v}" in w for w in r.says), (domain.name, r.name)
            assert all("{s}" in w and "{v}" not in w for w in r.asks), (domain.name, r.name)


def test_known_and_held_out_wordings_are_disjoint() -> None:
    for domain in worlds.domains():
        for r in domain.relations:
            assert not {*r.statements("known")} & {*r.statements("held-out")}
            assert not {*r.questions("known")} & {*r.questions("held-out")}


def test_names_of_evaluations_are_of_the_other_split() -> None:
    rng = random.Random(0)
    train, test = Slots(rng, "train"), Slots(rng, "test")
    for kind in ("person", "place", "org", "title", "product"):
        assert all(split_of(train.draw(kind)) == "train" for _ in range(50))
        assert all(split_of(test.draw(kind)) == "test" for _ in range(50))


def test_scenes_fill_and_their_answers_stand_in_the_text() -> None:
    rng = random.Random(1)
    for split in ("train", "test"):
        for scene in worlds.scenes(split):
            made = worlds.passage(Slots(rng), scene)
            assert "{" not in made.text
            for questions, answer in made.qa:
                assert answer.lower() in made.text.lower(), (answer, made.text)
                assert not any("{" in q for q in questions)
    assert not {s["text"] for s in worlds.scenes("train")} & {s["text"] for s in worlds.scenes("test")}


def test_benchmark_items_ask_otherwise_than_they_train() -> None:
    items = worlds.held_out(20, seed=3)
    assert items == worlds.held_out(20, seed=3)
    assert {i.context.id for i in items}.isdisjoint(i.context.id for i in worlds.held_out(20, seed=4))
    for item in items:
        trained = {p.prompt for p in item.pairs}
        assert trained.isdisjoint(q.text for q in item.questions)
        for question, other in zip(item.questions, item.elsewhere, strict=True):
            assert question.text != other.text and question.answers == other.answers
            assert set(tokens(question.answers[0])) <= set(tokens(item.context.text)) | {"a", "an", "the"}


def test_more_wordings_change_nothing_but_the_pairs() -> None:
    for two, three in zip(worlds.held_out(10, seed=3), worlds.held_out(10, seed=3, asked=3), strict=True):
        assert replace(two, pairs=()) == replace(three, pairs=())
        assert len(three.pairs) == len(two.pairs) + len(two.questions) and {*two.pairs} < {*three.pairs}
        assert {p.prompt for p in three.pairs}.isdisjoint(q.text for q in three.questions)


def test_the_known_world_is_fixed() -> None:
    facts = [(s.name, f.relation.name, f.value) for s in worlds.known_world() for f in s.facts]
    assert len(facts) > 1000
    worlds.known_world.cache_clear()
    assert facts == [(s.name, f.relation.name, f.value) for s in worlds.known_world() for f in s.facts]
    assert all(re.search(r"\S", q.answers[0]) for q in worlds.known_questions(50))
