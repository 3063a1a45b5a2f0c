"""The training loop: packed student rows against the teacher's kept states, until θ' needs no x.

Deterministic under the recipe's seed. Refuses to know files and contexts. Source: arXiv 2410.00487, Eq. 2 and A.2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selfparam.errors import InjectionError
from selfparam.inject.checkpoint import Checkpoints, Position
from selfparam.inject.objective import Head, kl, next_word
from selfparam.inject.pairs import Pack, Row, epoch_steps, offsets, pack
from selfparam.inject.teacher import head_of
from selfparam.inject.trainable import apply, make_optimizers
from selfparam.lm import LM
from selfparam.types import Recipe

LINE_TOKENS = 128  # packed lines are at least this long: attention masks grow with its square
#: (epoch, epochs, loss in nats per token) after every epoch
EpochProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Trained:
    """What the loop reports: nats per token of every epoch, optimiser steps, student tokens seen."""

    losses: tuple[float, ...]
    steps: int
    tokens: int


def factor(step: int, steps: int, recipe: Recipe) -> float:
    """Learning-rate factor in [0, 1] at a step: linear warm-up, then the recipe's schedule."""
    warm = recipe.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, steps - warm)
    if recipe.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1.0


def step_loss(
    model: Any, head: Head, packed: Pack, targets: torch.Tensor, teacher: Head | None
) -> torch.Tensor:
    """Mean loss of one packed step in nats per scored token (weighted)."""
    states = LM.hidden(model, input_ids=packed.ids, position_ids=packed.position_ids)
    return loss_of(states.flatten(0, 1)[packed.index], head, packed, targets, teacher)


def loss_of(
    h: torch.Tensor, head: Head, packed: Pack, targets: torch.Tensor, teacher: Head | None
) -> torch.Tensor:
    """Mean loss (weighted) in nats per scored token of a pack, whose states h [N, d] predict these tokens."""
    w = packed.weight / packed.weight.sum()
    if teacher is None:
        return next_word(h, head, targets[packed.source], w)
    return kl(h, head, targets[packed.source], teacher, w)


def check_finite(value: float, norm: float, epoch: int, recipe: Recipe) -> None:
    """InjectionError where the loss or the norm of its gradient is not finite."""
    if not math.isfinite(value) or not math.isfinite(norm):
        raise InjectionError(
            f"the loss became {value} in epoch {epoch + 1}: use a smaller learning rate (now {recipe.lr:g})"
        )


def train(
    lm: LM,
    model: Any,
    rows: Sequence[Row],
    targets: torch.Tensor,
    teacher: Head | None,
    recipe: Recipe,
    progress: EpochProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train `model` (lm.model or its peft wrapper) in place.

    targets: teacher states [Σ scored, d] for the KL, or token ids [Σ scored] for next-word prediction.
    checkpoints: where to save and continue; without it nothing is written.
    Raises InjectionError when a loss is not finite, StoppedError when `checkpoints` was told to stop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(parameters, recipe)
    head = head_of(lm)
    head = head if head.weight.requires_grad else head.frozen(copy=False)
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    rng, starts = random.Random(recipe.seed), offsets(rows)
    width = max(len(r.student) for r in rows)
    per_epoch = len(epoch_steps(rows, recipe.batch_tokens, random.Random(0)))
    at = checkpoints.begin(parameters, optimizers, rng) if checkpoints else Position()
    model.train()
    for epoch in range(at.epoch, recipe.epochs):
        at.begin_epoch(epoch, rng)
        for chosen in epoch_steps(rows, recipe.batch_tokens, rng)[at.place :]:
            packed = pack(rows, chosen, starts, max(width, LINE_TOKENS), pad).to(lm.device)
            loss = step_loss(model, head, packed, targets, teacher)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            value = float(loss.detach())
            check_finite(value, float(norm), epoch, recipe)
            apply(optimizers, recipe.lr * factor(at.step, per_epoch * recipe.epochs, recipe))
            at.place += 1
            at.step += 1
            at.tokens += sum(len(rows[i].student) for i in chosen)
            at.total += value * float(packed.weight.sum())
            at.scored += float(packed.weight.sum())
            if checkpoints:
                checkpoints.after_step(at, last=at.step == per_epoch * recipe.epochs)
        loss_of_epoch = at.end_epoch()
        if progress:
            progress(epoch + 1, recipe.epochs, loss_of_epoch)
        if loss_of_epoch < recipe.stop_below:
            break
    if checkpoints:
        checkpoints.end()
    model.eval()
    return Trained(tuple(at.losses), at.step, at.tokens)
