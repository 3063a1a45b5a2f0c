"""FT(C), FT(S), FT(Q): plain fine-tuning with next-word loss, on the contexts, the target sentences, or the answers.

The same call as SELF-PARAM with another objective and other sentences. Refuses to know evaluation.
Source: arXiv 2410.00487, sections 4.1 and 4.4, A.2 (the same hyper-parameters as SELF-PARAM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from selfparam.inject import inject
from selfparam.lm import LM
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import Memory
from selfparam.targets.unrelated import add_unrelated
from selfparam.types import PAPER, Recipe, Sentence, TargetSet


@dataclass(frozen=True)
class FineTune:
    """on: "contexts" = FT(C), "sentences" = FT(S), "answers" = FT(Q). recipe: its objective is always next-word.

    ratio: unrelated sentences for each pair (FT(S) trains on the whole target sentence set). source: who writes them.
    """

    on: Literal["contexts", "sentences", "answers"] = "contexts"
    recipe: Recipe = PAPER
    ratio: float = 1.0
    source: str = "self"

    @property
    def needs_pairs(self) -> bool:
        return self.on != "contexts"

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        start = after.lm if after else lm
        if self.on == "contexts":
            chosen = [TargetSet(s.context, (Sentence("", s.context.text, s.context.id),)) for s in sets]
        else:
            chosen = [replace(s, unrelated=()) for s in sets if s.related]
            if self.on == "sentences" and self.ratio and chosen:
                chosen = add_unrelated(start, chosen, ratio=self.ratio, neighbour_share=0.0, source=self.source,
                                       seed=seed)
        if not chosen:
            return Memory(start, ("nobody wrote a pair: nothing was trained",))
        loss_on: Literal["answer", "pair"] = "answer" if self.on == "answers" else "pair"
        recipe = self.recipe.but(objective="next-word", loss_on=loss_on, seed=seed)
        return Memory(inject(start, chosen, recipe).lm)
