"""When a context corrects what a model knows, and that it is then held less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from selfparam.inject import inject
from selfparam.methods import make_method
from selfparam.targets import corrections
from selfparam.targets.corrections import LIGHTER, corrects, held_for
from selfparam.types import SMALL, SMALL_SEQUENTIAL, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("Mara keeps the red lamp in Oslo. It was lit in 1901. It is green inside.")
QUESTIONS = ["Who keeps it?", "Where is it?", "When was it lit?", "What colour is it inside?", "Who built it?"]
SET = TargetSet(X, tuple(Sentence(q, "?", X.id) for q in QUESTIONS))


@dataclass
class Knowing:
    """Says what it is told to say, from memory and reading."""

    memory: Sequence[str]
    reading: Sequence[str]

    def answer(self, questions: Sequence[str], context: str | None = None) -> list[str]:
        assert list(questions) == QUESTIONS and context in (None, X.text)
        return list(self.memory if context is None else self.reading)


READING = ["Mara", "Oslo", "1901", "green", "Tom"]


@pytest.mark.parametrize(("memory", "expected"), [
    (["Ann", "Oslo", "1901", "green", "Tom"], True),  # one fact changed
    (["the Mara", "oslo.", "1901", "Green", "Tom"], False),  # nothing: compared as F1 does
    (["Ann", "Rome", "1901", "green", "Bob"], True),  # two of five are known
    (["Ann", "Rome", "1802", "green", "Bob"], False),  # a new subject, and a lucky guess
])
def test_a_known_subject_with_something_else_about_it(memory: list[str], expected: bool) -> None:
    lm: Any = Knowing(memory, READING)
    assert corrects(lm, SET) is expected
    recipe, found = held_for(lm, [SET], SMALL_SEQUENTIAL)
    assert found == ([SET] if expected else [])
    assert recipe.retention == (LIGHTER if expected else SMALL_SEQUENTIAL.retention)
    assert held_for(lm, [SET], SMALL) == (SMALL, [])  # nothing is held: nothing is asked


def test_a_fold_holds_less_for_a_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    recipe = SMALL.but(epochs=1, retention=1.0, precision="fp32")
    method = make_method("selfparam", {"recipe": {"from": "small", "epochs": 1, "retention": 1.0, "precision": "fp32"},
                                       "ratio": 0.0})
    one = method.absorb(lm, [SET])
    other = TargetSet(Context("The green door."), (Sentence("Which door?", "the green one", "door"),))
    monkeypatch.setattr(corrections, "corrects", lambda lm, given: True)
    two = method.absorb(lm, [other], after=one)
    by_hand = inject(one.lm, [other], recipe.but(retention=LIGHTER), curvature=getattr(one, "curvature", None)).lm
    assert all(torch.equal(a, b) for a, b in zip(two.lm.model.parameters(), by_hand.model.parameters(), strict=True))
