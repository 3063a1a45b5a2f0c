"""Many contexts, each into a fresh θ' of its own, trained as one stack: what FT and SELF-PARAM share for it.

Refuses to know sentences. Source: arXiv 2410.00487, table 1 (one model for each context).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from selfparam.inject.stack import inject_each
from selfparam.lm import LM
from selfparam.methods.readers import Memory
from selfparam.types import Recipe, TargetSet

#: What a method says that had no pair to train on.
UNTRAINED = ("nobody wrote a pair: nothing was trained",)


def memories(
    lm: LM, sets: Sequence[TargetSet], prepare: Callable[[TargetSet], Sequence[TargetSet]], recipe: Recipe
) -> Iterator[Memory]:
    """A fresh θ' for each set, trained on what `prepare` makes of it; θ itself where that is nothing."""
    chosen = [prepare(one) for one in sets]
    done = inject_each(lm, [one for few in chosen for one in few], recipe, stack=len(sets))
    for few in chosen:
        yield Memory(next(done).lm) if few else Memory(lm, UNTRAINED)
