"""θ: a causal language model and how to talk to it. The one file that imports transformers.

Rows are joined as ids, never by re-tokenising joined strings: `prefix(x)` is what stands in front of a sentence,
`sentence(s)` the ids of s, the same on the teacher's and the student's side. Chat models speak through their chat
template, others through "Question: … / Answer: …" lines. Refuses to know training and files other than models.
Source: SELF-PARAM, arXiv 2410.00487, section 3.1 (P_θ(s|x) against P_θ'(s)).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessorList
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance
from transformers.pytorch_utils import Conv1D as Conv1D
from transformers.utils import logging

from selfparam.errors import ModelError, OutputError
from selfparam.types import Sentence

EMBEDDED = "embedded"
#: Modules that are one matrix (GPT-2 keeps it transposed).
LINEAR = (torch.nn.Linear, Conv1D)
#: Added in front of a context. Kept short and the same for every model.
CONTEXT_HEAD, CONTEXT_TAIL = "Context: ", "\n\n"
#: Weight of log P against another model's in `generate`: 2 log P - log P_against.
GUIDANCE = 2.0
#: What a model's generation settings may say otherwise: its own words are taken as likely as it finds them.
PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0}
#: In front of a chat template that prints the day: the same rows on every day, or nothing could be resumed on another.
_DAY = ("{% macro strftime_now(form) %}{{ '2024-07-26' if '%m' in form else '26 July 2024' if '%B' in form else "
        "'26 Jul 2024' }}{% endmacro +%}")
_MARK = "\u2402\u2403"  # a string that no template contains, to find where the content goes
#: Attributes of configurations whose effect on logits is not a plain linear head.
_SCALED = ("logit_scale", "logits_scaling", "lm_head_multiplier")

Progress = Callable[[int, int], None]


@dataclass
class LM:
    """The weights and how to talk to them. `name` and `revision` say where they come from.

    apart: rows are read one to a line, with all that is in front of them, because what stands beside a row would change
    it (recurrent layers, for one) or a prefix leaves no keys and values to go on from. `inject` finds out.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str = ""
    apart: bool = False
    _chat: tuple[list[int], list[int], list[int]] | None = field(default=None, init=False, repr=False)

    # --- load and save ------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        name: str = EMBEDDED,
        *,
        dtype: str = "auto",
        device: str = "auto",
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> LM:
        """Load "embedded", a Hugging Face model directory, or a hub name.

        dtype: "auto" is float32 on a CPU (the model's own on a GPU), or "float32", "bfloat16".
        Raises ModelError when there is no such model, it is not a causal language model, a file is damaged, weights are
        missing, or the device is missing or full.
        """
        with quiet():
            path = embedded_path() if name == EMBEDDED else name
            local = Path(path).is_dir()
            if not local and (offline or os.environ.get("HF_HUB_OFFLINE") == "1"):
                raise ModelError(
                    f"no model directory '{name}', and hub names are refused offline: give a directory or 'embedded'"
                )
            if not local and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
                raise ModelError(
                    f"no model directory '{name}': give a Hugging Face directory, a hub name or 'embedded'"
                )
            where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            wanted = ("float32" if where == "cpu" else "auto") if dtype == "auto" else dtype
            try:
                tokenizer = AutoTokenizer.from_pretrained(  # that of mistral-common cannot split special tokens
                    path, trust_remote_code=trust_remote_code, local_files_only=local, mistral_format=False
                )
                model, found = AutoModelForCausalLM.from_pretrained(
                    path, dtype=wanted, trust_remote_code=trust_remote_code, local_files_only=local,
                    output_loading_info=True,
                )
            except Exception as error:  # transformers raises many kinds; the user needs one line
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                raise ModelError(
                    f"cannot load the model '{name}' ({reason}): check the name or the directory"
                ) from error
        if missing := sorted(found["missing_keys"]):  # they would be random numbers
            raise ModelError(f"'{name}' lacks {len(missing)} of its weights ('{missing[0]}' is one): give the whole "
                             "causal language model")
        try:
            model.to(where)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is missing or full
            reason = " ".join(str(error).split())[:120]
            raise ModelError(f"cannot put '{name}' on the device '{where}' ({reason}): try --device cpu") from error
        revision = getattr(model.config, "_commit_hash", None) or ""
        return cls(model.eval(), tokenizer, name, revision).checked()

    def checked(self) -> LM:
        """self, or ModelError where the model's logits are more than a linear head with an optional soft-cap."""
        config = self.text_config
        for key in _SCALED:
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise ModelError(
                    f"the model '{self.name}' scales its logits by '{key}', which is not supported: use another model"
                )
        if self.model.get_output_embeddings() is None:
            raise ModelError(f"'{self.name}' has no language-model head: give a causal language model")
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of '{self.name}' has no end-of-sequence token: add one to its configuration"
            )
        return self

    def save(self, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write a directory that AutoModelForCausalLM and AutoTokenizer load. state: instead of the model's weights.

        Raises OutputError.
        """
        try:
            with quiet():
                self.model.save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise OutputError(
                f"cannot write the model to '{folder}' ({error.strerror or error}): choose another folder"
            ) from error
        except ValueError as error:  # transformers checks how the model would generate, and refuses to write it
            says = " ".join(str(error).split())[:200]
            raise OutputError(f"cannot write '{self.name}' ({says}): repair its generation_config.json") from error

    # --- facts about the model ----------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return torch.device(next(iter(self.model.parameters())).device)

    @property
    def softcap(self) -> float | None:
        """c of logits = c·tanh(h·W/c) (Gemma 2), or None."""
        return getattr(self.text_config, "final_logit_softcapping", None)

    @property
    def window(self) -> int:
        """Longest input in tokens."""
        return int(getattr(self.text_config, "max_position_embeddings", 2048) or 2048)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def is_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    # --- ids ----------------------------------------------------------------------------------------------------

    def encode(self, text: str, template: bool = False) -> list[int]:
        """Ids of a text, without special tokens added. Names of special tokens in it are words, but in a template."""
        options = {} if template else {"split_special_tokens": True}
        return list(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def bos(self) -> list[int]:
        """What starts every plain row: the BOS token, or EOS where the model has none (a row needs one id in front)."""
        bos = self.tokenizer.bos_token_id
        return [bos if bos is not None else self.tokenizer.eos_token_id]

    @property
    def pad(self) -> int:
        """What fills the places of a batch that nobody reads."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.bos[0])

    def chat_parts(self) -> tuple[list[int], list[int], list[int]]:
        """Ids in front of the user's words, between them and the answer, and behind the answer (chat template)."""
        if self._chat is None:
            user = [{"role": "user", "content": _MARK}]
            both = [*user, {"role": "assistant", "content": _MARK}]
            try:
                template = self.tokenizer.get_chat_template()
                shown = partial(self.tokenizer.apply_chat_template, tokenize=False, enable_thinking=False,
                                chat_template=_DAY + template if "strftime_now" in template else template)
                asked, told = shown(user, add_generation_prompt=True), shown(both)
            except Exception as error:
                raise ModelError(
                    f"the chat template of '{self.name}' fails on a plain user turn ({error}): repair the template"
                ) from error
            if (asked.count(_MARK), told.count(_MARK)) != (1, 2):
                raise ModelError(
                    f"the chat template of '{self.name}' does not show every turn's words once: repair the template"
                )
            before, between = asked.split(_MARK)
            _, turn, after = told.split(_MARK)
            if turn.startswith(between) and turn[len(between) :].strip():
                between = turn  # the words have a place of their own in the turn (a channel)
            head, tail, end = (self.encode(part, template=True) for part in (before, between, after))
            self._chat = (head or self.bos, tail, end or [self.tokenizer.eos_token_id])
        return self._chat

    def prefix(self, context: str | None = None, plain: bool = False) -> list[int]:
        """Ids in front of a sentence: with x (teacher) or without (student). `plain`: in front of plain text."""
        head = self.bos if plain or not self.is_chat else self.chat_parts()[0]
        if not context:
            return list(head)
        text = f"{context}{CONTEXT_TAIL}" if plain else f"{CONTEXT_HEAD}{context}{CONTEXT_TAIL}"
        return [*head, *self.encode(text)]

    def question(self, text: str) -> list[int]:
        """Ids of a question up to where its answer starts."""
        if self.is_chat:
            return [*self.encode(text), *self.chat_parts()[1]]
        return self.encode(f"Question: {text}\nAnswer:")

    def sentence(self, s: Sentence) -> tuple[list[int], int]:
        """Ids of s and how many of them are its prompt. Plain text (no prompt) ends where it ends, without EOS."""
        if not s.prompt:
            return self.encode(s.completion), 0
        prompt = self.question(s.prompt)
        if self.is_chat:
            return [*prompt, *self.encode(s.completion), *self.chat_parts()[2]], len(prompt)
        joined = self.encode(f"Question: {s.prompt}\nAnswer: {s.completion}\n")
        if joined[: len(prompt)] == prompt:  # some tokenizers would put one more space in front of an answer by itself
            return joined, len(prompt)
        return [*prompt, *self.encode(f" {s.completion}\n")], len(prompt)

    def instruction(self, *pieces: str) -> list[int]:
        """Ids of a free request, ready for the answer; pieces (the context, the rest) are encoded apart."""
        head, tail = (
            (self.chat_parts()[0], self.chat_parts()[1]) if self.is_chat else (self.bos, self.encode("\nQuestion:"))
        )
        return [*head, *(i for piece in pieces for i in self.encode(piece)), *tail]

    # --- states ---------------------------------------------------------------------------------------------------

    @staticmethod
    def hidden(model: Any, **inputs: Any) -> torch.Tensor:
        """Last hidden states [B, T, d] behind the final norm. `model` is this model or its peft wrapper."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        backbone = getattr(inner, inner.base_model_prefix, None) or inner.model  # Llama 4 names another than it has
        return backbone(use_cache=inputs.get("past_key_values") is not None, **inputs).last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def prefix_cache(self, ids: Sequence[int]) -> Any:
        """Keys and values of a prefix, run once, for any rows, any number of times: what they add is not kept."""
        cache = DynamicCache(config=self.model.config)
        self.hidden(self.model, input_ids=torch.tensor([list(ids)], device=self.device), past_key_values=cache)
        for layer in cache.layers:
            layer.update = partial(_joined, (layer.keys, layer.values))
        return cache

    # --- generation ---------------------------------------------------------------------------------------------

    def stop_ids(self) -> list[int]:
        stops = {self.tokenizer.eos_token_id}
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        stops |= set(configured if isinstance(configured, list) else [configured]) - {None}
        if self.is_chat:
            end = self.chat_parts()[2]  # may begin with a blank, which answers have, too
            special = set(self.tokenizer.all_special_ids)
            stops |= {i for i in end if i in special} or ({end[0]} if self.decode(end[:1]).strip() else set())
        return sorted(stops)

    @torch.no_grad()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | None = None,
        stop_at: Sequence[int] = (),
        batch_tokens: int = 16_384,
        batch_rows: int = 64,
        seed: int = 0,
        against: LM | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Continue rows of ids, batched by length; greedy at temperature 0. Returns texts in the order of `rows`.

        stop: text that ends an answer (base models: a line break). stop_at: ids that end it (their first one stops).
        against: another θ whose likely words are avoided: tokens come from P² / P_against, P being this model's. For
        rows of one length: others are padded, which shifts the places that it sees.
        Raises ModelError for a row beyond the window.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        longest = max((len(r) for r in rows), default=0)
        if longest >= self.window:
            raise ModelError(
                f"a prompt of {longest} tokens does not fit the window of {self.window}: use a shorter context"
            )
        found: list[str] = [""] * len(rows)
        at = 0
        while at < len(order):
            room = self._room(rows[order[at]], max_new_tokens)
            size = max(1, min(len(order) - at, batch_tokens // (len(rows[order[at]]) + max_new_tokens), batch_rows))
            while size > 1 and not (self._room(last := rows[order[at + size - 1]], max_new_tokens) == room
                                    and size * (len(last) + max_new_tokens) <= batch_tokens):
                size -= 1  # of the longest row, and no answer is shorter because of its neighbours
            part = order[at : at + size]
            texts = self._generate_batch(
                [rows[i] for i in part],
                room,
                temperature,
                top_p,
                stop,
                [*self.stop_ids(), *stop_at[:1]],
                seed + at,
                against,
            )
            for i, text in zip(part, texts, strict=True):
                found[i] = text
            at += size
            if progress:
                progress(at, len(order))
        return found

    def _room(self, row: Sequence[int], wanted: int) -> int:
        """How many tokens may follow a row."""
        return min(wanted, self.window - len(row))

    def _generate_batch(
        self,
        rows: list[Sequence[int]],
        new: int,
        temperature: float,
        top_p: float,
        stop: str | None,
        ends: list[int],
        seed: int,
        against: LM | None,
    ) -> list[str]:
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), self.pad, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(list(row), device=self.device)
            mask[i, width - len(row) :] = 1
        options: dict[str, Any] = {"do_sample": temperature > 0, **PLAIN}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, **PLAIN_SAMPLING}
        if against:
            options["logits_processor"] = LogitsProcessorList([Guidance(GUIDANCE, against.model, ids, mask)])
        if stop:
            options |= {"stop_strings": [stop], "tokenizer": self.tokenizer}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), quiet():
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                pad_token_id=self.pad,
                eos_token_id=ends,
                use_cache=True,
                **options,
            )
        texts = [self.decode(_until(row[width:], ends)) for row in out.tolist()]
        return [t.split(stop)[0] if stop else t for t in texts]

    def answer(
        self,
        questions: Sequence[str],
        contexts: str | Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 24,
        progress: Progress | None = None,
    ) -> list[str]:
        """Greedy answers, with a context in front (one for all, or one for each question) or from memory."""
        each: Iterable[str | None] = contexts if isinstance(contexts, (list, tuple)) else [contexts] * len(questions)  # type: ignore[list-item]
        rows = [[*self.prefix(x), *self.question(q)] for q, x in zip(questions, each, strict=True)]
        stop = None if self.is_chat else "\n"
        return [a.strip() for a in self.generate(rows, max_new_tokens=max_new_tokens, stop=stop, progress=progress)]


def _joined(held: tuple[torch.Tensor, ...], *new: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
    """A prefix's keys and values, for every row, with a row's own behind them: what a cache's layer is asked for."""
    return tuple(torch.cat([h.expand(len(n), -1, -1, -1), n], -2) for h, n in zip(held, new, strict=False))


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """ids up to the first of the ends."""
    return ids[: next((i for i, t in enumerate(ids) if t in ends), len(ids))]


def embedded_path() -> Path:
    """Directory of the model that ships with the package. Raises ModelError when it is missing."""
    path = Path(str(resources.files("selfparam") / "embedded" / "model"))
    if not (path / "config.json").exists():
        raise ModelError("the embedded model is missing from this installation: install the package again")
    return path


@contextmanager
def quiet() -> Any:
    """No log lines and progress bars of the libraries inside."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
