"""The teacher pass: θ reads x once, scores all its sentences on that cache, and what the loss needs of them is kept.

All of it happens before the first training step, from the very weights that are then trained: one copy of the model.
Kept per scored token: the last hidden state (d values; logits are recomputed through the frozen head, so the KL is the
exact one over the whole vocabulary), or the k likeliest tokens and the mass of the rest. Refuses to know where it is
kept and how it is trained on. Source: Eq. 2 of arXiv 2410.00487, P_θ(s|x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from selfparam.errors import ModelError
from selfparam.inject.memory import Kept, Tensors, fits
from selfparam.inject.objective import CHUNK, Compact, Exact, Head, Target
from selfparam.inject.pairs import Row, offsets
from selfparam.inject.sharded import is_sharded
from selfparam.lm import LM

SENTENCE_TOKENS = 8192  # tokens of sentences scored together on one prefix
CPU_SENTENCE_TOKENS = 2048  # more is no faster there, and takes more memory


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
def check_rows(lm: LM) -> None:
    """ModelError where a row's states depend on what is packed beside it, or differ on the cache of its prefix."""
    one, two = ([*lm.bos, *lm.encode(text)[:8]] for text in ("The red lamp stands on the hill.", "Who sails at night?"))
    training = lm.model.training
    lm.model.eval()
    try:
        found = [_states(lm, [*one, *two], [*range(len(one)), *range(len(two))])[len(one) :],
                 _on_prefix(lm, one, lm.prefix_cache(one[:-1]), [(*two, *lm.bos)])[0, 1:]]
        wanted = [_states(lm, two), _states(lm, [*one, *two])[len(one) :]]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"'{lm.name}' cannot read packed rows or go on from a cache of keys and values "
                         f"({type(error).__name__}): not supported, use a plain transformer") from error
    finally:
        lm.model.train(training)
    limit = 1e-3 if lm.model.dtype == torch.float32 else 0.1  # rounding in 16 bits adds up over the layers
    if any(not float((a - b).norm() / b.norm()) <= limit for a, b in zip(found, wanted, strict=True)):
        raise ModelError(f"'{lm.name}' cannot tell packed rows apart: not supported, use another architecture")


def _states(lm: LM, ids: Sequence[int], positions: Sequence[int] | None = None) -> torch.Tensor:
    """States [T, d] of one line, in float32."""
    given = torch.tensor([ids, positions or range(len(ids))], device=lm.device)
    return lm.hidden(lm.model, input_ids=given[:1], position_ids=given[1:])[0].float()


@torch.no_grad()
def teacher_targets(
    lm: LM, rows: Sequence[Row], prefixes: Sequence[Sequence[int]], kept: Kept, top_k: int = 0,
    progress: Callable[[int, int], None] | None = None, accelerator: Accelerator | None = None, own: LM | None = None,
) -> Tensors:
    """What is kept of every scored token, in the order of the rows.

    top_k 0: {"states": last hidden states [Σ scored, d]}; k: the fields of `Compact`. Where memory is short, fewer
    sentences are scored together. own: the teacher of rehearsed rows, where that is another one. accelerator: its
    processes read some of the contexts each, unless a file is needed or the model is cut over them.
    Raises OutputError where `kept` cannot write.
    """
    starts, head = offsets(rows), head_of(lm)
    read: dict[int, Any] = {}  # the prefix that is read now
    dtype = torch.bfloat16 if torch.is_autocast_enabled(lm.device.type) else lm.model.dtype

    def fields(states: torch.Tensor) -> Tensors:
        if not top_k:
            return {"states": states.to(dtype)}
        parts = [vars(Compact.of(head.logits(part), top_k)) for part in torch.split(states, CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def score(prefix: int, part: Sequence[int]) -> None:
        reader = own if own and rows[part[0]].rehearsed else lm
        # bf16 products prepare and keep a kernel for every new shape on a CPU, and each context has shapes of its own
        with torch.autocast("cpu", enabled=False):
            if prefix not in read:
                read.clear()
                read[prefix] = reader.prefix_cache(prefixes[prefix][:-1]) if len(prefixes[prefix]) > 1 else None
            states = _on_prefix(reader, prefixes[prefix], read[prefix], [rows[i].s for i in part])
        for state, i in zip(states, part, strict=True):
            kept.put(starts[i], fields(state[len(rows[i].s) - rows[i].scored : len(rows[i].s)]))

    kept.reserve(starts[-1] + rows[-1].scored, fields(head.weight.new_zeros(1, head.weight.shape[1])))
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prefix, []).append(i)
    together = is_sharded(lm.model)  # every process needs every forward pass
    divided = accelerator if accelerator and not kept.in_file and not together else None
    turn, turns = (divided.process_index, divided.num_processes) if divided else (0, 1)
    done, limit = 0, CPU_SENTENCE_TOKENS if lm.device.type == "cpu" else SENTENCE_TOKENS
    for prefix, members in list(groups.items())[turn::turns]:
        waiting = sorted(members, key=lambda i: len(rows[i].s))
        while waiting:
            part = _first(waiting, rows, len(prefixes[prefix]), limit)
            if fits(partial(score, prefix, part), last=len(part) == 1 or together):
                waiting = waiting[len(part) :]
            else:
                limit = len(part) * _cost(rows[part[-1]], len(prefixes[prefix])) // 2
        done += len(members)
        if progress:
            progress(min(turns * done, len(rows)), len(rows))
    found = kept.tensors()
    return {name: divided.reduce(t, "sum") for name, t in found.items()} if divided else found


def teacher_states(
    lm: LM, rows: Sequence[Row], prefixes: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Last hidden states [Σ scored, d] that predict the scored tokens of every row, in the order of the rows."""
    with Kept(lm.device) as kept:
        return teacher_targets(lm, rows, prefixes, kept, progress=progress)["states"]


def as_target(tensors: Tensors, head: Head, copy: bool = False) -> Target:
    """What `teacher_targets` kept, as what a student is trained against. copy: of the head, which will be trained."""
    return Exact(tensors["states"], head.frozen(copy)) if "states" in tensors else Compact(**tensors)


def _first(waiting: Sequence[int], rows: Sequence[Row], prefix: int, limit: int) -> list[int]:
    """The first of `waiting` (by rising length) that are scored together, all on the prefix's cache: at least one."""
    n = 1
    while n < len(waiting) and (n + 1) * _cost(rows[waiting[n]], prefix) <= limit:
        n += 1
    return list(waiting[:n])


def _cost(row: Row, prefix: int) -> int:
    """What a sentence takes, in tokens: its own, and its copy of the prefix's keys and values, which are smaller."""
    return len(row.s) + prefix // 4


def _on_prefix(lm: LM, prefix: Sequence[int], cache: Any, sentences: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """States [B, T, d]: place t predicts token t of the sentence (place 0 is the prefix's last token)."""
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    width = max(len(s) for s in sentences)
    # the last token of the prefix goes with every sentence: its output predicts the sentence's first token
    rows = torch.full((len(sentences), width), pad)
    rows[:, 0] = prefix[-1]
    for i, s in enumerate(sentences):
        rows[i, 1 : len(s)] = torch.tensor(s[:-1], dtype=torch.long)
    rows = rows.to(lm.device)
    positions = torch.arange(len(prefix) - 1, len(prefix) - 1 + width, device=lm.device)[None].expand(
        len(sentences), -1
    )
    return lm.hidden(lm.model, input_ids=rows, position_ids=positions, past_key_values=cache)
