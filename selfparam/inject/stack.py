"""inject_each(θ, [ℰ_1 … ℰ_n], recipe) -> θ'_1 … θ'_n: independent injections, trained together, each into its own θ'.

One frozen base carries a stack of LoRA adapters. Every packed line belongs to one context, so the adapters of a layer
are two batched matrix products over [K, tokens of a context, d]. Rows, their order, the loss's mean, clipping, learning
rate, optimiser state and early stop are each context's own: the results are those of `inject` one by one, to float
tolerance. Refuses to know what contexts have to do with one another: nothing.
Source: arXiv 2410.00487, section 4.1 (one model for each context); ours.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from selfparam.errors import InjectionError, ModelError
from selfparam.inject import Injection, inject, merge, next_words, precision
from selfparam.inject.checkpoint import Position
from selfparam.inject.loop import Trained, check_finite, factor
from selfparam.inject.memory import Kept, fits
from selfparam.inject.objective import Head, Target, Words, loss_of
from selfparam.inject.pairs import (
    Pack,
    Row,
    build_rows,
    count_steps,
    epoch_steps,
    even_lines,
    lay,
    line_tokens,
    offsets,
)
from selfparam.inject.teacher import as_target, check_model, head_of, teacher_targets
from selfparam.inject.trainable import apply, experts, lean, make_optimizers, make_trainable
from selfparam.lm import LM
from selfparam.types import Recipe, TargetSet

STACK = 8  # contexts trained together; memory for adapters, optimiser and activations grows with it
LINE_TOKENS = 256  # packed lines are about this long: attention masks grow with its square


def refusal(recipe: Recipe) -> str:
    """Why a stack could not give what the contexts give one by one, or "" where it does."""
    if recipe.train != "lora":
        return f"train = '{recipe.train}' changes the weights that a stack shares: use 'lora', or inject one by one"
    if recipe.known and recipe.retention:
        return "what the model knew is held in one injection at a time: use known = 0, or inject one by one"
    if recipe.held_out:
        return "an early stop is decided on each context's own held-out pairs: use held_out = 0, or inject one by one"
    if recipe.lora_dropout:
        return "with dropout a context would depend on the others in its stack: use none, or inject one by one"
    return ""


def inject_each(lm: LM, target_sets: Sequence[TargetSet], recipe: Recipe, *, stack: int = STACK) -> Iterator[Injection]:
    """Write every target set into a θ' of its own; the same as [inject(lm, [one], recipe) for one in target_sets].

    `stack` of them are trained at a time, when the first of them is asked for. Merged weights, a whole model each, are
    made as they are asked for: keep what you need. A model that has experts or drops out by itself (GPT-2) goes one by
    one. seconds_* of an Injection are its share of the stack's.
    No curvature is measured: nothing follows. Raises InjectionError (a recipe that cannot be stacked, a stack that is
    below 1 or does not fit the memory, and as `inject`), ModelError and
    VerificationError as `inject`; one context that fails ends its whole stack.
    """
    if said := refusal(recipe):
        raise InjectionError(said)
    if stack < 1:
        raise InjectionError(f"a stack of {stack} holds no context: use at least 1")
    if experts(lm) or any(isinstance(m, torch.nn.Dropout) and m.p for m in lm.model.modules()):
        for one in target_sets:
            yield inject(lm, [one], recipe)
        return
    check_model(lm, recipe)
    for at in range(0, len(target_sets), stack):
        pupils = [_Pupil(*build_rows(lm, [one], recipe), recipe) for one in target_sets[at : at + stack]]
        seconds: list[float] = []
        fits(partial(_train, lm, pupils, recipe, seconds), last=True,
             advice=f"a stack of {len(pupils)} contexts does not fit the memory: use a smaller one, or go one by one")
        for pupil in pupils:
            yield _injection(lm, pupil, recipe, seconds[0] / len(pupils), seconds[1] / len(pupils))


@dataclass
class _Pupil:
    """One context in a stack: its rows and targets, where it stands, and its adapter once it is trained."""

    rows: list[Row]
    prefixes: list[list[int]]
    recipe: Recipe
    at: Position = field(default_factory=Position)
    targets: Target = field(default_factory=lambda: Words(torch.empty(0, dtype=torch.long)))
    adapter: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = offsets(self.rows)
        self.steps = count_steps(self.rows, self.recipe, random.Random(self.recipe.seed))
        self.course = self._course()

    def _course(self) -> Iterator[list[int]]:
        """The rows of every step, as an injection alone has them."""
        rng = random.Random(self.recipe.seed)
        for epoch in range(self.recipe.epochs):
            self.at.begin_epoch(epoch, rng)
            yield from self._epoch(rng)
            self.at.end_epoch()

    def _epoch(self, rng: random.Random) -> list[list[int]]:
        return epoch_steps(self.rows, self.recipe, rng)

    def did(self, chosen: Sequence[int], loss: float) -> None:
        """Count a step."""
        weight = sum(self.rows[i].weight * self.rows[i].scored for i in chosen)
        self.at.step += 1
        self.at.tokens += line_tokens(self.rows, chosen)
        self.at.total += loss * weight
        self.at.scored += weight


class _Linear(torch.nn.Module):
    """A frozen linear module with K adapters: y = W x + b + s · B_k A_k x on the lines of adapter k.

    a [K, r, in], b [K, out, r]. x [K · lines, T, in]: the lines of adapter 0, of adapter 1, …
    """

    def __init__(self, layer: Any, count: int) -> None:
        super().__init__()
        self.base, self.scaling = layer.get_base_layer(), layer.scaling["default"]
        self.a, self.b = (torch.nn.Parameter(w.detach().repeat(count, 1, 1)) for w in weights_of(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = len(self.a)
        if x.ndim != 3 or len(x) % k:
            raise ModelError("this model does not keep the tokens of a line together: inject one by one")
        y = self.base(x)
        kind = y.dtype if torch.is_autocast_enabled(x.device.type) else self.a.dtype
        low = torch.bmm(x.reshape(k, -1, x.shape[-1]).to(kind), self.a.mT)
        wide = y.reshape(k, -1, y.shape[-1]).to(kind)
        return torch.baddbmm(wide, low, self.b.mT, alpha=self.scaling).reshape(y.shape).to(y.dtype)


class _Adapters:
    """K adapters in the layers of a peft model, which have one; all begin like that one.

    Each has the optimisers that it would have alone, on views of the layers' [K, …] matrices.
    """

    def __init__(self, model: Any, count: int, recipe: Recipe) -> None:
        self.layers = []
        for name, layer in lora_layers(model):
            parent, _, last = name.rpartition(".")
            self.layers.append(_Linear(layer, count))
            setattr(model.get_submodule(parent), last, self.layers[-1])
        self.own = [[torch.nn.Parameter(w[k]) for w in self._together()] for k in range(count)]
        self.optimizers = [make_optimizers(own, recipe) for own in self.own]

    def _together(self) -> list[torch.Tensor]:
        return [w.data for layer in self.layers for w in (layer.a, layer.b)]

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with these adapters only; they are numbered anew."""
        for layer in self.layers:
            layer.a, layer.b = (torch.nn.Parameter(w.data[list(chosen)]) for w in (layer.a, layer.b))
        self.own, self.optimizers = [self.own[i] for i in chosen], [self.optimizers[i] for i in chosen]
        for k, own in enumerate(self.own):
            for one, w in zip(own, self._together(), strict=True):
                one.data = w[k]

    def step(self, lrs: Sequence[float], clip: float) -> list[float]:
        """Clip and apply the gradients of each adapter by itself, and clear them. The norms before clipping."""
        norms = []
        for k, (lr, own, optimizers) in enumerate(zip(lrs, self.own, self.optimizers, strict=True)):
            for one, w in zip(own, (w for layer in self.layers for w in (layer.a, layer.b)), strict=True):
                one.grad = None if w.grad is None else w.grad[k]
            norms.append(float(torch.nn.utils.clip_grad_norm_(own, clip)))
            apply(optimizers, lr)
        for layer in self.layers:
            layer.a.grad = layer.b.grad = None
        return norms


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """The LoRA modules of a peft model by their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def weights_of(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A [r, in] and B [out, r] of a LoRA module."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _train(lm: LM, pupils: Sequence[_Pupil], recipe: Recipe, seconds: list[float]) -> None:
    """Fill in the pupils' targets, train them, and keep their adapters; seconds of the teacher and of the training."""
    base = replace(lm, model=copy.deepcopy(lm.model))
    cuda = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), precision(base, recipe):
        torch.manual_seed(recipe.seed)
        begin = time.perf_counter()
        kl = recipe.objective == "kl"
        for one in pupils:
            one.targets = _teacher(base, one, recipe) if kl else next_words(base, one.rows)
        taught = time.perf_counter()
        head = head_of(base).frozen(copy=False)
        model = make_trainable(base, recipe)
        adapters = _Adapters(model, len(pupils), recipe)
        model.train()
        with lean(model, LINE_TOKENS):
            _run(base, model, adapters, pupils, head)
        seconds += [taught - begin, time.perf_counter() - taught]


