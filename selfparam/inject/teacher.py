"""The teacher pass: θ reads x once, scores all its sentences on that cache, and its last hidden states are kept.

All of it happens before the first training step, from the very weights that are then trained: one copy of the model.
Kept per scored token: the last hidden state (d values); logits are recomputed through the frozen head, so the KL is the
exact one over the whole vocabulary. Refuses to know the loss. Source: Eq. 2 of arXiv 2410.00487, P_θ(s|x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from selfparam.errors import ModelError
from selfparam.inject.objective import Head
from selfparam.inject.pairs import Row, offsets
from selfparam.lm import LM

SENTENCE_TOKENS = 8192  # tokens of sentences scored together on one prefix


def head_of(lm: LM) -> Head:
    """The output head of the model."""
    linear = lm.model.get_output_embeddings()
    return Head(linear.weight, getattr(linear, "bias", None), lm.softcap)


@torch.no_grad()
def check_head(lm: LM) -> None:
    """ModelError when head(last hidden state) is not what the model itself returns as logits."""
    ids = torch.tensor([lm.bos * 4], device=lm.device)
    expected = lm.model(input_ids=ids, use_cache=False).logits[0].float()
    got = head_of(lm).logits(lm.hidden(lm.model, input_ids=ids)[0])
    if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max() + 1e-6)):
        raise ModelError(
            f"the logits of '{lm.name}' are more than a linear head on its last hidden states: not supported"
        )


@torch.no_grad()
def teacher_states(
    lm: LM, rows: Sequence[Row], prefixes: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Last hidden states [Σ scored, d] that predict the scored tokens of every row, in the order of the rows."""
    starts = offsets(rows)
    total = starts[-1] + rows[-1].scored
    kept = torch.empty(total, lm.model.get_output_embeddings().weight.shape[1], dtype=torch.float32)
    kept = kept.to(lm.device, torch.bfloat16 if torch.is_autocast_enabled(lm.device.type) else lm.model.dtype)
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prefix, []).append(i)
    done = 0
    for prefix, members in groups.items():
        members.sort(key=lambda i: len(rows[i].s))
        for part in _parts(members, rows, len(prefixes[prefix])):
            first = [len(rows[i].s) - rows[i].scored for i in part]
            states = _on_prefix(lm, list(prefixes[prefix]), [rows[i].s for i in part])
            for state, i, begin in zip(states, part, first, strict=True):
                kept[starts[i] : starts[i] + rows[i].scored] = state[begin : len(rows[i].s)].to(kept.dtype)
        done += len(members)
        if progress:
            progress(done, len(rows))
    return kept


def _parts(members: list[int], rows: Sequence[Row], prefix: int) -> list[list[int]]:
    """Members in groups of about equal length; all share the prefix's cache."""
    parts: list[list[int]] = [[]]
    for i in members:
        if parts[-1] and (len(parts[-1]) + 1) * (len(rows[i].s) + prefix // 4) > SENTENCE_TOKENS:
            parts.append([])
        parts[-1].append(i)
    return parts


def _on_prefix(lm: LM, prefix: list[int], sentences: list[tuple[int, ...]]) -> torch.Tensor:
    """States [B, T, d]: place t predicts token t of the sentence (place 0 is the prefix's last token)."""
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    width = max(len(s) for s in sentences)
    # the last token of the prefix goes with every sentence: its output predicts the sentence's first token
    rows = torch.full((len(sentences), width), pad)
    rows[:, 0] = prefix[-1]
    for i, s in enumerate(sentences):
        rows[i, 1 : len(s)] = torch.tensor(s[:-1], dtype=torch.long)
    rows = rows.to(lm.device)
    cache = lm.prefix_cache(prefix[:-1], len(sentences)) if len(prefix) > 1 else None
    positions = torch.arange(len(prefix) - 1, len(prefix) - 1 + width, device=lm.device)[None].expand(
        len(sentences), -1
    )
    return lm.hidden(lm.model, input_ids=rows, position_ids=positions, past_key_values=cache)
