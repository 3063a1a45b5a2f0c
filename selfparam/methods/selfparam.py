"""SELF-PARAM: Eq. 2 as a row of a table. Pairs, unrelated sentences, one inject() for all contexts; 𝒮 = 0.

Absorbing in turn is a fold, θ_i = inject(θ_{i-1}, ℰ(x_i)), which holds what earlier steps taught where the recipe has
retention or rehearsal. Refuses to know evaluation.
Source: arXiv 2410.00487, section 3; what it leaves open is in docs/paper.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from selfparam.inject import inject, precision
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature
from selfparam.inject.loop import EpochProgress
from selfparam.inject.stack import refusal
from selfparam.lm import LM
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import Memory, tokens
from selfparam.methods.stacked import UNTRAINED, memories
from selfparam.targets.corrections import held_for
from selfparam.targets.rehearsal import add_rehearsed
from selfparam.targets.unrelated import add_unrelated
from selfparam.types import PAPER, Recipe, Sentence, TargetSet


@dataclass(frozen=True)
class Keeping(Memory):
    """Answers from the weights; what the next step needs beside them.

    kept: the pairs absorbed so far, which 𝒮 counts. curvature: of the steps so far; it holds no text.
    """

    kept: tuple[Sentence, ...] = ()
    curvature: Curvature | None = None


@dataclass(frozen=True)
class SelfParam:
    """ratio, neighbour_share: as add_unrelated has them (None: its defaults; no neighbours to the letter of Eq. 2).

    source: who writes unrelated sentences. teacher: which θ reads x, and holds what is unrelated: the one before this
    step or the "first" one (only different in a sequence; the first one stays in memory as a second copy). keep:
    "pairs" trains on all earlier pairs again in every step of a sequence, which have to be stored; recipe.retention
    and recipe.rehearsal store no text. Earlier pairs and what is rehearsed are always taught by the one before this
    step.
    """

    recipe: Recipe = PAPER
    ratio: float | None = None
    neighbour_share: float | None = None
    source: str = "self"
    teacher: Literal["previous", "first"] = "previous"
    keep: Literal["nothing", "pairs"] = "nothing"
    needs_pairs: ClassVar[bool] = True

    @property
    def stacks(self) -> bool:
        return not refusal(self.recipe) and self.keep == "nothing"

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0,
               checkpoints: Checkpoints | None = None, progress: EpochProgress | None = None) -> Reader:
        start = after.lm if after else lm
        first = after is not None and self.teacher == "first"
        chosen = self._chosen(lm if first else start, sets, seed)
        if not chosen:
            return replace(after, notes=UNTRAINED) if isinstance(after, Memory) else Memory(start, UNTRAINED)
        kept, curvature = (after.kept, after.curvature) if isinstance(after, Keeping) else ((), None)
        own = tuple(replace(s, about=None, rehearsed=True) for one in chosen for s in one.related)
        chosen[0] = replace(chosen[0], unrelated=(*chosen[0].unrelated, *kept))
        if after and self.recipe.rehearsal:
            with precision(start, self.recipe):
                chosen, _ = add_rehearsed(start, chosen, self.recipe.rehearsal, first=lm, seed=seed,
                                          temperature=self.recipe.rehearsal_temperature)
        recipe = held_for(start, chosen, self.recipe)[0] if curvature or self.recipe.known else self.recipe
        done = inject(start, chosen, recipe.but(seed=seed), teacher=lm if first else None, curvature=curvature,
                      checkpoints=checkpoints, progress=progress)
        if self.keep == "pairs":
            kept += own
        notes = (f"{done.curvature.numbers / 1e6:.1f} million numbers of curvature are kept from step to step, "
                 "however many contexts there are",) if done.curvature else ()
        return Keeping(done.lm, notes, tokens(done.lm, [f"{s.prompt} {s.completion}" for s in kept]), kept,
                       done.curvature)

    def absorb_each(self, lm: LM, sets: Sequence[TargetSet], *, seed: int = 0) -> Iterator[Reader]:
        return memories(lm, sets, lambda one: self._chosen(lm, [one], seed), self.recipe.but(seed=seed))

    def _chosen(self, lm: LM, sets: Sequence[TargetSet], seed: int) -> list[TargetSet]:
        """The sets that have pairs, with unrelated sentences."""
        written = [replace(s, unrelated=()) for s in sets if s.related]
        if self.ratio == 0 or not written:
            return written
        share = 0.0 if self.neighbour_share is None and self.recipe.teacher_sees_x else self.neighbour_share
        given: dict[str, Any] = {"ratio": self.ratio, "neighbour_share": share}
        return add_unrelated(
            lm, written, source=self.source, seed=seed, **{k: v for k, v in given.items() if v is not None})
