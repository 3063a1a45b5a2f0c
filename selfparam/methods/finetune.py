"""FT(C), FT(S), FT(Q): plain fine-tuning with next-word loss, on the contexts, the target sentences, or the answers.

The same call as SELF-PARAM with another objective and other sentences. Refuses to know evaluation.
Source: arXiv 2410.00487, sections 4.1 and 4.4, A.2 (the same hyper-parameters as SELF-PARAM).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from selfparam.inject import inject
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.loop import EpochProgress
from selfparam.inject.stack import refusal
from selfparam.lm import LM
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import Memory
from selfparam.methods.stacked import UNTRAINED, memories
from selfparam.targets.recommend import ft_c
from selfparam.targets.unrelated import add_unrelated
from selfparam.types import PAPER, Recipe, Sentence, TargetSet


@dataclass(frozen=True)
class FineTune:
    """on: "contexts" = FT(C), "sentences" = FT(S), "answers" = FT(Q); "turns" = FT(C) on conversations.

    recipe: its objective is always next-word.
    ratio: unrelated sentences for each pair (FT(S) trains on the whole target sentence set). source: who writes them.
    """

    on: Literal["contexts", "sentences", "answers", "turns"] = "contexts"
    recipe: Recipe = PAPER
    ratio: float = 1.0
    source: str = "self"

    @property
    def needs_pairs(self) -> bool:
        return self.on in ("sentences", "answers")

    @property
    def stacks(self) -> bool:
        return not refusal(self.recipe)

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0,
               checkpoints: Checkpoints | None = None, progress: EpochProgress | None = None) -> Reader:
        start = after.lm if after else lm
        chosen = self._chosen(start, sets, seed)
        if not chosen:
            return Memory(start, UNTRAINED)
        return Memory(inject(start, chosen, self._recipe(seed), checkpoints=checkpoints, progress=progress).lm)

    def absorb_each(self, lm: LM, sets: Sequence[TargetSet], *, seed: int = 0) -> Iterator[Reader]:
        return memories(lm, sets, lambda one: self._chosen(lm, [one], seed), self._recipe(seed))

    def _chosen(self, lm: LM, sets: Sequence[TargetSet], seed: int) -> list[TargetSet]:
        """What is trained on, of the sets that have any."""
        if self.on == "contexts":
            return [TargetSet(s.context, (Sentence("", s.context.text, s.context.id),)) for s in sets]
        if self.on == "turns":
            return [ft_c(s.context) for s in sets]
        chosen = [replace(s, unrelated=()) for s in sets if s.related]
        if self.on == "sentences" and self.ratio and chosen:
            return add_unrelated(lm, chosen, ratio=self.ratio, neighbour_share=0.0, source=self.source, seed=seed)
        return chosen

    def _recipe(self, seed: int) -> Recipe:
        loss_on: Literal["answer", "pair"] = "answer" if self.on in ("answers", "turns") else "pair"
        return self.recipe.but(objective="next-word", loss_on=loss_on, seed=seed)
