"""Fictional worlds: subjects with facts, rendered as texts, question-answer pairs and held-out questions.

The benchmark that runs anywhere. Domains (relations with many wordings) and scenes (free passages with slots) are
JSON files that we wrote. Two things are held out from pretraining: names (see slots.split_of) and wordings: the last
two statements and the last question of every relation, and one scene in six.
Refuses to know models and training.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from selfparam.data.slots import Person, Slots, Split
from selfparam.types import Context, Question, Sentence

Wordings = Literal["known", "held-out"]
HELD_SAYS, HELD_ASKS = 2, 1
KINDS = {"place": "place", "person": "person", "org": "org", "title": "title", "product": "product"}


@dataclass(frozen=True)
class Relation:
    name: str
    value: str
    answer: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    back: tuple[str, ...]

    def statements(self, wordings: Wordings) -> tuple[str, ...]:
        return self.says[:-HELD_SAYS] if wordings == "known" else self.says[-HELD_SAYS:]

    def questions(self, wordings: Wordings) -> tuple[str, ...]:
        return self.asks[:-HELD_ASKS] if wordings == "known" else self.asks[-HELD_ASKS:]


@dataclass(frozen=True)
class Domain:
    name: str
    kind: str
    nouns: tuple[str, ...]
    intro: tuple[str, ...]
    filler: tuple[str, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Fact:
    """A relation of one subject with its value; `answer` is how the value reads as a short answer."""

    relation: Relation
    value: str

    @property
    def answer(self) -> str:
        return fill(self.relation.answer, v=self.value)

    def ask(self, wording: str, subject: str) -> str:
        return capital(fill(wording, s=subject, v=self.value))


@dataclass(frozen=True)
class Subject:
    name: str
    domain: Domain
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class WorldContext:
    """One benchmark item: a context, oracle pairs about it, questions in other wordings, and the same questions
    about other subjects (`elsewhere`; their answers are the injected ones, so a hit is a leak)."""

    context: Context
    pairs: tuple[Sentence, ...]
    questions: tuple[Question, ...]
    elsewhere: tuple[Question, ...]
    neighbours: tuple[Sentence, ...]


def fill(template: str, **values: str) -> str:
    """Replace {key} and {key.part}; the part is an attribute of a Person."""

    def one(match: re.Match[str]) -> str:
        key, _, part = match.group(1).partition(".")
        value = values[key]
        return str(getattr(value, part)) if part and isinstance(value, Person) else str(value)

    return re.sub(r"\{([a-zA-Z0-9_.]+)\}", one, template)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _mixed(wordings: Sequence[str]) -> tuple[str, ...]:
    """Wordings in an order that does not depend on how they were written (by hash): the last ones are held out."""
    return tuple(sorted(wordings, key=lambda w: zlib.crc32(w.encode())))


@cache
def domains() -> tuple[Domain, ...]:
    """All domains, by file name."""
    folder = resources.files("selfparam.data").joinpath("worlds")
    found = []
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.name.startswith("domain_") and path.name.endswith(".json"):
            raw = json.loads(path.read_text("utf-8"))
            relations = tuple(
                Relation(
                    name, r["value"], r.get("answer", "{v}"), _mixed(r["says"]), _mixed(r["asks"]), tuple(r["back"])
                )
                for name, r in raw["relations"].items()
            )
            found.append(
                Domain(
                    raw["domain"],
                    raw["kind"],
                    tuple(raw["nouns"]),
                    tuple(raw["intro"]),
                    tuple(raw["filler"]),
                    relations,
                )
            )
    return tuple(found)


@cache
def scenes(split: Split = "train") -> tuple[dict[str, Any], ...]:
    """Free passages with slots; one in six (by hash of the text) is the split "test"."""
    folder = resources.files("selfparam.data").joinpath("worlds")
    lines = [
        line
        for path in sorted(folder.iterdir(), key=lambda p: p.name)
        if path.name.startswith("scenes_")
        for line in path.read_text("utf-8").splitlines()
        if line.strip()
    ]
    held = "test" if split == "test" else "train"
    rows = [json.loads(line) for line in lines]
    return tuple(r for r in rows if ("test" if zlib.crc32(r["text"].encode()) % 6 == 0 else "train") == held)


def subject(slots: Slots, domain: Domain, relations: int | None = None) -> Subject:
    """A new subject of the domain with `relations` facts (all when None), in random order."""
    rng = slots.rng
    chosen = list(domain.relations)
    rng.shuffle(chosen)
    facts = tuple(Fact(r, slots.draw(r.value)) for r in chosen[: relations or len(chosen)])
    if domain.kind in KINDS:
        name = slots.draw(domain.kind)
    else:
        stem = slots.draw(rng.choice(("place", "place", "person", "product")))
        stem = stem.last if isinstance(stem, Person) else stem
        noun = domain.nouns[0].removeprefix("the ").split()[-1].capitalize()
        name = f"the {stem} {noun}" if rng.random() < 0.6 else f"the {stem}"
    return Subject(name, domain, facts)


def _refer(sentence: str, name: str, domain: Domain, rng: random.Random, first: bool, last: bool) -> str:
    """Put the subject into a sentence: by name, by noun phrase, or by pronoun at the sentence's start."""
    once = sentence.count("{s}") == 1
    chance = 1.0 if first else rng.random()
    if once and chance < 0.3 and sentence.startswith("{s}"):
        he, his = (name.he, name.his) if isinstance(name, Person) else ("it", "its")
        return capital(
            sentence.replace("{s}'s", his, 1) if sentence.startswith("{s}'s") else sentence.replace("{s}", he, 1)
        )
    if once and chance < 0.5 and not last:
        return capital(sentence.replace("{s}", rng.choice(domain.nouns)))
    return capital(sentence.replace("{s}", name))


