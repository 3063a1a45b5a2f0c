"""InfLLM: all contexts are read in one long stream; each query looks up the blocks of it that fit.

Nothing is trained. 𝒮 = all tokens, whose keys and values are kept. The attention is in blocks.py; refuses to know how
it works. Source: arXiv 2402.04617; arXiv 2410.00487, section 4.2 (the prompt "context1, …, contextN, question").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from selfparam.errors import ModelError
from selfparam.lm import CONTEXT_HEAD, CONTEXT_TAIL, LM
from selfparam.methods.blocks import Blocks, Settings, block_attention
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import greedy, llama_type
from selfparam.types import Question, TargetSet

#: The authors' settings. They take the base of RoPE from the model and no notice of Mistral's sliding window.
MISTRAL_7B = LLAMA_3_8B = Settings()
VICUNA_7B = Settings(n_local=2048)
#: Ours, for a trained window of 2,048: the authors did not run this model.
OPENLLAMA_3B = Settings(n_local=1024, topk=8)
_ROPES = ("default", "linear", "llama3")  # the kinds whose angles are proportional to the position


def logits(lm: LM, ids: Sequence[int], settings: Settings) -> torch.Tensor:
    """Logits [T, V] of ids read from nothing: all but the last in chunks, then the last alone. Raises ModelError."""
    check(lm)
    with torch.no_grad(), block_attention(lm.model):
        return head(lm, read(lm, Blocks(lm.model, settings), ids, settings.chunk))


def head(lm: LM, states: torch.Tensor) -> torch.Tensor:
    """Logits of last hidden states."""
    return lm.model.get_output_embeddings()(states)  # type: ignore[no-any-return]


def read(lm: LM, blocks: Blocks, ids: Sequence[int], chunk: int) -> torch.Tensor:
    """Read a prompt as InfLLM does; last hidden states [T, d]. Inside of block_attention. Raises ModelError."""
    if not ids:
        raise ModelError("InfLLM was given no tokens to read: ask a question")
    return torch.cat([extend(lm, blocks, ids[:-1], chunk), extend(lm, blocks, ids[-1:], chunk)])


def extend(lm: LM, blocks: Blocks, ids: Sequence[int], chunk: int) -> torch.Tensor:
    """Read ids in chunks, behind what was read; last hidden states [n, d]. Inside of block_attention."""
    parts = [torch.empty(0, lm.text_config.hidden_size, dtype=lm.model.dtype, device=lm.device)]
    for at in range(0, len(ids), chunk):
        row = torch.tensor([list(ids[at : at + chunk])], device=lm.device)
        states = lm.hidden(lm.model, input_ids=row, position_ids=torch.zeros_like(row), past_key_values=blocks,
                           blocks=blocks)
        parts.append(states[0])
    return torch.cat(parts)


def check(lm: LM) -> None:
    """Raises ModelError for a model that cannot be read this way."""
    llama_type(lm, "InfLLM")
    rope = lm.text_config.rope_parameters["rope_type"]
    if rope not in _ROPES:
        raise ModelError(f"InfLLM needs angles proportional to the position, '{lm.name}' has RoPE of the type "
                         f"'{rope}': use another model")


@dataclass(frozen=True)
class InfLLM(Settings):
    """one_shot: read contexts and question together for every question; otherwise the contexts are read once, and the
    borders of execution blocks start again at the question."""

    one_shot: bool = False
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        """Raises ModelError for a model that is no Llama or Mistral, or whose window is smaller than n_local."""
        check(lm)
        if self.n_local > lm.window:
            raise ModelError(f"InfLLM's local window of {self.n_local} tokens is larger than the window of {lm.window} "
                             "that the model knows: set n_local (and exc_block) lower")
        earlier = after if isinstance(after, Streamed) else Streamed(lm, self, Blocks(lm.model, self), (), ())
        texts = (*earlier.texts, *(one.context.text for one in sets if one.context.text))
        ids: list[int] = [] if earlier.ids else lm.prefix()
        for i in range(len(earlier.texts), len(texts)):
            ids += lm.encode(f"{', ' if i else CONTEXT_HEAD}{texts[i]}")
        blocks = earlier.blocks.snapshot()
        if not self.one_shot:
            with torch.no_grad(), block_attention(lm.model):
                extend(lm, blocks, ids, self.chunk)
        return Streamed(lm, self, blocks, texts, (*earlier.ids, *ids))


@dataclass(frozen=True)
class Streamed:
    """Answers behind a stream of contexts. blocks: the state after `ids` (nothing where all is read in one shot)."""

    lm: LM
    settings: InfLLM
    blocks: Blocks
    texts: tuple[str, ...]
    ids: tuple[int, ...]

    @property
    def storage_tokens(self) -> int:
        return len(self.ids)

    @property
    def notes(self) -> Sequence[str]:
        size = self.storage_tokens * kv_bytes(self.lm.text_config, self.lm.model.dtype.itemsize)
        return [f"InfLLM keeps {size / 1e6:.1f} MB of keys and values"]

    def answer(self, questions: Sequence[Question]) -> list[str]:
        with torch.no_grad(), block_attention(self.lm.model):
            return [self._answer(q) for q in questions]

    def _answer(self, question: Question) -> str:
        blocks, chunk = self.blocks.snapshot(), self.settings.chunk
        tail = self.lm.encode(CONTEXT_TAIL) if self.texts else []
        ids = [*(self.ids if self.settings.one_shot else ()), *tail, *self.lm.question(question.text)]
        return greedy(self.lm, ids, lambda more: head(self.lm, read(self.lm, blocks, more, chunk)[-1]))


def kv_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers of a model with this configuration."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * int(dim) * itemsize
