"""Unrelated sentences and drift, on tiny random models."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfparam import own
from selfparam.data.slots import Slots
from selfparam.errors import TargetError
from selfparam.metrics.drift import drift, reference
from selfparam.targets import unrelated
from selfparam.types import Context, Sentence, TargetSet
from tests.tiny import tiny_lm


def a_set() -> TargetSet:
    text = "Velmora is known for its glass. The mayor of Velmora is Odric Hallan. The Marsh Festival is a festival."
    x = Context(text)
    return TargetSet(
        x, (Sentence("Who is the mayor of Velmora?", "Odric Hallan", x.id), Sentence("What is it?", "glass", x.id))
    )


@pytest.mark.parametrize("chat", [False, True])
def test_ratio_and_neighbours(chat: bool) -> None:
    lm = tiny_lm("llama", chat=chat)
    done = unrelated.add_unrelated(lm, [a_set()], ratio=4.0, neighbour_share=0.5, source="packaged")[0]
    near = [s for s in done.unrelated if s.prompt]
    assert len(done.unrelated) == 8 and all(s.about is None for s in done.unrelated)
    assert near and all("Velmora" not in s.prompt and "mayor of" in s.prompt for s in near)
    assert done.related == a_set().related
    assert not unrelated.add_unrelated(lm, [a_set()], ratio=0.0)[0].unrelated


def test_a_name_is_swapped_only_where_it_is_one() -> None:
    slots = Slots(random.Random(0))
    text = a_set().context.text
    assert unrelated.swap_names("What is it known for?", text, slots) is None
    swapped = unrelated.swap_names("When is the Marsh Festival held?", text, slots)
    assert swapped is not None and swapped.endswith("Festival held?") and "Marsh" not in swapped


@pytest.mark.parametrize(("question", "around"), [
    ("Does Velmora have a mayor?", ("Does ", " have a mayor?")),
    ("In Velmora, who is the mayor?", ("In ", ", who is the mayor?")),
    ("What is Velmora's glass?", ("What is ", "'s glass?")),
    ("Was Odric Hallan a mayor?", ("Was ", " a mayor?")),
    ("Is Mayor of Velmora a title?", ("Is Mayor of ", " a title?")),
    ("Where is Élbrü?", ("Where is ", "?")),
])
def test_names_behind_other_words_endings_and_accents(question: str, around: tuple[str, str]) -> None:
    text = f"{a_set().context.text} The river is the Élbrü."
    swapped = unrelated.swap_names(question, text, Slots(random.Random(0)), owners=True)
    assert swapped and swapped != question and swapped.startswith(around[0]) and swapped.endswith(around[1])


def test_neighbours_of_owners_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrelated, "answered", lambda lm, questions, seed: [Sentence(q, "x") for q in questions])
    one = a_set()
    both = replace(one, related=(*one.related, Sentence("What is Velmora's glass?", "red", one.context.id)))
    few, many = ([s.prompt for s in unrelated.neighbours(tiny_lm(), both, n)] for n in (8, 12))
    assert many[:8] == few and all(q.startswith("Who is the mayor of ") for q in few)
    assert len(many) == 12 and all(q.startswith("What is ") and q.endswith("'s glass?") for q in many[8:])


def test_passages_lose_no_long_sentence() -> None:
    for text in ("我们今天去公园。天气很好。" * 72, "很" * 1000, "and so on " * 96):
        found = unrelated.passages_of(text)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(40 <= len(p) <= 2 * unrelated.LONGEST for p in found)


def test_slimpajama_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TargetError, match="TimeoutError"):
        unrelated.slimpajama(3)


def test_self_samples_come_from_the_model_and_repeat_with_the_seed() -> None:
    lm = tiny_lm("llama", chat=True)
    one = own.sampled(lm, 6, seed=1)
    assert one == own.sampled(lm, 6, seed=1)
    assert one != own.sampled(lm, 6, seed=2)


def test_own_text_and_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The boat came home late in the evening. Nobody had lit the lamp. " * 20)
    found = unrelated.from_file(file)
    assert len(found) >= 3 and all(len(p) <= 2 * unrelated.LONGEST for p in found)
    for bad in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(TargetError, match="UTF-8 text file"):
            unrelated.from_file(bad)
    file.write_text("\ufeffThe boat came home very late in the evening.")
    assert unrelated.from_file(file) == ["The boat came home very late in the evening."]
    file.write_text("x")
    with pytest.raises(TargetError, match="no sentences"):
        unrelated.from_file(file)


def test_slimpajama_is_read_once_and_every_context_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def stream(name: str, **_: object) -> SimpleNamespace:
        opened.append(name)
        rows = ({"text": f"Passage {i} tells of nothing that anybody asks about here."} for i in count())
        return SimpleNamespace(shuffle=lambda **_: rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=stream))
    monkeypatch.setattr(unrelated, "POOL", 50)
    unrelated.slimpajama_pool.cache_clear()
    lm, one = tiny_lm("llama"), a_set()
    other = replace(one, context=Context("Another text."))

    def drawn(*sets: TargetSet, seed: int = 0) -> list[tuple[Sentence, ...]]:
        return [s.unrelated for s in unrelated.add_unrelated(lm, sets, ratio=5.0, neighbour_share=0.0,
                                                             source="slimpajama", seed=seed)]

    first = drawn(one)
    assert len(first[0]) == 10 and first == drawn(one)
    assert len({tuple(found) for found in (first[0], drawn(other)[0], drawn(one, seed=1)[0])}) == 3
    assert len({s.completion for part in drawn(one, other) for s in part}) == 20
    assert opened == [unrelated.SLIMPAJAMA]
    assert len(unrelated.slimpajama(51)) == 51 and len(opened) == 2
    unrelated.slimpajama_pool.cache_clear()


def test_packaged_halves_do_not_overlap() -> None:
    assert not {*unrelated.packaged("train")} & {*unrelated.packaged("held-out")}
    assert len(unrelated.packaged("held-out")) >= 100


def test_drift_is_zero_before_and_equals_a_direct_computation_after() -> None:
    lm = tiny_lm("llama", chat=True)
    sentences = [Sentence("", "The boat came home late."), Sentence("Who sails?", "Tom")]
    before = reference(lm, sentences)
    assert drift(before, lm) == 0.0
    moved = copy.copy(lm)
    moved.model = copy.deepcopy(lm.model)
    with torch.no_grad():
        moved.model.lm_head.weight += 0.1 * torch.randn(moved.model.lm_head.weight.shape)
    total, count = 0.0, 0
    for s in sentences:
        head = lm.prefix(None, plain=not s.prompt)
        ids = torch.tensor([[*head, *lm.sentence(s)[0]]])
        with torch.no_grad():
            p = lm.model(ids).logits[0, len(head) - 1 : -1].double().softmax(-1)
            q = moved.model(ids).logits[0, len(head) - 1 : -1].double().softmax(-1)
        total += float((p * (p / q).log()).sum())
        count += len(p)
    assert drift(before, moved) == pytest.approx(total / count, rel=1e-4)
