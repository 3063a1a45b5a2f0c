"""What a benchmark hands to an experiment: contexts with their questions, and the other data sets' common shape.

Refuses to know where items come from, models and training. Source: arXiv 2410.00487, section 4.1 (context, question,
answer); the rest is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfparam.data.conversations import Request
from selfparam.types import Context, Question, Sentence, content_hash

#: Tokens of a text.
Count = Callable[[str], int]


@dataclass(frozen=True)
class Item:
    """One context with what is asked about it.

    pairs: question-answer pairs that are right by construction (fictional worlds only).
    elsewhere: the same questions about other subjects with this context's answers, so that a hit is a leak.
    changed, outdated: questions on facts that an earlier context told otherwise, with the new and with the old answer.
    """

    context: Context
    questions: tuple[Question, ...]
    pairs: tuple[Sentence, ...] = ()
    elsewhere: tuple[Question, ...] = ()
    changed: tuple[Question, ...] = ()
    outdated: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Recommending:
    """What is asked of a model that has absorbed conversations: turns to fill with films.

    keys: entity2id.json as {id: key}; films: the ids that may be recommended (empty: not known).
    """

    requests: tuple[Request, ...]
    keys: Mapping[int, str]
    films: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Benchmark:
    """Items in a fixed order; `fresh` are never injected: does the model still read? `notes`: what was left out.

    test: of conversations, whose items have no questions.
    """

    items: tuple[Item, ...]
    fresh: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()
    test: Recommending | None = None

    @property
    def hash(self) -> str:
        """Hash of every text of the items, the fresh ones and the test."""
        asked = [repr(self.test.requests), repr(sorted(self.test.keys.items()))] if self.test else []
        return content_hash(*(part for item in (*self.items, *self.fresh) for part in _texts(item)), *asked)


def _texts(item: Item) -> Sequence[str]:
    asked = [[q.text, *q.answers] for q in (*item.questions, *item.elsewhere, *item.outdated)]
    told = [[s.prompt, s.completion] for s in item.pairs]
    return (item.context.text, json.dumps([asked, told], ensure_ascii=False))
