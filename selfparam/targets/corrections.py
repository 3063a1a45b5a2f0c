"""Whether a context corrects what the model knows: then what was learned before must not be held as firmly.

A correction is about a subject that the model knows: many questions about it are answered from memory as with the text
in front, and some are not. Refuses to know training. Source: ours; numbers in docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfparam.lm import LM
from selfparam.metrics.qa_f1 import tokens
from selfparam.types import Recipe, TargetSet

KNOWN = 0.4  # share of the pairs, from which on the subject is known: new contexts have .0 to .2, known ones .6 to .8
LIGHTER = 0.01  # retention, at most, for a correction


def corrects(lm: LM, one: TargetSet) -> bool:
    """Whether the model, reading x, answers some of the set's questions otherwise, and at least KNOWN of them alike."""
    questions = [s.prompt for s in one.related if s.prompt]
    from_memory, reading = lm.answer(questions), lm.answer(questions, one.context.text)
    known = sum(tokens(a) == tokens(b) for a, b in zip(from_memory, reading, strict=True))
    return KNOWN * len(questions) <= known < len(questions)


def held_for(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Recipe, list[TargetSet]]:
    """The recipe, with less retention where sets are corrections, and those sets."""
    found = [one for one in sets if corrects(lm, one)] if recipe.retention else []
    return recipe.but(retention=min(LIGHTER, recipe.retention)) if found else recipe, found
