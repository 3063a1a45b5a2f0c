"""The training loop: packed student rows against the teacher's kept states, until θ' needs no x.

Deterministic under the recipe's seed. Refuses to know files and contexts. Source: arXiv 2410.00487, Eq. 2 and A.2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from selfparam.errors import InjectionError
from selfparam.inject.checkpoint import Checkpoints, Position
from selfparam.inject.curvature import Held
from selfparam.inject.memory import Micro
from selfparam.inject.objective import Target, loss_of, loss_of_tokens
from selfparam.inject.pairs import Pack, Row, count_steps, epoch_steps, offsets, pack
from selfparam.inject.sharded import is_sharded
from selfparam.inject.teacher import head_of
from selfparam.inject.trainable import apply, make_optimizers
from selfparam.lm import LM
from selfparam.types import Recipe

LINE_TOKENS = 128  # packed lines are at least this long: attention masks grow with its square
#: (epoch, epochs, loss in nats per token) after every epoch
EpochProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Trained:
    """What the loop reports: nats per token of every epoch, optimiser steps, student tokens seen.

    held_out: nats per token of the sentences that were not trained on, after every epoch (empty without them).
    """

    losses: tuple[float, ...]
    steps: int
    tokens: int
    held_out: tuple[float, ...] = ()


def factor(step: int, steps: int, recipe: Recipe) -> float:
    """Learning-rate factor in [0, 1] at a step: linear warm-up, then the recipe's schedule."""
    warm = recipe.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    done = min(1.0, (step - warm) / max(1.0, steps - warm))
    if recipe.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1.0


def divided(rows: Sequence[Row], recipe: Recipe) -> tuple[list[int], list[int]]:
    """Which rows are trained on and which are held out: a random share of the related ones, never all of them."""
    related = [i for i, row in enumerate(rows) if row.related]
    count = min(len(related) - 1, math.ceil(recipe.held_out * len(related)))
    out = set(random.Random(recipe.seed).sample(related, count)) if count > 0 else set()
    return [i for i in range(len(rows)) if i not in out], sorted(out)


