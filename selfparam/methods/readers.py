"""The ways to answer: from memory, with texts in front of the question, or token by token from a model that is fed.

Refuses to know how texts were chosen. Source: arXiv 2410.00487, section 4.2 (retrieved contexts before the question).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from selfparam.errors import ModelError
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

    def in_front(self, questions: Sequence[Question], rooms: Sequence[int]) -> list[str | None]:
        return [None] * len(questions)


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
        rooms = [self.lm.window - ANSWER_TOKENS - len(self.lm.question(q.text)) for q in questions]
        return self.lm.answer([q.text for q in questions], self.in_front(questions, rooms),
                              max_new_tokens=ANSWER_TOKENS)

    def in_front(self, questions: Sequence[Question], rooms: Sequence[int]) -> list[str | None]:
        fitted = [self._fitted(q, room) for q, room in zip(questions, rooms, strict=True)]
        fewer = sum(cut for _, cut in fitted)
        if fewer:
            self.notes.append(f"{fewer} of {len(questions)} prompts hold fewer texts than were found: the window of "
                              f"{self.lm.window} tokens is too small")
        return [text or None for text, _ in fitted]

    def _fitted(self, question: Question, room: int) -> tuple[str, bool]:
        """As many of the texts as fit, and whether some were left out."""
        found = list(self.find(question))
        kept = len(found)
        while kept and len(self.lm.prefix(self.joint.join(found[:kept]))) > room:
            kept -= 1
        return self.joint.join(found[:kept]), kept < len(found)


def tokens(lm: LM, texts: Sequence[str]) -> int:
    """𝒮 of kept texts."""
    return sum(len(lm.encode(text)) for text in texts)


def greedy(lm: LM, ids: Sequence[int], step: Callable[[Sequence[int]], torch.Tensor]) -> str:
    """The greedy answer to ids. step: reads ids behind all it has read, and returns the logits [V] of what follows."""
    found: list[int] = []
    text, stops = "", lm.stop_ids()
    token = int(step(ids).argmax())
    while token not in stops:
        found.append(token)
        text = lm.decode(found)
        if len(found) == ANSWER_TOKENS or (not lm.is_chat and "\n" in text):
            break
        token = int(step([token]).argmax())
    return (text if lm.is_chat else text.split("\n")[0]).strip()


def llama_type(lm: LM, who: str) -> None:
    """Raises ModelError for a model whose layers are not those of Llama and Mistral."""
    kind = lm.text_config.model_type
    if kind not in ("llama", "mistral"):
        raise ModelError(f"{who} works in models of the Llama and Mistral type, '{lm.name}' is of the type '{kind}': "
                         "use another model")