def _teacher(lm: LM, pupil: _Pupil, recipe: Recipe) -> Target:
    """The teacher's targets of one context, in memory."""
    with Kept(lm.device, budget=sys.maxsize) as kept:
        return as_target(teacher_targets(lm, pupil.rows, pupil.prefixes, kept, recipe.top_k), head_of(lm))


def _run(lm: LM, model: Any, adapters: _Adapters, pupils: Sequence[_Pupil], head: Head) -> None:
    """All steps of all pupils. Who is done leaves the stack."""
    active = list(pupils)
    while active:
        steps = [next(one.course, None) for one in active]
        going = [i for i, step in enumerate(steps) if step is not None]
        if len(going) < len(active):
            for i in set(range(len(active))) - set(going):
                active[i].adapter = [w.detach().clone() for w in adapters.own[i]]
            active = [active[i] for i in going]
            adapters.keep(going)
        if active:
            _step(lm, model, adapters, active, [step for step in steps if step is not None], head)


def _step(lm: LM, model: Any, adapters: _Adapters, pupils: Sequence[_Pupil], steps: Sequence[list[int]], head: Head
          ) -> None:
    """One step of every pupil. Raises InjectionError where a loss is not finite."""
    packs = _packs(lm, pupils, steps)
    ids, positions = torch.cat([p.ids for p in packs]), torch.cat([p.position_ids for p in packs])
    states = LM.hidden(model, input_ids=ids, position_ids=positions).flatten(0, 1)
    size = packs[0].ids.numel()
    index = torch.cat([p.index + i * size for i, p in enumerate(packs)])
    parts = torch.split(states[index], [len(p.index) for p in packs])
    losses = torch.stack([loss_of(h, head, one.targets.at(packed.source), packed.weight / packed.weight.sum())
                          for h, packed, one in zip(parts, packs, pupils, strict=True)])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    recipe = pupils[0].recipe
    norms = adapters.step([recipe.lr * factor(one.at.step, one.steps, recipe) for one in pupils], recipe.clip)
    for one, chosen, loss, norm in zip(pupils, steps, losses.tolist(), norms, strict=True):
        check_finite(loss, norm, one.at.epoch, recipe)
        one.did(chosen, loss)


