"""What holds earlier injections in place: how far the last hidden states would move along every direction of a weight.

A change D of a trained matrix moves them, over all sentences injected so far, by about tr(D C Dᵀ): C is the second
moment of what came into that matrix, each token weighted by how much the matrix's output there moves them. While
something new is learned, that is added to the loss. Of C the strongest directions are kept: a fixed size, however many
contexts there are, and no text: 𝒮 = 0.
Refuses to know training and where files lie. Sources: online Laplace with Kronecker factors (Ritter et al. 2018,
arXiv 1805.07810), with the factor of the outputs made a number for each token, and hidden states instead of labels,
whose Fisher information vanishes where a fact is known well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from selfparam.errors import InjectionError, ModelError
from selfparam.inject.memory import fits
from selfparam.inject.pairs import Row, lay
from selfparam.inject.trainable import layer_linears
from selfparam.lm import LM, Conv1D
from selfparam.types import Recipe

TOKENS = 2048  # of rows that are read together
RANK = 256  # directions of each matrix that are kept
MOST = 5.0  # times what is learned now, in scored tokens: what is held weighs no more, or nothing new could be learned
OTHER = ("the curvature of earlier injections is of another model: inject into the model that it was written with, or "
         "with --retention 0")


@dataclass(frozen=True)
class Curvature:
    """directions: {linear module of a layer: F [k, d_in]}, k at most RANK: FᵀF is C = Σ w x xᵀ over the tokens of the
    sentences injected so far, but for what lies outside of its k strongest directions.

    x: what came into the module; w: |∂(r·h)/∂y|² / d_out, y its output, h the last hidden states of the scored tokens,
    r random with variance 1. scored: how many of these there were.
    """

    directions: dict[str, torch.Tensor] = field(default_factory=dict)
    scored: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers that is."""
        return sum(f.numel() for f in self.directions.values())

    def weighing(self, scored: float) -> Curvature:
        """The same, weighing as much as so many scored tokens."""
        factor = (scored / self.scored) ** 0.5
        return Curvature({name: factor * f for name, f in self.directions.items()}, round(scored))

    def save(self, path: Path) -> None:
        """As safetensors, float32."""
        save_file({name: f.cpu().contiguous() for name, f in self.directions.items()}, path,
                  {"scored": str(self.scored)})

    @classmethod
    def load(cls, path: Path) -> Curvature:
        """Raises ModelError where there is none, or a damaged one."""
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
            return cls(load_file(path), int(said.get("scored", 0)))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(f"'{path}' cannot be read: restore it from a copy, or use --retention 0") from error


