"""Sentences that a model writes by itself, without any context: they hold it where it is while something is injected.

Refuses to know contexts and training. Source: ours; the paper takes SlimPajama for it (arXiv 2410.00487, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from selfparam.lm import LM
from selfparam.types import Recipe, Sentence

LONGEST = 320  # characters of a plain passage, or of a question


def sampled(lm: LM, n: int, *, seed: int = 0, temperature: float = 1.0) -> list[Sentence]:
    """Up to n sentences that the model writes itself: questions with answers (chat models) and text."""
    found: list[Sentence] = []
    if lm.is_chat:
        head, between, _ = lm.chat_parts()
        questions = lm.generate(
            [head] * (n - n // 2), max_new_tokens=40, temperature=temperature, seed=seed, stop_at=between
        )
        questions = [q.strip() for q in questions if 8 <= len(q.strip()) <= LONGEST]
        found += answered(lm, questions, seed=seed + 1, temperature=temperature)
    rest = n - len(found)
    texts = lm.generate([lm.bos] * rest, max_new_tokens=60, temperature=temperature, seed=seed + 2)
    found += [Sentence("", t.strip()) for t in texts if len(t.strip()) >= 20]
    return found


def own_sentences(lm: LM, recipe: Recipe) -> list[Sentence]:
    """What is held of what the model knew before a first injection (inject's `known`); [] where the recipe has none."""
    return sampled(lm, recipe.known, seed=recipe.seed) if recipe.retention and recipe.known else []


def answered(lm: LM, questions: Sequence[str], *, seed: int = 0, temperature: float = 1.0) -> list[Sentence]:
    """Questions with answers drawn from the model without any context (empty answers are left out)."""
    rows = [[*lm.prefix(None), *lm.question(q)] for q in questions]
    texts = lm.generate(rows, max_new_tokens=24, temperature=temperature, seed=seed, stop=None if lm.is_chat else "\n")
    return [Sentence(q, a.strip()) for q, a in zip(questions, texts, strict=True) if a.strip()]
