"""A fictional film world: films, people's tastes, conversations that reveal them, and requests only they can answer.

The recommendation benchmark that runs anywhere; it is not INSPIRED. A person loves one film; who loves what is drawn
at random, so a request ("This is …, which film do I like best?") can be filled only by somebody who knows that person's
conversation. Names are of the split that pretraining never meets; the wordings of requests are neither those of
conversations nor those of pairs. Written in the files of INSPIRED and REDIAL, read and scored by the same code. Refuses
to know models and training. Source: none, written for this project.

    python -m selfparam.data.films FOLDER [--people 60] [--films 40] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from selfparam.data.conversations import Request, Turn, conversation, input_of
from selfparam.data.files import write_json_lines, write_text
from selfparam.data.items import Benchmark, Count, Item, Recommending
from selfparam.data.slots import Person, Slots
from selfparam.data.worlds import capital, fill
from selfparam.errors import DataError, OutputError
from selfparam.types import Context, Sentence

_APART = 5  # edits between two titles, at least: a hit is never a near miss of another film
_READ = re.compile(r"(The|A [^AEIOU])[^-_/()]*")  # titles without an article are misread by the embedded model


@dataclass(frozen=True)
class Film:
    title: str
    genre: str
    director: Person


@dataclass(frozen=True)
class Taste:
    """One person, the film they love, and where they live."""

    person: Person
    loved: Film
    home: str


@dataclass(frozen=True)
class FilmWorld:
    """conversations[i] reveals tastes[i]; pairs[i] are question-answer pairs about it (an author who never errs).

    rows, entities and items are test.jsonl, entity2id.json and item_ids.json; about[i] is the id of the conversation
    that tells the answer of rows[i].
    """

    films: tuple[Film, ...]
    tastes: tuple[Taste, ...]
    conversations: tuple[Context, ...]
    pairs: tuple[tuple[Sentence, ...], ...]
    rows: tuple[dict[str, Any], ...]
    about: tuple[str, ...]
    entities: dict[str, int]
    items: tuple[int, ...]


@cache
def wordings() -> dict[str, Any]:
    """All sentences of the world: `talk` (turns), `pairs` (questions for training), `requests` (of the test)."""
    text = resources.files("selfparam.data").joinpath("worlds/films.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def film_world(people: int = 60, films: int = 40, seed: int = 0) -> FilmWorld:
    """A world of so many people, each with one conversation and four requests. The same seed gives the same world.

    Raises DataError where there are too few films or people to make one.
    """
    if films < 6 or people < 1:
        raise DataError(f"{people} people and {films} films make no world: take at least one person and six films")
    rng = random.Random(f"films/{seed}")
    slots = Slots(rng, "test")
    made = _films(slots, films)
    tastes = _tastes(slots, made, people)
    keys = [_key(f.title, "film") for f in made]
    keys += [_key(name, "person") for name in dict.fromkeys([f.director for f in made])]
    keys += [_key(genre, "genre") for genre in wordings()["genres"]]
    entities = {key: i for i, key in enumerate(keys)}
    ids = {f.title: i for i, f in enumerate(made)}
    told = tuple(_talk(taste, rng) for taste in tastes)
    rows = [row for i, taste in enumerate(tastes) for row in _requests(i, taste, made, ids, rng)]
    about = tuple(x.id for x in told for _ in wordings()["requests"])
    pairs = tuple(_pairs(taste, x) for taste, x in zip(tastes, told, strict=True))
    return FilmWorld(made, tastes, told, pairs, tuple(rows), about, entities, tuple(ids.values()))


# --- who is there ----------------------------------------------------------------------------------------------------


def _films(slots: Slots, n: int) -> tuple[Film, ...]:
    found: list[Film] = []
    titles: list[str] = []
    while len(found) < n:
        title = slots.draw("title")
        if _READ.fullmatch(title) and all(
            Levenshtein.distance(title.lower(), t.lower(), score_cutoff=_APART) >= _APART for t in titles
        ):
            titles.append(title)
            director = slots.draw("person")
            assert isinstance(director, Person)
            found.append(Film(title, slots.rng.choice(wordings()["genres"]), director))
    return tuple(found)


def _tastes(slots: Slots, films: Sequence[Film], n: int) -> tuple[Taste, ...]:
    """People, and what they love; every film is loved about equally often."""
    deck: list[Film] = []
    found: dict[str, Taste] = {}
    while len(found) < n:
        person = slots.draw("person")
        if person in found or any(f.director == person for f in films):
            continue
        deck = deck or slots.rng.sample(films, len(films))
        assert isinstance(person, Person)
        found[person] = Taste(person, deck.pop(), slots.draw("place"))
    return tuple(found.values())


def _key(name: str, kind: str) -> str:
    """As DBpedia names things: metrics.recall.entity_name gives the name back."""
    return f"<http://dbpedia.org/resource/{name.replace(' ', '_')}_({kind})>"


# --- what is said ----------------------------------------------------------------------------------------------------


def _values(taste: Taste) -> dict[str, str]:
    loved = taste.loved
    return {"p": taste.person, "loved": loved.title, "genre": loved.genre, "director": loved.director,
            "home": taste.home}


def _talk(taste: Taste, rng: random.Random) -> Context:
    """One conversation: greeting, favourite film, small talk; some turns are left out at random."""
    values = _values(taste)
    turns: list[Turn] = []
    for part in wordings()["talk"]:
        if rng.random() < part.get("often", 1.0):
            text = capital(fill(rng.choice(part["says"]), **values))
            turns.append(Turn("User" if part["role"] == "User" else "System", text))
    return conversation(turns, f"conversation with {taste.person}", "films")


def _pairs(taste: Taste, x: Context) -> tuple[Sentence, ...]:
    """Every training question, with its answer."""
    values = _values(taste)
    return tuple(Sentence(fill(ask, **values), values["loved"], x.id) for ask in wordings()["pairs"])


def _requests(number: int, taste: Taste, films: Sequence[Film], ids: dict[str, int],
              rng: random.Random) -> list[dict[str, Any]]:
    """Rows of test.jsonl, one for each kind of request.

    Kinds: the favourite, asked by its owner, by a friend, or by somebody who looks for a present; and one where the
    user names two films, the loved and another one, and cannot say which was which (its target is mentioned before).
    """
    found = []
    target = taste.loved
    for turn, (kind, says) in enumerate(wordings()["requests"].items()):
        another = rng.choice([film for film in films if film != target])
        one, other = rng.sample([target, another], 2)
        values = _values(taste) | {"one": one.title, "other": other.title}
        text = capital(fill(rng.choice(says), **values))
        said = [Turn("User", text)]
        if rng.random() < 0.5:
            said.insert(0, Turn("System", rng.choice(wordings()["welcome"])))
        named = [film for film in (one, other) if film.title in text]
        context = ["", *(t.text for t in said)] if said[0].role == "System" else [t.text for t in said]
        found.append({
            "context": context, "resp": fill(rng.choice(wordings()["responses"]), film=target.title),
            "rec": [ids[target.title]], "entity": [ids[target.title]], "prev_entity": [ids[f.title] for f in named],
            "dialog_id": f"films_{number}_{kind}", "turn_id": turn, "is_user": 0, "entity_name": [target.title],
            "input": input_of(said),
        })
    return found


# --- in a table ------------------------------------------------------------------------------------------------------


def film_benchmark(n: int, fresh: int, count: Count, *, films: int = 40, seed: int = 0) -> Benchmark:
    """n conversations with right pairs, and the requests about all of them."""
    world = film_world(n, films, seed)
    items = tuple(Item(x, (), pairs) for x, pairs in zip(world.conversations, world.pairs, strict=True))
    requests = tuple(Request(row["input"], tuple(row["rec"]), tuple(row["prev_entity"]), about)
                     for row, about in zip(world.rows, world.about, strict=True))
    keys = {i: key for key, i in world.entities.items()}
    return Benchmark(items, test=Recommending(requests, keys, frozenset(world.items)))


# --- files -----------------------------------------------------------------------------------------------------------


def write_film_world(world: FilmWorld, folder: str | Path) -> None:
    """test.jsonl, entity2id.json, item_ids.json, dialogues.jsonl and pairs.jsonl. Raises OutputError."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{folder}' ({error.strerror}): choose another one") from error
    write_json_lines(place / "test.jsonl", world.rows)
    write_text(place / "entity2id.json", json.dumps(world.entities, ensure_ascii=False, indent=0) + "\n")
    write_text(place / "item_ids.json", json.dumps(world.items) + "\n")
    titles = [film.title for film in world.films]
    write_json_lines(place / "dialogues.jsonl", (_dialogue(x, titles) for x in world.conversations))
    write_json_lines(place / "pairs.jsonl", (
        {"context": x.id, "question": s.prompt, "answer": s.completion}
        for x, pairs in zip(world.conversations, world.pairs, strict=True) for s in pairs
    ))


def _dialogue(x: Context, titles: Sequence[str]) -> dict[str, Any]:
    roles = {"User": "seeker", "System": "recommender"}
    turns = []
    for line in x.text.split("\n"):
        role, _, text = line.partition(": ")
        turns.append({"role": roles[role], "text": text, "movies": [t for t in titles if t in text]})
    return {"dialog_id": x.title, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--films", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world = film_world(options.people, options.films, options.seed)
    write_film_world(world, options.folder)
    print(f"{options.folder}: {len(world.films)} films, {len(world.conversations)} conversations, "
          f"{len(world.rows)} requests")


if __name__ == "__main__":
    main()
