"""The two ways to answer: from memory, or with texts in front of the question.

Refuses to know how texts were chosen. Source: arXiv 2410.00487, section 4.2 (retrieved contexts before the question).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from selfparam.lm import LM
from selfparam.types import Question

#: Longest answer in tokens.
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Memory:
    """Answers from the weights alone: 𝒮 = 0."""

    lm: LM
    notes: tuple[str, ...] = ()
    storage_tokens: int | None = 0

    def answer(self, questions: Sequence[Question]) -> list[str]:
        return self.lm.answer([q.text for q in questions], max_new_tokens=ANSWER_TOKENS)


@dataclass(frozen=True)
class Prompted:
    """Answers with the texts that `find` gives for a question in front of it, best first, joined by `joint`.

    What does not fit the window is left out from the end, which is noted.
    """

    lm: LM
    find: Callable[[Question], Sequence[str]]
    storage_tokens: int | None
    joint: str = "\n\n"
    notes: list[str] = field(default_factory=list)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        fitted = [self._fitted(q) for q in questions]
        fewer = sum(cut for _, cut in fitted)
        if fewer:
            self.notes.append(f"{fewer} of {len(questions)} prompts hold fewer texts than were found: the window of "
                              f"{self.lm.window} tokens is too small")
        texts = [text or None for text, _ in fitted]
        return self.lm.answer([q.text for q in questions], texts, max_new_tokens=ANSWER_TOKENS)

    def _fitted(self, question: Question) -> tuple[str, bool]:
        """As many of the texts as fit, and whether some were left out."""
        found = list(self.find(question))
        room = self.lm.window - ANSWER_TOKENS - len(self.lm.question(question.text))
        kept = len(found)
        while kept and len(self.lm.prefix(self.joint.join(found[:kept]))) > room:
            kept -= 1
        return self.joint.join(found[:kept]), kept < len(found)


def tokens(lm: LM, texts: Sequence[str]) -> int:
    """𝒮 of kept texts."""
    return sum(len(lm.encode(text)) for text in texts)