def _packs(lm: LM, pupils: Sequence[_Pupil], steps: Sequence[list[int]]) -> list[Pack]:
    """A pack of each pupil's rows, all of the same shape."""
    if lm.apart:
        count = max(len(chosen) for chosen in steps)
        lines = [[*([i] for i in chosen), *([] for _ in range(count - len(chosen)))] for chosen in steps]
    else:
        tokens = max(line_tokens(one.rows, chosen) for one, chosen in zip(pupils, steps, strict=True))
        count = max(1, tokens // LINE_TOKENS)
        lines = [even_lines(one.rows, chosen, count) for one, chosen in zip(pupils, steps, strict=True)]
    width = max(line_tokens(one.rows, line) for one, each in zip(pupils, lines, strict=True) for line in each)
    return [lay(one.rows, each, one.starts, width, lm.pad).to(lm.device)
            for one, each in zip(pupils, lines, strict=True)]


@torch.no_grad()
def _injection(lm: LM, pupil: _Pupil, recipe: Recipe, taught: float, trained: float) -> Injection:
    """The pupil's θ': its adapter in a model of its own, merged and compared as any other."""
    student = replace(lm, model=copy.deepcopy(lm.model))
    model = make_trainable(student, recipe)
    weights = [w for _, layer in lora_layers(model) for w in weights_of(layer)]
    for own, w in zip(weights, pupil.adapter, strict=True):
        own.copy_(w)
    model.eval()
    merge_error = merge(student, model, pupil.rows)
    student.model.requires_grad_(True)
    student.model.eval()
    done = Trained(tuple(pupil.at.losses), pupil.at.step, pupil.at.tokens)
    return Injection(student, done, len(pupil.rows), taught, trained, merge_error)
