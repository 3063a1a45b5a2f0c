"""MemoryLLM: contexts are written one after another into a pool of memory tokens of a fixed size, 𝒮 = N.

Either around the model of the table, untrained (and its notes say so), or a published checkpoint. Reading, writing and
the update are in pool.py. Source: arXiv 2402.04624; https://huggingface.co/YuWangX/memoryllm-8b (the files).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selfparam.errors import ModelError
from selfparam.lm import LM, quiet
from selfparam.methods.pool import LEAST, READING, WRITING, MemoryModel, inject_memory, read, reading_cache, untrained
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import ANSWER_TOKENS, greedy
from selfparam.types import Question, TargetSet

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")
#: Weights of a checkpoint that are not the language model's.
OWN = ("memory", "bos_embedding", "new_memory_positional_emb", "initialized")
#: What the published configuration switches on, and this file takes for granted.
_NEEDED = ("add_bos_embedding", "drop_memory_per_layer", "add_decoder_lora")


@dataclass(frozen=True)
class MemoryLLM:
    """checkpoint: directory of a trained one ("": an untrained pool of blocks · tokens around the table's model; the
    defaults are the published shape). longest: a longer context is written in pieces of that many tokens."""

    checkpoint: str = ""
    blocks: int = 50
    tokens: int = 256
    longest: int = 512
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        """Raises ModelError for a model of another kind, or a pool that does not fit its window."""
        earlier = after if isinstance(after, Remembering) else Remembering(*self._opened(lm))
        model, memory, pieces, skipped = earlier.model, earlier.memory, earlier.pieces, earlier.skipped
        source = torch.Generator().manual_seed(seed + pieces)
        for one in sets:
            ids = model.lm.encode(one.context.text)
            skipped += len(ids) < LEAST
            for piece in cut(ids, self.longest) if len(ids) >= LEAST else []:
                memory = inject_memory(model, memory, piece, source)
                pieces += 1
        return Remembering(model, memory, pieces, skipped)

    def _opened(self, lm: LM) -> tuple[MemoryModel, torch.Tensor | None]:
        if self.longest < 2 * LEAST:
            raise ModelError(f"MemoryLLM: longest = {self.longest} is less than {2 * LEAST}: use longer pieces")
        if self.checkpoint:
            return load_memoryllm(self.checkpoint, dtype=lm.model.dtype, device=str(lm.device))
        model = untrained(lm, self.blocks, self.tokens)
        room = lm.window - 1 - max(model.size + ANSWER_TOKENS, model.tokens + self.longest)
        if room < 1:
            raise ModelError(f"{model.size} memory tokens, or {model.tokens} and a piece of {self.longest}, do not fit "
                             f"the window of {lm.window}: use fewer blocks or tokens, or a smaller 'longest'")
        return model, None


def cut(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    """Pieces of `longest` ids counted from the end, in order. A first piece of fewer than 16 takes what it lacks from
    the second."""
    first = len(ids) % longest
    starts = [0] * bool(first) + list(range(first, len(ids), longest))
    if 0 < first < LEAST < len(ids):
        starts[1] = LEAST
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@dataclass(frozen=True)
class Remembering:
    """Answers with what is left in the memory. pieces: written so far. skipped: contexts too short to be written."""

    model: MemoryModel
    memory: torch.Tensor | None
    pieces: int = 0
    skipped: int = 0

    @property
    def lm(self) -> LM:
        return self.model.lm

    @property
    def storage_tokens(self) -> int:
        return self.model.size

    @property
    def notes(self) -> Sequence[str]:
        pool = f"{self.model.size} memory tokens in each of {len(self.model.start)} layers"
        found = [pool if self.model.trained else f"untrained memory ({pool}): not what a trained MemoryLLM reaches"]
        if self.skipped:
            found.append(f"{self.skipped} contexts have fewer than {LEAST} tokens and were not written")
        return found

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Raises ModelError for a question that does not fit the window behind the memory."""
        cache = reading_cache(self.model, self.memory)
        behind = cache.get_seq_length()
        head = [] if self.memory is not None else self.lm.bos
        found = []
        for question in questions:
            ids = [*head, *self._asked(question)]
            if behind + len(ids) + ANSWER_TOKENS > self._window():
                raise ModelError(f"a question of {len(ids)} tokens behind {behind} memory tokens does not fit the "
                                 f"window of {self._window()}: ask a shorter one")
            found.append(greedy(self.lm, ids, lambda more: read(self.model, cache, more)[-1]))
            cache.crop(behind - cache.get_seq_length())
        return found

    def _asked(self, question: Question) -> list[int]:
        """Ids of a question, without BOS, whose place the memory's own first token has."""
        ids = [*self.lm.prefix(), *self.lm.question(question.text)]
        return ids[1:] if ids[:1] == self.lm.bos else ids

    def _window(self) -> int:
        """Positions that the model knows; linear RoPE scaling stretches them."""
        rope = self.lm.text_config.rope_parameters
        return int(self.lm.window * (rope["factor"] if rope["rope_type"] == "linear" else 1))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def load_memoryllm(folder: str | Path, *, dtype: torch.dtype | None = None,
                   device: str = "cpu") -> tuple[MemoryModel, torch.Tensor | None]:
    """A checkpoint in the published layout, and its memory (None where it says that nothing was written).

    dtype: of the weights and the memory (None: as they are). Raises ModelError for a folder of another layout.
    """
    path = Path(folder)
    try:
        raw = json.loads((path / "config.json").read_text("utf-8"))
        state = {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load the MemoryLLM checkpoint '{folder}' ({_line(error)}): download it into this "
                         "directory") from error
    off = [key for key in _NEEDED if not raw.get(key)]
    lacking = [key for key in OWN if key not in state]
    if off or lacking:
        raise ModelError(f"'{folder}' is no MemoryLLM checkpoint of the published layout, it lacks "
                         f"{(off + lacking)[0]}: use an untrained memory, or another directory")
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    own = {key: state.pop(key).to(device) for key in OWN}
    model = with_adapters(raw)
    found = model.load_state_dict(state, strict=False, assign=True)
    wrong = [*found.missing_keys, *found.unexpected_keys]
    shape = (model.config.num_hidden_layers, raw["num_blocks"] * raw["num_tokens"], model.config.hidden_size)
    if wrong or tuple(own["memory"].shape) != shape:
        raise ModelError(f"'{folder}': weights and configuration disagree about {wrong[0] if wrong else 'memory'}: "
                         "download the checkpoint again")
    lm = LM(model.to(device).eval(), tokenizer, str(folder)).checked()
    made = MemoryModel(lm, own["bos_embedding"], own["new_memory_positional_emb"], raw["num_blocks"], raw["num_tokens"],
                       trained=True)
    return made, own["memory"] if int(own["initialized"]) else None


def with_adapters(raw: dict[str, Any]) -> Any:
    """The language model of a published configuration, without weights, with its writing and reading adapters."""
    lora = raw.get("lora_config") or {}
    config = AutoConfig.for_model("llama", **{k: v for k, v in raw.items() if k not in ("model_type", "auto_map")})
    with quiet(), warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")  # peft's, about the second adapter
        model = AutoModelForCausalLM.from_config(config)
        for name in (WRITING, READING):
            model.add_adapter(LoraConfig(r=lora.get("r", 16), lora_alpha=lora.get("lora_alpha", 32),
                                         lora_dropout=lora.get("lora_dropout", 0.1),
                                         target_modules=lora.get("target_modules") or list(TARGETS)), name)
    return model


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