def done_early(held_out: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` epochs brought nothing lower than what was there before them."""
    return len(held_out) > patience and min(held_out[-patience:]) >= min(held_out[:-patience])


def line_width(lm: LM, rows: Sequence[Row]) -> int:
    """Tokens of a packed line. Flash attention tells packed rows apart only in a batch of one: there all go into one.

    Masks that are spelled out grow with the square of a line, so lines are short elsewhere.
    """
    sizes = [len(r.student) for r in rows]
    flash = "flash" in (lm.text_config._attn_implementation or "")
    return sum(sizes) if flash else max(LINE_TOKENS, *sizes)


@dataclass
class _Student:
    """What is trained, and its rows and their targets. Only this process's share of the rows is run here."""

    lm: LM
    model: Any
    rows: Sequence[Row]
    targets: Target
    accelerator: Accelerator | None

    def __post_init__(self) -> None:
        head = head_of(self.lm)
        self.head = head if head.weight.requires_grad else head.frozen(copy=False)
        self.starts, self.micro = offsets(self.rows), Micro(self.lm.model)
        self.width, self.sharded = line_width(self.lm, self.rows), is_sharded(self.model)

    def learn(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Add the gradient of the mean loss (weighted) of the chosen rows; that loss in nats per token, its weight."""
        total = sum(self.rows[i].weight * self.rows[i].scored for i in chosen)
        losses: list[float] = []

        def one(packed: Pack, h: torch.Tensor) -> None:
            loss = loss_of(h, self.head, self.targets.at(packed.source), packed.weight / total)
            with torch.autocast(h.device.type, enabled=False):  # hooks on gradients (OSF) return them in their own type
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))

        def undo() -> None:
            losses.clear()
            self.model.zero_grad(set_to_none=True)

        self._run(chosen, one, undo)
        if self.accelerator:
            for p in self.model.parameters():
                if p.requires_grad and not isinstance(p, DTensor):  # those are summed in the backward pass
                    p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        return self._sum(losses), total

    @torch.no_grad()
    def measure(self, chosen: Sequence[int]) -> float:
        """Mean loss of the chosen rows in nats per token, without dropout."""
        losses: list[float] = []

        def one(packed: Pack, h: torch.Tensor) -> None:
            found = loss_of_tokens(h, self.head, self.targets.at(packed.source))
            losses.append(float(found[packed.weight > 0].sum()))

        self.model.eval()
        self._run(chosen, one, losses.clear)
        self.model.train()
        return self._sum(losses) / sum(self.rows[i].scored for i in chosen)

    def _run(self, chosen: Sequence[int], one: Callable[[Pack, torch.Tensor], None], undo: Callable[[], None]) -> None:
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes] if self.accelerator else chosen

        def part_of(part: slice) -> None:
            packed = pack(self.rows, mine[part] or chosen[:1], self.starts, self.width, self.lm.pad, self.lm.apart
                          ).to(self.lm.device)
            states = LM.hidden(self.model, input_ids=packed.ids, position_ids=packed.position_ids)
            if not mine:  # only there to gather the layers with the others
                packed = replace(packed, index=packed.index[:0], source=packed.source[:0], weight=packed.weight[:0])
            one(packed, states.flatten(0, 1)[packed.index])

        if self.sharded:  # all processes run at once, or they would wait for each other
            self.micro.at_once(lambda: part_of(slice(len(mine))))
        elif mine:
            self.micro.run([len(self.rows[i].student) for i in mine], part_of, undo)

    def _sum(self, losses: Sequence[float]) -> float:
        total = float(sum(losses))
        return float(self.accelerator.reduce(torch.tensor(total, device=self.lm.device), "sum")
                     ) if self.accelerator else total


def check_finite(value: float, norm: float, epoch: int, recipe: Recipe) -> None:
    """InjectionError where the loss or the norm of its gradient is not finite."""
    for what, size in (("loss", value), ("norm of the gradient", norm)):
        if not math.isfinite(size):
            raise InjectionError(
                f"the {what} became {size} in epoch {epoch + 1}: use a smaller learning rate (now {recipe.lr:g})"
            )


def scored_in_epoch(rows: Sequence[Row], recipe: Recipe) -> float:
    """Scored tokens of one epoch on the rows."""
    return sum(r.scored * (1 if r.related else recipe.unrelated_share) for r in rows)


def train(
    lm: LM,
    model: Any,
    rows: Sequence[Row],
    targets: Target,
    recipe: Recipe,
    progress: EpochProgress | None = None,
    checkpoints: Checkpoints | None = None,
    accelerator: Accelerator | None = None,
    held: Held | None = None,
) -> Trained:
    """Train `model` (lm.model or its peft wrapper) in place.

    targets: of all scored tokens, in the order of the rows. checkpoints: where to save and continue; without it nothing
    is written. accelerator: its processes share the rows of every step; losses and weights are those of one process.
    held: what earlier injections taught, as a penalty, which the losses do not count.
    Raises InjectionError when a loss is not finite, StoppedError when `checkpoints` was told to stop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(parameters, recipe)
    rng, student = random.Random(recipe.seed), _Student(lm, model, rows, targets, accelerator)
    learned, held_out = divided(rows, recipe)
    in_epoch = [rows[i] for i in learned]
    scored = scored_in_epoch(in_epoch, recipe)
    at = checkpoints.begin(parameters, optimizers, rng) if checkpoints else Position()
    steps = at.step - at.place + count_steps(in_epoch, recipe, rng, at.epoch)
    model.train()
    for epoch in range(at.epoch, recipe.epochs):
        at.begin_epoch(epoch, rng)
        for places in epoch_steps(in_epoch, recipe, rng)[at.place :]:
            chosen = [learned[i] for i in places]
            value, weight = student.learn(chosen)
            if held:
                held.add_gradients(scored)
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            check_finite(value, float(norm), epoch, recipe)
            apply(optimizers, recipe.lr * factor(at.step, steps, recipe))
            at.place += 1
            at.step += 1
            at.tokens += sum(len(rows[i].student) for i in chosen)
            at.total += value * weight
            at.scored += weight
            if checkpoints:
                checkpoints.after_step(at, last=at.step == steps)
        loss_of_epoch = at.end_epoch()
        if held_out:
            at.held_out.append(student.measure(held_out))
        if progress:
            progress(epoch + 1, recipe.epochs, loss_of_epoch)
        if done_early(at.held_out, recipe.patience):
            break
    if checkpoints:
        checkpoints.end()
    student.micro.end()
    model.eval()
    return Trained(tuple(at.losses), at.step, at.tokens, tuple(at.held_out))
