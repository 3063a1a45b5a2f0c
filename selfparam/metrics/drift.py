"""Drift: how far θ' has moved from θ on sentences unrelated to what was injected, in nats per token.

Mean over tokens of KL(P_θ ‖ P_θ') on held-out unrelated sentences. Refuses to know training; the model is whatever
has prefix(), sentence() and .model (selfparam.lm.LM). Source: the retention half of Eq. 2, arXiv 2410.00487.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from selfparam.types import Sentence


class Speaks(Protocol):
    model: Any

    def prefix(self, context: str | None = None, plain: bool = False) -> list[int]: ...

    def sentence(self, s: Sentence) -> tuple[list[int], int]: ...


@dataclass(frozen=True)
class Reference:
    """What θ says: for every sentence its row of ids and log-probabilities [T, V] of the scored tokens (float32)."""

    rows: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    log_probs: tuple[torch.Tensor, ...]


@torch.no_grad()
def _log_probs(lm: Speaks, row: Sequence[int], first: int) -> torch.Tensor:
    ids = torch.tensor([list(row)], device=next(iter(lm.model.parameters())).device)
    return F.log_softmax(lm.model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].float(), dim=-1).cpu()


def reference(lm: Speaks, sentences: Sequence[Sentence]) -> Reference:
    """Record θ on the sentences, before anything is trained."""
    rows, first = [], []
    for s in sentences:
        head = lm.prefix(None, plain=not s.prompt)
        rows.append((*head, *lm.sentence(s)[0]))
        first.append(len(head))
    return Reference(tuple(rows), tuple(first), tuple(_log_probs(lm, r, f) for r, f in zip(rows, first, strict=True)))


def drift(before: Reference, lm: Speaks) -> float:
    """Mean KL(P_θ ‖ P_θ') in nats per token over the reference's sentences; 0 when nothing changed."""
    total, tokens = 0.0, 0
    for row, first, log_p in zip(before.rows, before.first, before.log_probs, strict=True):
        log_q = _log_probs(lm, row, first)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        tokens += len(log_p)
    return total / tokens if tokens else 0.0
