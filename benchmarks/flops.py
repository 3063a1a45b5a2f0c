"""What an injection has to compute, and what the machine can: FLOPs of the method, FLOP/s of a large matrix product.

Counted are the products with weight matrices, as the method needs them at least: x once for all its sentences, each
sentence once an epoch, no padding. Left out: attention's own products (short rows), norms, the optimiser. A row of the
benchmark that computes more than that gets no credit for it, so utilisations compare like seconds do.
Refuses to know how anything is computed. Source: 2 FLOPs for each weight and token, forward; the same for the gradient
by activations and, where the weight is trained, by weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from selfparam.inject.pairs import Row
from selfparam.inject.trainable import layer_linears
from selfparam.lm import LINEAR, LM
from selfparam.types import Recipe


def ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 2.0, size: int = 0) -> float:
    """FLOP/s of the best of many square matrix products (0: 8192 on a GPU, 1024 on a CPU)."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * n**3 / best


def needed(lm: LM, rows: Sequence[Row], prefixes: Sequence[Sequence[int]], recipe: Recipe) -> tuple[float, float]:
    """FLOPs of the teacher pass and of one epoch, at least."""
    head = lm.model.get_output_embeddings().weight
    matrices = {n: m for n, m in lm.model.named_modules() if isinstance(m, LINEAR) and m.weight is not head}
    frozen = sum(m.weight.numel() for m in matrices.values())
    attention, mlp = layer_linears(lm)
    trained = {"lora": 0, "mlp": sum(matrices[n].weight.numel() for n in mlp), "full": frozen}[recipe.train]
    adapters = sum(recipe.lora_rank * sum(matrices[n].weight.shape) for n in (*attention, *mlp))
    student = sum(len(r.student) for r in rows)
    scored = sum(r.scored for r in rows)
    read = sum(len(prefixes[i]) for i in {r.prefix for r in rows}) + sum(len(r.s) for r in rows)
    layers = student * (4 * frozen + 2 * trained + (6 * adapters if recipe.train == "lora" else 0))
    logits = 2 * scored * head.numel()
    times = 2 + (recipe.objective == "kl" and not recipe.top_k) + (recipe.train == "full")
    return 2 * read * frozen + (logits if recipe.top_k else 0), layers + times * logits
