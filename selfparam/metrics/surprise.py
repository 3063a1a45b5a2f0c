"""Surprise: how strange a text is to a model, in nats per UTF-8 byte. Random characters cost at least ln(their number).

Per byte and not per token, so that models and scripts compare. Refuses to know training; the model is whatever has
bos, encode() and .model (selfparam.lm.LM). Source: cross-entropy, Shannon 1948.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional as F

TOKENS = 1024  # tokens of a text that are read at most


class Reads(Protocol):
    model: Any

    @property
    def bos(self) -> list[int]: ...

    @property
    def window(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@torch.no_grad()
def surprise(lm: Reads, text: str) -> float:
    """−Σ log P_θ(token | tokens before) / bytes, over the beginning of the text (as much as fits the window)."""
    ids = lm.encode(text)[: min(TOKENS, lm.window - 1)]
    size = len(lm.decode(ids).encode())
    if not ids or not size:
        return 0.0
    row = torch.tensor([[*lm.bos, *ids]], device=next(iter(lm.model.parameters())).device)
    logits = lm.model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return float(F.cross_entropy(logits, row[0, 1:], reduction="sum")) / size
