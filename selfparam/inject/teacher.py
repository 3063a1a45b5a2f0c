"""The teacher pass: θ reads x once, scores all its sentences on that cache, and what the loss needs of them is kept.

A model that leaves no cache of keys and values reads x before every sentence. All of it happens before the first
training step, from the very weights that are then trained: one copy of the model. Kept per scored token: the last
hidden state (d values; logits are recomputed through the frozen head, so the KL is the exact one over the whole
vocabulary), or the k likeliest tokens and the mass of the rest. Refuses to know where it is kept and how it is trained
on. Source: Eq. 2 of arXiv 2410.00487, P_θ(s|x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from selfparam.errors import ModelError
from selfparam.inject.memory import Kept, Tensors, fits
from selfparam.inject.objective import CHUNK, Compact, Exact, Head, Target
from selfparam.inject.pairs import Row, offsets
from selfparam.inject.sharded import is_sharded
from selfparam.inject.trainable import experts, layer_linears
from selfparam.lm import LM
from selfparam.types import Recipe

SENTENCE_TOKENS = 8192  # tokens of sentences scored together on one prefix
CPU_SENTENCE_TOKENS = 2048  # more is no faster there, and takes more memory
#: What a forward pass raises in a model that cannot do what it is asked for.
ERRORS = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)


def head_of(lm: LM) -> Head:
    """The output head of the model."""
    linear = lm.model.get_output_embeddings()
    return Head(linear.weight, getattr(linear, "bias", None), lm.softcap)


def check_model(lm: LM, recipe: Recipe) -> None:
    """ModelError where lm cannot be trained so: some short forward passes, before anything long is begun."""
    check_rows(lm)
    check_head(lm)
    if recipe.train == "full":
        return
    layer_linears(lm)
    if experts(lm):
        for cannot, advice in (
            (is_sharded(lm.model), "be cut over processes: use one process"),
            (recipe.retention > 0, "be held: use --retention 0"),
            (recipe.train == "osf", "have an orthogonal subspace: use another --train"),
            (recipe.train == "mlp" and recipe.optimizer == "muon", "be trained with Muon: use LoRA"),
        ):
            if cannot:
                raise ModelError(f"the experts of '{lm.name}' cannot {advice}")


@torch.no_grad()
def check_head(lm: LM) -> None:
    """ModelError when head(last hidden state) is not what the model itself returns as logits."""
    ids = torch.tensor([lm.bos * 4], device=lm.device)
    with _without_dropout(lm):
        expected = lm.model(input_ids=ids, use_cache=False).logits[0].float()
        head, states = head_of(lm), lm.hidden(lm.model, input_ids=ids)[0]
    if head.weight.shape[1] != states.shape[1] or not torch.allclose(
            head.logits(states), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max() + 1e-6)):
        raise ModelError(
            f"the logits of '{lm.name}' are more than a linear head on its last hidden states: not supported"
        )


@torch.no_grad()
def check_rows(lm: LM) -> None:
    """Find out whether rows can be packed and go on from a cache of their prefix, and set lm.apart where they cannot.

    Raises ModelError where a row depends even on the padding behind it.
    """
    one, two = ([*lm.bos, *lm.encode(text)[:8]] for text in ("The red lamp stands on the hill.", "Who sails at night?"))
    try:
        with _without_dropout(lm):
            lm.apart = not _packs(lm, one, two)
            same = not lm.apart or _near(lm, _lines(lm, [two, [*one, *two]])[0, : len(two)], _lines(lm, [two])[0])
    except ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"'{lm.name}' cannot read rows ({type(error).__name__}): not supported, use another "
                         "architecture") from error
    if not same:
        raise ModelError(f"'{lm.name}' reads what stands behind a word: not supported, use a causal language model")


@contextmanager
def _without_dropout(lm: LM) -> Iterator[None]:
    training = lm.model.training
    lm.model.eval()
    try:
        yield
    finally:
        lm.model.train(training)


def _packs(lm: LM, one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether two is the same beside one in a line as alone, and on the cache of one as behind it."""
    try:
        line = torch.tensor([[*one, *two], [*range(len(one)), *range(len(two))]], device=lm.device)
        packed = lm.hidden(lm.model, input_ids=line[:1], position_ids=line[1:])[0, len(one) :]
        on_cache = _on_prefix(lm, one, lm.prefix_cache(one[:-1]), [(*two, *lm.bos)])[0, 1:]
    except ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return _near(lm, packed, _lines(lm, [two])[0]) and _near(lm, on_cache, _lines(lm, [[*one, *two]])[0, len(one) :])


def _near(lm: LM, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding, which in 16 bits adds up over the layers."""
    limit = 1e-3 if lm.model.dtype == torch.float32 else 0.1
    return float((a.float() - b.float()).norm() / b.float().norm()) <= limit


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
                short = reader.apart or len(prefixes[prefix]) == 1
                read[prefix] = None if short else reader.prefix_cache(prefixes[prefix][:-1])
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
        # with a sentence goes the prefix, or a copy of its keys and values, which are smaller
        front = len(prefixes[prefix]) // (1 if lm.apart else 4)
        while waiting:
            costs = [front + len(rows[i].s) for i in waiting]
            part = waiting[: _first(costs, limit)]
            if fits(partial(score, prefix, part), last=len(part) == 1 or together):
                waiting = waiting[len(part) :]
            else:
                limit = len(part) * costs[len(part) - 1] // 2
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


def _first(costs: Sequence[int], limit: int) -> int:
    """How many of the first sentences are scored together: at least one. costs: in tokens, rising."""
    n = 1
    while n < len(costs) and (n + 1) * costs[n] <= limit:
        n += 1
    return n


def _on_prefix(lm: LM, prefix: Sequence[int], cache: Any, sentences: Sequence[Sequence[int]]) -> torch.Tensor:
    """States [B, T, d]: place t predicts token t of the sentence (place 0 is the prefix's last token).

    cache: of the prefix but for that token, which goes with every sentence; None: the whole prefix does.
    """
    front = list(prefix if cache is None else prefix[-1:])
    return _lines(lm, [[*front, *s[:-1]] for s in sentences], len(prefix) - len(front), cache)[:, len(front) - 1 :]


def _lines(lm: LM, lines: Sequence[Sequence[int]], begin: int = 0, cache: Any = None) -> torch.Tensor:
    """States [B, T, d] of lines, padded at their ends, from the position `begin` on."""
    width = max(len(line) for line in lines)
    ids = torch.tensor([[*line, *[lm.pad] * (width - len(line))] for line in lines], device=lm.device)
    positions = torch.arange(begin, begin + width, device=lm.device).expand_as(ids)
    return lm.hidden(lm.model, input_ids=ids, position_ids=positions, past_key_values=cache)