def strongest(rows: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    """F [at most rank, d] with FᵀF as near to rowsᵀ rows as that rank allows. rows: [n, d]."""
    rows = rows[rows.any(1)]
    few = len(rows) < rows.shape[1]
    if few and len(rows) <= rank:
        return rows
    # float64: in float32 it does not converge where many eigenvalues are next to nothing
    values, vectors = torch.linalg.eigh((rows @ rows.T if few else rows.T @ rows).double())
    best: torch.Tensor = vectors[:, -rank:].T.to(rows)
    return best @ rows if few else best * values[-rank:, None].clamp(min=0).sqrt().to(rows)


def measure(lm: LM, rows: Sequence[Row], seed: int = 0, before: Curvature | None = None) -> Curvature:
    """Of the rows, as the model reads them from memory (without x), and of what was measured before.

    Weights stay as they are and get no gradients. Where memory is short, fewer rows are read together; raises
    InjectionError where one alone does not fit.
    """
    before = before or Curvature()
    names = {lm.model.get_submodule(name): name for group in layer_linears(lm) for name in group}
    directions = {name: f.to(lm.device) for name, f in before.directions.items()}
    used = torch.empty(0, dtype=torch.bool)

    def forward(module: torch.nn.Module, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        name, x = names[module], given[0].detach().flatten(0, -2)[used].float()  # OPT's MLP has no lines

        def backward(gradient: torch.Tensor) -> None:
            weighted = x * gradient.flatten(0, -2)[used].float().square().mean(1, keepdim=True).sqrt()
            with torch.autocast(x.device.type, enabled=False):  # sums over many contexts need float32
                known = [directions[name]] if name in directions else []
                directions[name] = strongest(torch.cat([*known, weighted]))

        y.register_hook(backward)  # type: ignore[no-untyped-call]

    trained = [p for p in lm.model.parameters() if p.requires_grad]
    lm.model.requires_grad_(False)
    hooks = [module.register_forward_hook(forward) for module in names]
    lm.model.enable_input_require_grads()
    rng = torch.Generator().manual_seed(seed)
    order, most = sorted(range(len(rows)), key=lambda i: -len(rows[i].student)), TOKENS

    def read(part: Sequence[int]) -> None:
        nonlocal used
        lengths = torch.tensor([len(rows[i].student) for i in part])
        packed = lay(rows, [[i] for i in part], [0] * len(rows), int(lengths[0]), lm.pad).to(lm.device)
        used = (torch.arange(packed.ids.shape[1]) < lengths[:, None]).flatten().to(lm.device)
        with torch.enable_grad():
            h = lm.hidden(lm.model, input_ids=packed.ids, position_ids=packed.position_ids).flatten(0, 1)
            r = torch.randn(len(packed.index), h.shape[1], generator=rng).to(h) * (packed.weight > 0)[:, None]
            (h[packed.index] * r).sum().backward()  # type: ignore[no-untyped-call]

    try:
        while order:
            longest = len(rows[order[0]].student)
            part = order[: max(1, most // longest)]
            begun, drawn = dict(directions), rng.get_state()
            if fits(partial(read, part), last=len(part) == 1):
                order = order[len(part) :]
            else:
                directions.clear()
                directions.update(begun)
                rng.set_state(drawn)
                most = len(part) * longest // 2
    finally:
        lm.model.disable_input_require_grads()
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.requires_grad_(True)
    return Curvature(directions, before.scored + sum(r.scored for r in rows))


class Held:
    """The penalty on what is trained, λ/2 · Σ tr(D C Dᵀ), for each scored token of an epoch; less where C is of many.

    The recipe trains adapters or MLP matrices. Raises InjectionError where the curvature is of another model.
    """

    def __init__(self, model: Any, curvature: Curvature, recipe: Recipe) -> None:
        self.recipe, self.scored = recipe, curvature.scored
        named = {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}
        if not set(curvature.directions) <= set(named):
            raise InjectionError(OTHER)
        self.device = next(model.parameters()).device
        self.layers = [(named[name], f.to(self.device)) for name, f in curvature.directions.items()
                       if _is_trained(named[name])]
        if any(_inputs(module) != f.shape[-1] for module, f in self.layers):
            raise InjectionError(OTHER)
        self.start = [m.weight.detach().clone() for m, _ in self.layers] if recipe.train == "mlp" else []

    @torch.no_grad()
    def add_gradients(self, scored: float) -> None:
        """Add the penalty's gradients. scored: tokens of an epoch."""
        with torch.autocast(self.device.type, enabled=False):
            self._add_gradients(self.recipe.retention / max(scored, self.scored / MOST))

    def _add_gradients(self, factor: float) -> None:
        for k, (module, f) in enumerate(self.layers):
            if self.recipe.train == "mlp":
                change = (module.weight - self.start[k]).float()
                _add(module.weight, factor * (f.T @ (f @ change) if isinstance(module, Conv1D) else change @ f.T @ f))
                continue
            a, b = (part["default"].weight for part in (module.lora_A, module.lora_B))
            scale = factor * module.scaling["default"] ** 2
            low = a.float() @ f.T @ f
            _add(a, scale * (b.float().T @ b.float()) @ low)
            _add(b, scale * b.float() @ (low @ a.float().T))


def _add(p: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    p.grad = gradient.to(p) if p.grad is None else p.grad.add_(gradient.to(p))


def _is_trained(module: Any) -> bool:
    return hasattr(module, "lora_A") or module.weight.requires_grad


def _inputs(module: Any) -> int:
    """d_in of a linear module, or of the one that an adapter is on."""
    plain = getattr(module, "base_layer", module)
    return int(plain.weight.shape[0 if isinstance(plain, Conv1D) else 1])
