"""What every row of the paper's tables is: a Method absorbs contexts, a Reader answers questions about them.

Refuses to know which methods there are. Source: arXiv 2410.00487, tables 1 and 2; 𝒮 (storage) is measured in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.loop import EpochProgress
from selfparam.lm import LM
from selfparam.types import Question, Recipe, TargetSet


class Reader(Protocol):
    """What a method leaves behind. `lm`: the weights it answers with; drift, fresh and world are measured on them."""

    @property
    def lm(self) -> LM: ...

    @property
    def storage_tokens(self) -> int | None:
        """𝒮: tokens kept outside the weights; None where contexts are handed in with the question (the upper bound)."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the table has to know, such as passages that did not fit the window."""
        ...

    def answer(self, questions: Sequence[Question]) -> list[str]: ...


@runtime_checkable
class Fronted(Protocol):
    """A Reader that answers with its `lm` and a text in front: longer things than answers can be asked of it."""

    def in_front(self, questions: Sequence[Question], rooms: Sequence[int]) -> list[str | None]:
        """What stands in front of each question (None: nothing). rooms: tokens that there are for it."""
        ...


class Method(Protocol):
    """A frozen dataclass whose fields are its options in a table."""

    @property
    def needs_pairs(self) -> bool:
        """Whether absorb reads the related sentences of the target sets; otherwise nobody writes any."""
        ...

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        """Take in the contexts of the sets. lm: θ, which stays as it is.

        The sets hold contexts and pairs; unrelated sentences are the method's own affair. after: what this method left
        when it absorbed earlier contexts; what it knows is kept as well as the method can. Raises SelfParamError.
        """
        ...


@runtime_checkable
class Training(Protocol):
    """A Method that trains as its recipe says; it can be interrupted and go on from checkpoints."""

    @property
    def recipe(self) -> Recipe: ...

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0,
               checkpoints: Checkpoints | None = None, progress: EpochProgress | None = None) -> Reader: ...


@runtime_checkable
class Stacking(Protocol):
    """A Method that can also absorb many sets at a time, each into a fresh θ: faster than one after another."""

    @property
    def stacks(self) -> bool:
        """Whether it can with its options."""
        ...

    def absorb_each(self, lm: LM, sets: Sequence[TargetSet], *, seed: int = 0) -> Iterator[Reader]:
        """The readers of [absorb(lm, [one], seed=seed) for one in sets], to float tolerance, made when asked for.

        Raises SelfParamError, also where only one of the sets is at fault: absorb them one by one then.
        """
        ...
