"""(x, s) -> rows of ids, and rows -> packed arrays. The student's row is the teacher's without x.

A row is prefix + s; its scored tokens are those of s (or of its completion only). Refuses to know the model.
Source: Eq. 2 of arXiv 2410.00487: P_θ(s|x) against P_θ'(s) on the same tokens of s.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from selfparam.errors import InjectionError
from selfparam.lm import LM
from selfparam.types import Recipe, Sentence, TargetSet

SHAPE = 64  # on a CPU lines and scored tokens come in multiples: bf16 products are prepared anew for every other shape
WORD = 8  # multiples elsewhere
STEPS = 32  # of an epoch: with more, steps become larger instead, up to the recipe's `most_batch_tokens`


@dataclass(frozen=True)
class Row:
    """One target sentence as ids. `prefix` indexes the teacher prefixes; the student's prefix has no x.

    student: ids of prefix without x, then s. first: index in `student` of the first scored token. rehearsed: as of its
    Sentence; rows with another teacher have another prefix.
    """

    student: tuple[int, ...]
    first: int
    prefix: int
    s: tuple[int, ...]
    weight: float
    related: bool
    rehearsed: bool = False

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.student) - self.first


def build_rows(lm: LM, target_sets: Sequence[TargetSet], recipe: Recipe) -> tuple[list[Row], list[list[int]]]:
    """All rows and the distinct teacher prefixes (ids). Raises InjectionError when a row does not fit the window."""
    rows: list[Row] = []
    prefixes: list[list[int]] = []
    known: dict[tuple[bool, tuple[int, ...]], int] = {}

    def prefix_index(ids: list[int], rehearsed: bool) -> int:
        key = (rehearsed, tuple(ids))
        if key not in known:
            known[key] = len(prefixes)
            prefixes.append(ids)
        return known[key]

    for target_set in target_sets:
        for sentence in (*target_set.related, *target_set.unrelated):
            seen = sentence.about is not None or recipe.teacher_sees_x
            plain = not sentence.prompt
            x = target_set.context.text if seen and recipe.objective == "kl" else None
            index = prefix_index(lm.prefix(x, plain=plain), sentence.rehearsed)
            rows.append(_row(lm, sentence, index, recipe))
            if len(prefixes[index]) + len(rows[-1].s) > lm.window:
                raise InjectionError(
                    f"context '{target_set.context.title or target_set.context.id}' and {len(rows[-1].s)} tokens of a "
                    f"sentence exceed the window of {lm.window} tokens: split the context"
                )
    if not any(r.scored for r in rows):
        raise InjectionError("nothing to train on: the target sets hold no sentences")
    return [r for r in rows if r.scored], prefixes


def _row(lm: LM, sentence: Sentence, prefix: int, recipe: Recipe) -> Row:
    ids, prompt = lm.sentence(sentence)
    head = lm.prefix(None, plain=not sentence.prompt)
    skip = prompt if recipe.loss_on == "answer" else 0
    related = sentence.about is not None
    weight = 1.0 if related else recipe.unrelated_weight
    return Row((*head, *ids), len(head) + skip, prefix, tuple(ids), weight, related, sentence.rehearsed)


@dataclass(frozen=True)
class Pack:
    """Rows packed without padding between them: arrays [B, T]; the last places of a line may be unused.

    position_ids restart with every row. index [N] = flat places whose outputs predict the scored tokens,
    source [N] = where their targets lie among all scored tokens, weight [N]. The first is repeated with weight 0 until
    N is rounded up.
    """

    ids: torch.Tensor
    position_ids: torch.Tensor
    index: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> Pack:
        return Pack(*(t.to(device) for t in (self.ids, self.position_ids, self.index, self.source, self.weight)))


def offsets(rows: Sequence[Row]) -> list[int]:
    """Where the scored tokens of each row start among all scored tokens."""
    found, at = [], 0
    for row in rows:
        found.append(at)
        at += row.scored
    return found


def pack(rows: Sequence[Row], chosen: Sequence[int], starts: Sequence[int], width: int, pad: int, apart: bool = False
         ) -> Pack:
    """Pack the chosen rows into even lines of about `width` tokens (or the longest row), with few unused places.

    apart: every row in a line of its own.
    """
    sizes = [len(rows[i].student) for i in chosen]
    if apart:
        return lay(rows, [[i] for i in chosen], starts, max(sizes), pad)
    few = max(1, sum(sizes) // max(width, *sizes))

    def places(lines: Sequence[Sequence[int]]) -> int:
        return len(lines) * _rounded(max(line_tokens(rows, line) for line in lines))

    lines = min((even_lines(rows, chosen, count) for count in (few, few + 1)), key=places)
    return lay(rows, lines, starts, max(line_tokens(rows, line) for line in lines), pad)


def even_lines(rows: Sequence[Row], chosen: Sequence[int], count: int) -> list[list[int]]:
    """The chosen rows in `count` lines of about equal length: each row, the longest first, into the emptiest line."""
    lines: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(chosen, key=lambda i: -len(rows[i].student)):
        line = filled.index(min(filled))
        lines[line].append(i)
        filled[line] += len(rows[i].student)
    return lines


def line_tokens(rows: Sequence[Row], line: Sequence[int]) -> int:
    """Student tokens of a line."""
    return sum(len(rows[i].student) for i in line)


def _rounded(tokens: int) -> int:
    """Up to a multiple of SHAPE where products are in bf16 on a CPU, else of WORD."""
    to = SHAPE if torch.is_autocast_enabled("cpu") else min(SHAPE, WORD)
    return -(-tokens // to) * to


def lay(rows: Sequence[Row], lines: Sequence[Sequence[int]], starts: Sequence[int], width: int, pad: int) -> Pack:
    """Lay rows into lines of `width` tokens (rounded up), as the lists of their numbers say."""
    width = _rounded(width)
    ids = torch.full((len(lines), width), pad)
    positions = torch.zeros_like(ids)
    index: list[int] = []
    source: list[int] = []
    weight: list[float] = []
    for k, line_rows in enumerate(lines):
        at = 0
        for i in line_rows:
            row, n = rows[i], len(rows[i].student)
            ids[k, at : at + n] = torch.tensor(row.student)
            positions[k, at : at + n] = torch.arange(n)
            index += range(k * width + at + row.first - 1, k * width + at + n - 1)
            source += range(starts[i], starts[i] + row.scored)
            weight += [row.weight] * row.scored
            at += n
        # unused places are rows of one token each, so that no row attends to them
    more = _rounded(len(index)) - len(index)
    index, source = index + index[:1] * more, source + source[:1] * more
    return Pack(ids, positions, torch.tensor(index), torch.tensor(source), torch.tensor(weight + [0.0] * more))


def count_steps(rows: Sequence[Row], recipe: Recipe, rng: random.Random, epoch: int = 0) -> int:
    """How many steps the epochs from `epoch` on will take, by rng's state, which stays."""
    ahead = copy.copy(rng)
    return sum(len(epoch_steps(rows, recipe, ahead)) for _ in range(epoch, recipe.epochs))


def epoch_steps(rows: Sequence[Row], recipe: Recipe, rng: random.Random) -> list[list[int]]:
    """Rows in random order, cut into steps of equal shares: about `batch_tokens` student tokens, or more (STEPS).

    `unrelated_share` of the unrelated rows is drawn; all the others are always there.
    """
    order, unrelated = list(range(len(rows))), recipe.unrelated_share
    tokens = sum(len(r.student) * (1 if r.related else unrelated) for r in rows)
    steps_of_epoch = max(1, round(tokens / max(recipe.batch_tokens, min(recipe.most_batch_tokens, tokens / STEPS))))
    if unrelated < 1:
        others = [i for i in order if not rows[i].related]
        drawn = set(rng.sample(others, min(len(others), max(1, round(unrelated * len(others))))))
        order = [i for i in order if rows[i].related or i in drawn]
    rng.shuffle(order)
    share = sum(len(rows[i].student) for i in order) / steps_of_epoch
    steps: list[list[int]] = [[]]
    filled = 0.0
    for i in order:
        if filled >= share * len(steps) - 1e-9 and steps[-1]:
            steps.append([])
        steps[-1].append(i)
        filled += len(rows[i].student)
    return steps
