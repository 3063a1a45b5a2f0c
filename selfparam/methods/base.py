"""Base: the model as it is. With the right context in front (the upper bound), with nothing, or with all contexts.

Refuses to train and to search. Source: arXiv 2410.00487, tables 1 and 2 ("Base, C+Q", "Base, Q"), and the prompt of the
long-context methods, "context1, …, contextN, question".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selfparam.errors import ModelError
from selfparam.lm import LM
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import ANSWER_TOKENS, Memory, tokens
from selfparam.types import Question, TargetSet


@dataclass(frozen=True)
class Base:
    """context: "none" (from memory), "own" (the context that the question is about), "all" (every absorbed one)."""

    context: Literal["none", "own", "all"] = "none"
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        if self.context == "none":
            return Memory(lm)
        texts = dict(after.texts) if isinstance(after, Given) else {}
        texts.update((one.context.id, one.context.text) for one in sets)
        return Given(lm, texts, self.context == "all")


@dataclass(frozen=True)
class Given:
    """Answers with the context of the question (from memory where it has none yet), or with all of them."""

    lm: LM
    texts: dict[str, str]
    everything: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def storage_tokens(self) -> int | None:
        return tokens(self.lm, list(self.texts.values())) if self.everything else None

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Raises ModelError where all contexts together do not fit the window."""
        contexts = self.in_front(questions, [self.lm.window - ANSWER_TOKENS] * len(questions))
        return self.lm.answer([q.text for q in questions], contexts, max_new_tokens=ANSWER_TOKENS)

    def in_front(self, questions: Sequence[Question], rooms: Sequence[int]) -> list[str | None]:
        """Raises ModelError where all contexts together do not fit."""
        if not self.everything:
            return [self.texts.get(q.about or "") for q in questions]
        whole = ", ".join(self.texts.values())
        size = len(self.lm.encode(whole))
        if size > min(rooms, default=size):
            raise ModelError(f"{len(self.texts)} contexts have {size} tokens, more than the window of {self.lm.window}"
                             ": use fewer contexts, or another method")
        return [whole] * len(questions)
