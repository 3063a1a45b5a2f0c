"""The fictional film world: fixed by its seed, answerable only from its conversations, in files like the real ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from selfparam.data.conversations import read_conversations, read_entities, read_items, read_requests, turns_of
from selfparam.data.films import FilmWorld, film_benchmark, film_world, write_film_world
from selfparam.data.slots import split_of
from selfparam.errors import DataError, OutputError
from selfparam.metrics.recall import entity_name, recall, rows_of


@pytest.fixture(scope="module")
def world() -> FilmWorld:
    return film_world(people=30, films=20, seed=1)


def test_the_seed_makes_the_world(world: FilmWorld) -> None:
    assert film_world(people=30, films=20, seed=1) == world
    other = film_world(people=30, films=20, seed=2)
    assert not {t.person for t in world.tastes} & {t.person for t in other.tastes}


def test_names_are_new_and_apart(world: FilmWorld) -> None:
    titles = [film.title for film in world.films]
    assert len({entity_name(key) for key in world.entities}) == len(world.entities)
    assert [entity_name(key) for key, i in world.entities.items() if i in world.items] == titles
    for name in (*titles, *(t.person for t in world.tastes), *(f.director for f in world.films)):
        assert split_of(name) == "test"


def test_every_film_is_loved_about_equally_often(world: FilmWorld) -> None:
    counts = Counter(taste.loved.title for taste in world.tastes)
    assert len(counts) == 20 and max(counts.values()) == 2


def test_conversations_reveal_their_person_and_nobody_elses(world: FilmWorld) -> None:
    for taste, x, pairs in zip(world.tastes, world.conversations, world.pairs, strict=True):
        assert "{" not in x.text
        said_by_system = "\n".join(t.text for t in turns_of(x) if t.role == "System")
        assert taste.person in said_by_system and taste.loved.title in said_by_system
        assert [film.title for film in world.films if film.title in x.text] == [taste.loved.title]
        assert [other.person for other in world.tastes if other.person in x.text] == [taste.person]
        assert all(p.about == x.id and p.completion in x.text and taste.person in p.prompt for p in pairs)
    assert len({x.text.replace(t.person, "") for x, t in zip(world.conversations, world.tastes, strict=True)}) == 30


def test_requests_can_only_be_filled_from_the_conversation(world: FilmWorld) -> None:
    assert len(world.rows) == 4 * len(world.tastes)
    trained = {pair.prompt for pairs in world.pairs for pair in pairs}
    told = "\n".join(x.text for x in world.conversations)
    loved = {str(taste.person): taste for taste in world.tastes}
    for row in world.rows:
        [person] = [name for name in loved if name in row["input"]]
        kind, [target] = row["dialog_id"].rsplit("_", 1)[1], row["entity_name"]
        assert target == loved[person].loved.title
        assert (target in row["input"]) == (row["rec"][0] in row["prev_entity"]) == (kind == "choose")
        request = row["context"][-1]
        assert request not in trained and request not in told
        assert row["input"] == "".join(f"\n{role}: {text}" for role, text in zip(
            ("User", "System", "User"), row["context"], strict=False) if text) + "\nSystem: "


def test_the_files_are_those_of_the_real_sets(world: FilmWorld, tmp_path: Path) -> None:
    write_film_world(world, tmp_path / "new" / "films")
    folder = tmp_path / "new" / "films"
    entities = read_entities(folder / "entity2id.json")
    requests = read_requests(folder / "test.jsonl", entities)
    assert tuple(x.text for x in read_conversations(folder / "dialogues.jsonl")) == tuple(
        x.text for x in world.conversations)
    names = {i: entity_name(key) for i, key in entities.items()}
    assert read_items(folder / "item_ids.json") == set(world.items)
    right = [f"1. {row['entity_name'][0]}\n" for row in world.rows]
    made = rows_of(right, [[names[i] for i in r.targets] for r in requests],
                   [[names[i] for i in r.seen] for r in requests], names.values())
    found = recall(made)
    assert found.targets == {"all": 120, "recommendation": 90, "discussion": 30}
    assert [found.hits[f]["all"][0] for f in ("r1", "r2", "r3", "r4")] == [120, 90, 120, 90]


def test_the_benchmark_says_which_conversation_tells_the_answer(world: FilmWorld, tmp_path: Path) -> None:
    found = film_benchmark(30, 0, len, films=20, seed=1)
    assert [item.context for item in found.items] == list(world.conversations)
    assert found.test is not None and found.test.films == set(world.items)
    write_film_world(world, tmp_path)
    read = read_requests(tmp_path / "test.jsonl", read_entities(tmp_path / "entity2id.json"))
    assert [replace(r, about="") for r in found.test.requests] == read
    text = {x.id: x.text for x in world.conversations}
    names = {i: entity_name(key) for i, key in found.test.keys.items()}
    assert all(names[r.targets[0]] in text[r.about] for r in found.test.requests)
    assert replace(found, test=None).hash != found.hash


def test_a_world_needs_films_and_a_folder(tmp_path: Path, world: FilmWorld) -> None:
    with pytest.raises(DataError, match="at least one person and six films"):
        film_world(people=3, films=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        write_film_world(world, tmp_path / "file" / "films")
