"""InfLLM's attention in one layer: initial tokens, blocks that are looked up, and a local window, in one softmax.

`BlockLayer` is a layer of transformers' Cache and `attention` a function of its AttentionInterface: the model's files
stay as they are. The model is called with position 0 everywhere; queries and keys arrive un-rotated and are rotated
here. Blocks lie in host memory, the last ones used also where the model is. Refuses to know texts and models.
Source: InfLLM, arXiv 2402.04617, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import rotate_half

from selfparam.errors import TableError

NAME = "selfparam_blocks"


@dataclass(frozen=True)
class Settings:
    """InfLLM's settings, in tokens unless said otherwise; the defaults are the paper's for Mistral-7B and Llama-3-8B.

    block: tokens of a block. n_init: initial tokens that every query sees. n_local: the local window.
    topk: blocks that a query sees. repr_topk: tokens of a block whose mean key represents it. exc_block: queries that
    look up together. max_cached_block: blocks of a layer that stay on the accelerator. chunk: tokens of one model call.
    Raises TableError for settings that contradict each other.
    """

    block: int = 128
    n_init: int = 128
    n_local: int = 4096
    topk: int = 16
    repr_topk: int = 4
    exc_block: int = 512
    max_cached_block: int = 32
    chunk: int = 8192

    def __post_init__(self) -> None:
        for one in fields(Settings):
            least = 0 if one.name in ("n_init", "topk", "max_cached_block") else 1
            if getattr(self, one.name) < least:
                raise TableError(f"InfLLM: {one.name} = {getattr(self, one.name)} is less than {least}")
        if self.exc_block > self.n_local:
            raise TableError(f"InfLLM: exc_block = {self.exc_block} is more than n_local = {self.n_local}: "
                             "queries that look up together must fit the window")
        if self.repr_topk > self.block:
            raise TableError(f"InfLLM: repr_topk = {self.repr_topk} is more than the {self.block} tokens of a block")


@dataclass(frozen=True, eq=False)
class Block:
    """Un-rotated keys and values [KV, block, dh] of neighbouring tokens, in host memory. Equal only to itself."""

    keys: torch.Tensor
    values: torch.Tensor


class BlockLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one layer remembers. No tensor is changed once another layer may hold it, so snapshots cost no copies.

    seen: tokens so far. start: the first that is neither initial nor in a block; keys, values [KV, seen - start, dh]
    and scores [H, seen - start] (attention received so far) are of the tokens from there on. All keys are un-rotated.
    cos, sin: [n_local + exc_block, dh], of the positions 0, 1, …
    """

    is_sliding = False

    def __init__(self, settings: Settings, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.settings, self.cos, self.sin = settings, cos, sin
        self.seen = self.start = 0
        self.initial: tuple[torch.Tensor, torch.Tensor] | None = None
        self.scores = torch.empty(0)
        self.blocks: list[Block] = []
        self.representatives = torch.empty(0)  # [blocks, H, dh]
        self.cached: dict[Block, tuple[torch.Tensor, torch.Tensor]] = {}  # the block that was used last comes last

    def snapshot(self) -> BlockLayer:
        """The same state, which from now on goes its own way."""
        other = copy.copy(self)
        other.blocks, other.cached = list(self.blocks), dict(self.cached)
        return other

    # --- what transformers asks of a layer ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        empty = key_states[0, :, :0]
        self.keys, self.values, self.initial = empty, empty, (empty, empty)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The new states as they are; `attend` keeps them, one execution block after another."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    # --- attention ----------------------------------------------------------------------------------------------------

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Un-rotated queries [H, n, dh], keys and values [KV, n, dh] of the next n tokens -> outputs [H, n, dh]."""
        step = self.settings.exc_block
        parts = [self._attend(q[:, i : i + step], k[:, i : i + step], v[:, i : i + step], scale)
                 for i in range(0, q.shape[1], step)]
        return torch.cat(parts, dim=1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One execution block: one softmax over the window (rotated) and the global keys (all n_local - 1 away)."""
        n, first, window = q.shape[1], self.seen, self.settings.n_local
        self.keys, self.values = torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        new = torch.zeros(q.shape[0], n, device=q.device)
        self.scores = torch.cat([self.scores.to(q.device).view(q.shape[0], -1), new], dim=1)
        self.seen = first + n
        low = max(0, first - window)  # never before self.start
        keys, values = self.keys[:, low - self.start :], self.values[:, low - self.start :]
        local = products(self._rotated(q, first - low), self._rotated(keys, 0)) * scale
        distance = torch.arange(first - low, self.seen - low)[:, None] - torch.arange(self.seen - low)
        local = local.masked_fill(((distance < 0) | (distance >= window)).to(q.device), float("-inf"))
        far = q * self.cos[window - 1] + rotate_half(q) * self.sin[window - 1]
        far_keys, far_values = self._global(far)
        logits = torch.cat([local, products(far, far_keys) * scale], dim=-1)
        p = F.softmax(logits, dim=-1, dtype=torch.float32)
        near, rest = p[..., : local.shape[-1]], p[..., local.shape[-1] :]
        self.scores[:, low - self.start :] += near.sum(dim=1)
        out = weighted(near.to(q.dtype), values) + weighted(rest.to(q.dtype), far_values)
        self._evict()
        return out

    def _rotated(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """RoPE of [heads, n, dh] at the positions first, first + 1, … counted from the start of the window."""
        cos, sin = self.cos[first : first + x.shape[1]], self.sin[first : first + x.shape[1]]
        return x * cos + rotate_half(x) * sin  # type: ignore[no-any-return]

    def _global(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the initial tokens, the chosen blocks, and what has left the window but is in no block."""
        rest = max(0, self.seen - self.settings.n_local - self.start)
        assert self.initial is not None
        parts = [self.initial, *(self._load(block) for block in self._chosen(q)),
                 (self.keys[:, :rest], self.values[:, :rest])]
        return torch.cat([k for k, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)

    def _chosen(self, q: torch.Tensor) -> list[Block]:
        """The blocks whose representatives fit the mean query [H, n, dh] best, over all heads together."""
        if len(self.blocks) <= self.settings.topk:
            return self.blocks
        fit = self.representatives.flatten(1) @ q.mean(dim=1).flatten()
        return [self.blocks[i] for i in sorted(fit.topk(self.settings.topk).indices.tolist())]

    def _load(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """A block where the model is; the least recently used ones leave."""
        device = self.keys.device
        found = self.cached.pop(block, None) or (block.keys.to(device, non_blocking=True),
                                                 block.values.to(device, non_blocking=True))
        self.cached[block] = found
        while len(self.cached) > self.settings.max_cached_block:
            del self.cached[next(iter(self.cached))]
        return found

    def _evict(self) -> None:
        """Tokens that left the window become initial tokens, then blocks."""
        s = self.settings
        assert self.initial is not None
        over = self.seen - self.start - s.n_local
        lacking = s.n_init - self.initial[0].shape[1]
        if lacking > 0 and over > 0:
            k, v, _ = self._taken(min(lacking, over))
            self.initial = (torch.cat([self.initial[0], k], dim=1), torch.cat([self.initial[1], v], dim=1))
        found = []
        while self.seen - self.start - s.block >= s.n_local:
            k, v, score = self._taken(s.block)
            found.append(representative(k, score, s.repr_topk))
            self.blocks.append(Block(on_host(k), on_host(v)))
        if found:
            earlier = [self.representatives] if self.representatives.numel() else []
            self.representatives = torch.cat([*earlier, torch.stack(found)])

    def _taken(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and scores of the first n tokens, which are then no longer held here."""
        taken = self.keys[:, :n], self.values[:, :n], self.scores[:, :n]
        self.keys, self.values, self.scores = self.keys[:, n:], self.values[:, n:], self.scores[:, n:]
        self.start += n
        return taken

    # --- what it costs ------------------------------------------------------------------------------------------------

    def nbytes(self) -> tuple[int, int]:
        """Bytes where the model is (initial tokens, window, cached blocks, representatives), and in host memory."""
        near = [*(self.initial or ()), self.keys, self.values, self.scores, self.representatives]
        near += [t for pair in self.cached.values() for t in pair]
        return (sum(t.numel() * t.element_size() for t in near if t is not None),
                sum(t.numel() * t.element_size() for b in self.blocks for t in (b.keys, b.values)))


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q·k [H, n, m] of queries [H, n, dh] and keys [KV, m, dh]; neighbouring query heads share a key head."""
    grouped = q.reshape(k.shape[0], q.shape[0] // k.shape[0] * q.shape[1], q.shape[2])
    return (grouped @ k.transpose(1, 2)).view(q.shape[0], q.shape[1], k.shape[1])


def weighted(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ p·v [H, n, dh] of probabilities [H, n, m] and values [KV, m, dh]."""
    grouped = p.reshape(v.shape[0], p.shape[0] // v.shape[0] * p.shape[1], p.shape[2])
    return (grouped @ v).view(p.shape[0], p.shape[1], v.shape[2])


def representative(keys: torch.Tensor, scores: torch.Tensor, top: int) -> torch.Tensor:
    """[H, dh]: for each query head the mean un-rotated key of the `top` tokens of keys [KV, n, dh] with the most
    attention, scores [H, n]."""
    best = scores.topk(top, dim=1).indices[..., None].expand(-1, -1, keys.shape[-1])
    return keys.repeat_interleave(scores.shape[0] // keys.shape[0], dim=0).gather(1, best).mean(dim=1)


def on_host(states: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where there is a GPU to copy back to."""
    host = states.to("cpu", copy=True)
    return host.pin_memory() if states.is_cuda else host


class Blocks(Cache):  # type: ignore[misc]
    """The state of all layers of a model: what `past_key_values` and the attention function's `blocks` are."""

    def __init__(self, model: Any, settings: Settings) -> None:
        positions = torch.arange(settings.n_local + settings.exc_block, device=model.device)[None]
        backbone = getattr(model, model.base_model_prefix)
        cos, sin = backbone.rotary_emb(model.get_input_embeddings().weight, positions)
        super().__init__(layers=[BlockLayer(settings, cos[0], sin[0]) for _ in range(model.config.num_hidden_layers)])

    def snapshot(self) -> Blocks:
        """The same state, which from now on goes its own way."""
        other = copy.copy(self)
        other.layers = [layer.snapshot() for layer in self.layers]
        return other

    def nbytes(self) -> tuple[int, int]:
        """Bytes where the model is, and in host memory."""
        near, host = zip(*(layer.nbytes() for layer in self.layers), strict=True)
        return sum(near), sum(host)


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
              scaling: float, blocks: Blocks, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function: states [1, heads, n, dh] of the next n tokens -> outputs [1, n, H, dh]."""
    out = blocks.layers[module.layer_idx].attend(query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, attention)


@contextmanager
def block_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends as InfLLM does."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
