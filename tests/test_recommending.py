"""The protocol recommend: rows from the fictional world and from files, every method of table 3, and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from selfparam import methods
from selfparam.data.films import film_world, write_film_world
from selfparam.errors import ContextError, TableError, TargetError
from selfparam.experiments import render
from selfparam.experiments.authors import sets_by
from selfparam.experiments.rows import read_rows
from selfparam.experiments.run import run_table
from selfparam.experiments.spec import AuthorSpec, Table, cells_of, read_table
from selfparam.experiments.summary import blocks_of, hits
from selfparam.lm import LM
from selfparam.methods import Reader
from selfparam.metrics.recall import FILTERS, mcnemar
from selfparam.targets.recommend import BARE, prompt_named, recommendations
from selfparam.types import Question, TargetSet
from tests.tiny import tiny_lm

HEAD = """
title = "A test"
protocol = "recommend"
contexts = 3

[recommend]
prompt = "bare"
tokens = 6
filter = "r3"

[probes]
world = 1
passages = 1

[data]
{data}

[[models]]
name = "{model}"
label = "tiny"
paper = "Mistral-7B"

[authors.oracle]
kind = "oracle"

[authors.both]
kind = "recommending"
of = "oracle"
prompt = "bare"
tokens = 6
pairs = 1
"""
FILMS = 'kind = "films"\nfilms = 8\nseed = 3'
BASE = '[[methods]]\nlabel = "Base"\nmethod = "base"\n'
KNOWS = '[[methods]]\nlabel = "Knows"\nmethod = "knows"\nagainst = "Base"\npaper = { "Mistral-7B" = { r3 = 0.0395 } }\n'
TRAIN = 'recipe = { from = "small", epochs = 1, precision = "fp32" }\nagainst = "Base"\n'


@dataclass(frozen=True)
class Knows:
    """Puts the answer in front, so that a test can see which question came with which conversation."""

    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        return Knowing(lm, {one.context.id: one.context.text for one in sets})


@dataclass(frozen=True)
class Knowing:
    lm: LM
    texts: dict[str, str]
    storage_tokens: int = 5
    notes: tuple[str, ...] = ("it looks it up",)

    def in_front(self, questions: Sequence[Question], rooms: Sequence[int]) -> list[str | None]:
        assert all(0 < room < self.lm.window for room in rooms)
        return [self.texts[q.about or ""] for q in questions]

    def answer(self, questions: Sequence[Question]) -> list[str]:
        raise AssertionError("nothing is answered in this protocol")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_lm().save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(methods.METHODS, "knows", Knows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(tmp_path: Path, model: str, body: str, data: str = FILMS, change: tuple[str, str] = ("", "")) -> Table:
    (tmp_path / "tables").mkdir(exist_ok=True)
    file = tmp_path / "tables" / "t.toml"
    file.write_text(HEAD.format(data=data, model=model).replace(*change) + body)
    return read_table(file)


def rows(table: Table) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.results.read_text().splitlines()]


def titles_told(lm: LM, said: Sequence[str], contexts: Sequence[str | None], **options: Any) -> list[str]:
    """In place of a model: recommends the film that the text in front of it tells, "1. Nothing" without one."""
    titles = [film.title for film in film_world(3, 8, 3).films]
    return [f"1. {next((t for t in titles if t in (x or '')), 'Nothing')}\n" for x in contexts]


def test_the_film_of_the_right_conversation_is_a_hit(tmp_path: Path, model: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfparam.experiments.recommending.recommend", titles_told)
    own = '[[methods]]\nlabel = "Own"\nmethod = "base"\ncontext = "own"\n'
    table = make(tmp_path, model, BASE + KNOWS + own)
    assert run_table(table).failed == 0 and run_table(table).ran == 0
    base, known, bound = rows(table)
    assert not any(hits(base, "r3")) and base["shares"]["out_of_vocabulary"] == 1
    assert known["hit_at"]["r3"] == bound["hit_at"]["r3"] == [1] * 12
    assert known["hit_at"]["r4"] == [1, 1, 1, 0] * 3  # the last request of a person names the target itself
    assert known["groups"]["discussion"] == {"targets": 3, "r1": [3] * 4, "r2": [0] * 4, "r3": [3] * 4, "r4": [0] * 4}
    assert known["low"]["r3"] == known["high"]["r3"] == [12] * 4 and len(known["outputs"]) == 12
    assert sorted(set(known["units"])) == sorted(x.id for x in film_world(3, 8, 3).conversations)
    assert (known["storage_tokens"], known["kl"], bound["storage_tokens"], bound["kl"]) == (5, 0, None, None)
    [block] = blocks_of(table, read_rows(table.results))
    line = block.lines[1]
    assert line.recall["r3"] == (1, 1, 1) and line.recall["r4"][0] == 0.75 and line.last == 1 and line.f1 is None
    assert line.interval == (1, 1) and line.gain == (1, (1, 1)) and line.paper == 0.0395
    assert line.p == mcnemar([True] * 12, [False] * 12).p and block.lines[0].p is None
    page = render.markdown(table, [block], "selfparam run t.toml")
    assert "3 conversations at once" in page and "gain: paired difference in r3" in page
    assert "- note: Knows: it looks it up" in page and "| F1 |" not in page
    shown = render.as_csv(table, [block]).splitlines()
    assert shown[0].endswith("r1,r2,r3,r4,at_20,p") and len({len(one.split(",")) for one in shown}) == 1
    assert len({cell.id for cell in (*cells_of(table), *cells_of(make(
        tmp_path, model, BASE + KNOWS + own, change=("tokens = 6\nfilter", "tokens = 7\nfilter"))))}) == 6


def test_every_method_that_needs_no_further_package(tmp_path: Path, model: str) -> None:
    body = BASE + '[[methods]]\nlabel = "BM25"\nmethod = "bm25"\ntop = 1\n'
    for label, more in (("FT (C)", 'method = "finetune"\non = "turns"'),
                        ("FT (Q)", 'method = "finetune"\non = "answers"\nauthor = "oracle"'),
                        ("SELF-PARAM", 'method = "selfparam"\nratio = 0.5\nsource = "packaged"\nauthor = "both"')):
        body += f'[[methods]]\nlabel = "{label}"\n{more}\n{TRAIN}'
    table = make(tmp_path, model, body)
    assert run_table(table).failed == 0
    found = rows(table)
    assert [row["method"] for row in found] == ["Base", "BM25", "FT (C)", "FT (Q)", "SELF-PARAM"]
    for row in found:
        assert len(row["outputs"]) == 12 and set(row["hit_at"]) == set(FILTERS) and row["n"] == 3
        assert (row["kl"] > 0) == (row["method"] not in ("Base", "BM25"))
    assert found[1]["storage_tokens"] > 0 and found[3]["pairs"] == 18 and 18 <= found[4]["pairs"] <= 21
    assert "SELF-PARAM" in render.text(table, blocks_of(table, read_rows(table.results)))


def test_recommendations_of_the_model_stand_behind_the_pairs() -> None:
    from selfparam.data.films import film_benchmark

    items = film_benchmark(2, 0, len, films=8, seed=3).items
    authors = {"oracle": AuthorSpec("oracle"),
               "both": AuthorSpec("recommending", of="oracle", prompt="bare", tokens=6, pairs=1),
               "alone": AuthorSpec("recommending", prompt="bare", tokens=6, pairs=1)}
    lm = tiny_lm()
    own = recommendations(lm, [i.context for i in items], turns=1, prompt=BARE, max_new_tokens=6)
    both = sets_by("both", authors, lm, items, 0, Path("unused"))
    assert [one.related for one in both] == [(*i.pairs, *more) for i, more in zip(items, own, strict=True)]
    alone = sets_by("alone", authors, lm, items, 0, Path("unused"))
    assert [one.related for one in alone] == own and both[0].author == "oracle both"


def test_files_of_the_real_sets(tmp_path: Path, model: str) -> None:
    """The formats of INSPIRED, with a window that is too small for the conversation."""
    write_film_world(film_world(3, 8, 3), tmp_path / "set")
    lines = (tmp_path / "set" / "test.jsonl").read_text().splitlines()
    long = json.loads(lines[0])
    long["input"] = "\nUser: " + "yes " * 900 + long["input"]
    (tmp_path / "set" / "test.jsonl").write_text("\n".join([json.dumps(long), *lines[1:]]) + "\n")
    data = 'kind = "inspired"\nrequests = 5\n' + "".join(f'{key} = "../set/{name}"\n' for key, name in (
        ("path", "dialogues.jsonl"), ("test", "test.jsonl"), ("entities", "entity2id.json"),
        ("items", "item_ids.json")))
    table = make(tmp_path, model, BASE, data)
    run_table(table)
    [row] = rows(table)
    assert len(row["outputs"]) == 5 and row["units"] == [f"{i}.0" for i in range(5)]
    assert row["notes"] == ["1 of 5 conversations lost their oldest turns: the window of 1024 tokens is too small"]
    with pytest.raises(ContextError, match="only 3 of 4 conversations: ask for fewer"):
        run_table(make(tmp_path, model, BASE, data, ("contexts = 3", "contexts = 4")))
    lengths = [len(tiny_lm().encode(x.text)) for x in film_world(3, 8, 3).conversations]
    assert lengths[0] > min(lengths)
    short = make(tmp_path, model, BASE, f"{data}longest = {lengths[0] - 1}\n", ("contexts = 3", "contexts = 1"))
    assert run_table(short).notes == (f"inspired: 1 conversations of more than {lengths[0] - 1} tokens left out",)


@pytest.mark.parametrize(("change", "says"), [
    (('filter = "r3"', 'filter = "r5"'), "filter must be one of r1, r2, r3, r4"),
    (('[recommend]\nprompt = "bare"', '[recommend]\nprompt = "bore"'), "no prompt 'bore' for recommendations"),
    (('protocol = "recommend"', 'protocol = "batch"'), "author 'both': is for the protocol recommend"),
    (('of = "oracle"', 'of = "nobody"'), "'of' must name another author"),
])
def test_wrong_tables_are_named(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    with pytest.raises((TableError, TargetError)) as caught:
        make(tmp_path, "m", BASE, change=change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_conversations_and_the_protocol_belong_together(tmp_path: Path, model: str) -> None:
    with pytest.raises(TableError, match="not for the protocol recommend"):
        run_table(make(tmp_path, model, BASE, 'kind = "worlds"'))
    full = make(tmp_path, model, BASE, change=("tokens = 6\nfilter", "tokens = 2000\nfilter"))
    assert run_table(full).failed == 1
    [row] = rows(full)
    assert "leave no room for a prompt" in row["error"]
    with pytest.raises(TargetError, match="no prompt 'brief'"):
        prompt_named("brief")
