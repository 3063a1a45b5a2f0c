"""MemoryLLM's memory: N tokens in front of every layer; K of them are replaced when a text is written.

A memory is a tensor [L, N, d], or None for a pool that nothing was written into yet. It is handed in and out; nothing
here changes one. Refuses to know texts, questions and files. Source: MemoryLLM, arXiv 2402.04624, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import rotate_half

from selfparam.errors import ModelError
from selfparam.lm import LM
from selfparam.methods.readers import llama_type

LEAST = 16  # tokens that can be written
WRITING, READING = "default", "decoder_adapter"  # the adapters of a trained memory


@dataclass(frozen=True)
class MemoryModel:
    """A model that reads and writes memory tokens.

    start: [L, 1, d], the token in front of a layer's memory. position: [1, 1, d], added to what is written. blocks:
    N / K. tokens: K. trained: by MemoryLLM's training, so that there are adapters for writing and reading.
    """

    lm: LM
    start: torch.Tensor
    position: torch.Tensor
    blocks: int
    tokens: int
    trained: bool

    @property
    def size(self) -> int:
        """N: memory tokens of a layer."""
        return self.blocks * self.tokens

    @property
    def backbone(self) -> Any:
        return getattr(self.lm.model, self.lm.model.base_model_prefix)

    def adapter(self, name: str) -> None:
        """Switch between writing and reading."""
        if self.trained:
            self.lm.model.set_adapter(name)

    def angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of RoPE [1, length, dh] at the positions 0, 1, …"""
        positions = torch.arange(length, device=self.lm.device)[None]
        found: tuple[torch.Tensor, torch.Tensor] = self.backbone.rotary_emb(self.start, positions)
        return found


@torch.no_grad()
def untrained(lm: LM, blocks: int, tokens: int) -> MemoryModel:
    """A memory around any Llama, without MemoryLLM's training.

    In front of a layer's memory stands what the model itself has there for its BOS token; there are no adapters, and
    nothing is added to what is written. Raises ModelError for a model of another kind.
    """
    llama_type(lm, "MemoryLLM")
    if getattr(lm.text_config, "sliding_window", None):
        raise ModelError(f"'{lm.name}' attends in a sliding window and would not see its memory: use a model without "
                         "one")
    if blocks < 1 or tokens < 1:
        raise ModelError(f"a memory of {blocks} blocks of {tokens} tokens is empty: set blocks and tokens to 1 or more")
    backbone = getattr(lm.model, lm.model.base_model_prefix)
    states = backbone(torch.tensor([lm.bos], device=lm.device), output_hidden_states=True, use_cache=False)
    start = torch.cat(states.hidden_states[: lm.text_config.num_hidden_layers])
    return MemoryModel(lm, start, torch.zeros_like(start[:1]), blocks, tokens, trained=False)


@torch.no_grad()
def inject_memory(model: MemoryModel, memory: torch.Tensor | None, ids: Sequence[int],
                  source: torch.Generator | torch.Tensor) -> torch.Tensor:
    """Write ids (no special tokens) and return the new memory [L, N, d].

    source: random numbers, or for each layer the ascending indices [L, N - K] of the tokens that stay. Raises
    ModelError for fewer than 16 ids.
    """
    if len(ids) < LEAST:
        raise ModelError(f"MemoryLLM writes at least {LEAST} tokens, not {len(ids)}: give a longer text")
    return updated(memory, written(model, memory, ids), model.size, source)


def updated(memory: torch.Tensor | None, new: torch.Tensor, size: int,
            source: torch.Generator | torch.Tensor) -> torch.Tensor:
    """The memory [L, size, d] with K random tokens of each layer replaced by `new` [L, K, d], which come last.

    A pool without memory is filled with `new`, repeated: whole copies, then the last rows of one.
    """
    rows = new.shape[1]
    if memory is None:
        whole, rest = divmod(size, rows)
        return torch.cat([*[new] * whole, new[:, rows - rest :]], dim=1)
    kept = source if isinstance(source, torch.Tensor) else torch.stack(
        [torch.randperm(size, generator=source)[: size - rows].sort().values for _ in memory])
    stays = memory.gather(1, kept.to(memory.device)[..., None].expand(-1, -1, memory.shape[-1]))
    return torch.cat([stays, new], dim=1)


@torch.no_grad()
def written(model: MemoryModel, memory: torch.Tensor | None, ids: Sequence[int]) -> torch.Tensor:
    """What ids leave in each layer [L, K, d]: the layer's last K outputs (of an empty pool and fewer ids: all)."""
    model.adapter(WRITING)
    n, K = len(ids), model.tokens
    h = model.backbone.embed_tokens(torch.tensor([list(ids)], device=model.lm.device))
    prefix = 0 if memory is None else 1 + min(n, K)  # rows that are only attended to
    cos, sin = model.angles(n if memory is None else 1 + K + n)
    cache = DynamicCache()
    found = []
    for i, layer in enumerate(model.backbone.layers):
        x = h if memory is None else torch.cat([model.start[i][None], memory[i][None, -K:], h], dim=1)
        x = torch.cat([x[:, :-K], x[:, -K:] + model.position], dim=1)
        if prefix:
            cache.update(*keys_values(layer, x[:, :prefix], cos[:, :prefix], sin[:, :prefix]), i)
        x = x[:, prefix:]
        mask = create_causal_mask(model.lm.text_config, x, None, cache, layer_idx=i)
        out = layer(x, attention_mask=mask, position_embeddings=(cos[:, prefix:], sin[:, prefix:]),
                    past_key_values=cache, use_cache=True)
        found.append(out[:, -K:])
        h = out[:, -n:]
    return torch.cat(found)


@torch.no_grad()
def reading_cache(model: MemoryModel, memory: torch.Tensor | None) -> Any:
    """The keys and values of a memory, ready for questions (nothing where the pool is empty). The same for all."""
    model.adapter(READING)
    cache = DynamicCache()
    if memory is not None:
        cos, sin = model.angles(1 + model.size)
        for i, layer in enumerate(model.backbone.layers):
            x = torch.cat([model.start[i], memory[i]])[None]
            cache.update(*keys_values(layer, x, cos, sin), i)
    return cache


def keys_values(layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys, and values [1, KV, n, dh], that a layer makes of its inputs x [1, n, d]."""
    attention = layer.self_attn
    states = layer.input_layernorm(x)
    k, v = (project(states).view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj))
    return k * cos[:, None] + rotate_half(k) * sin[:, None], v


@torch.no_grad()
def read(model: MemoryModel, cache: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits [n, V] of ids behind what the cache holds; they are then in the cache too."""
    model.adapter(READING)
    rows = torch.tensor([list(ids)], device=model.lm.device)
    return model.lm.model(input_ids=rows, past_key_values=cache, use_cache=True).logits[0]  # type: ignore[no-any-return]


def logits(model: MemoryModel, memory: torch.Tensor | None, ids: Sequence[int]) -> torch.Tensor:
    """Logits [n, V] of a question's ids, given a memory [L, N, d]."""
    return read(model, reading_cache(model, memory), ids)