def render(item: Subject, rng: random.Random, wordings: Wordings = "known", extras: float = 0.35) -> str:
    """A text that states every fact once; `extras` = chance of an introduction and of each filler sentence."""
    sentences = [(fill(rng.choice(f.relation.statements(wordings)), s="{s}", v=f.value)) for f in item.facts]
    if rng.random() < extras + 0.2:
        sentences.insert(0, rng.choice(item.domain.intro))
    for sentence in rng.sample(item.domain.filler, k=min(2, len(item.domain.filler))):
        if rng.random() < extras:
            sentences.insert(rng.randint(1, len(sentences)), sentence)
    placed = [_refer(s, item.name, item.domain, rng, i == 0, False) for i, s in enumerate(sentences)]
    if len(placed) > 4 and rng.random() < 0.3:
        cut = rng.randint(2, len(placed) - 2)
        return " ".join(placed[:cut]) + "\n\n" + " ".join(placed[cut:])
    return " ".join(placed)


@dataclass(frozen=True)
class Passage:
    """An instantiated scene: a text and its questions, each with several wordings and one answer."""

    text: str
    qa: tuple[tuple[tuple[str, ...], str], ...]


def passage(slots: Slots, scene: dict[str, Any]) -> Passage:
    """Fill a scene's slots with new values (distinct from each other)."""
    values: dict[str, str] = {}
    for key, kind in scene["slots"].items():
        for _ in range(20):
            values[key] = slots.draw(kind)
            if list(values.values()).count(values[key]) == 1:
                break
    qa = tuple(
        (tuple(capital(fill(q, **values)) for q in item["q"]), fill(item["a"], **values)) for item in scene["qa"]
    )
    return Passage(capital(fill(scene["text"], **values)), qa)


@cache
def known_world(subjects: int = 120) -> tuple[Subject, ...]:
    """Fixed subjects whose facts the embedded model learns in pretraining, so that forgetting can be measured."""
    rng = random.Random(20410)
    slots = Slots(rng, "train")
    kinds = domains()
    return tuple(subject(slots, kinds[i % len(kinds)]) for i in range(subjects))


def known_questions(n: int, seed: int = 0) -> tuple[Question, ...]:
    """n questions on facts of the known world (asked without any context)."""
    rng = random.Random(seed)
    facts = [(s, f) for s in known_world() for f in s.facts]
    chosen = rng.sample(facts, min(n, len(facts)))
    return tuple(Question(f.ask(f.relation.questions("known")[0], s.name), (f.answer,)) for s, f in chosen)


def _domain_item(slots: Slots, wordings: Wordings, facts: int, asked: int) -> WorldContext:
    domain = slots.rng.choice(domains())
    return item_of(slots, subject(slots, domain, facts), wordings, asked)


def item_of(slots: Slots, item: Subject, wordings: Wordings, asked: int = 2) -> WorldContext:
    """A context that tells the subject's facts, pairs about them, and questions in the order of the facts.

    asked: wordings in which the pairs ask for each fact, if there are so many; one more asks backwards.
    """
    rng, domain = slots.rng, item.domain
    context = Context(render(item, rng, wordings), title=item.name, source=f"worlds/{domain.name}")
    pairs, questions, elsewhere, neighbours = [], [], [], []
    for fact in item.facts:
        asks = fact.relation.questions("known")
        evaluated = fact.relation.questions(wordings)[-1]
        trained = [a for a in asks if a != evaluated]
        pairs += [Sentence(fact.ask(a, item.name), fact.answer, context.id) for a in trained[:asked]]
        if fact.relation.back:
            pairs.append(Sentence(fact.ask(fact.relation.back[0], item.name), capital(item.name), context.id))
        questions.append(Question(fact.ask(evaluated, item.name), (fact.answer,), context.id))
        other, third = subject(slots, domain, 1).name, subject(slots, domain, 1).name
        elsewhere.append(Question(fact.ask(evaluated, other), (fact.answer,), context.id))
        neighbours.append(Sentence(fact.ask(rng.choice(trained[:2]), third), "", None))
    return WorldContext(context, tuple(pairs), tuple(questions), tuple(elsewhere), tuple(neighbours))


def held_out(
    n: int, seed: int = 0, wordings: Wordings = "known", facts: Sequence[int] = (4, 5, 6), asked: int = 2
) -> tuple[WorldContext, ...]:
    """n benchmark items with names that pretraining never saw; questions in a wording that the pairs do not use.

    asked: as in `item_of`; it changes nothing but the pairs.
    """
    rng = random.Random(f"held-out {seed} {wordings}")
    slots = Slots(rng, "test")
    return tuple(_domain_item(slots, wordings, rng.choice(facts), asked) for _ in range(n))


def held_out_passages(n: int, seed: int = 0) -> tuple[tuple[Context, tuple[Question, ...]], ...]:
    """n instantiated scenes of the split "test", with their questions in both wordings."""
    rng = random.Random(f"passages {seed}")
    slots = Slots(rng, "test")
    found = []
    for i in range(n):
        item = passage(slots, scenes("test")[i % len(scenes("test"))])
        context = Context(item.text, source="worlds/scenes")
        found.append((context, tuple(Question(q[-1], (a,), context.id) for q, a in item.qa)))
    return tuple(found)
